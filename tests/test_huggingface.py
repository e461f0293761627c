"""Hugging Face folders, both ways, compared with transformers."""

import dataclasses
import json
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from conftest import all_files, save, spread
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.cli import explain, plain
from common.huggingface import read_huggingface, write_huggingface
from common.tokenizer import EOT, get_tokenizer
from train_gpt2 import GPT, GPTConfig, load_model

IDX = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(small_model: GPT) -> GPT:
    return spread(small_model)


def write(model: GPT, folder: Path) -> Path:
    """Export a model."""
    write_huggingface(plain(model.config), dict(model.named_parameters()), folder)
    return folder


@pytest.fixture
def folder(model: GPT, tmp_path: Path) -> Path:
    """A small export, to be read or damaged."""
    return write(model, tmp_path / "hf")


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with GPT-2's vocabulary: it holds the tokenizer too."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32))
    return write(model, tmp_path_factory.mktemp("export") / "hf")


def change(folder: Path, **settings: object) -> None:
    """Change settings of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors, named without `transformer.` and with __ for a dot; None removes one."""
    path = folder / "model.safetensors"
    changes = {f"transformer.{name.replace('__', '.')}": t for name, t in tensors.items()}
    changed = load_file(path) | changes
    save_file({name: t for name, t in changed.items() if t is not None}, path)


def theirs(folder: Path) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


# -----------------------------------------------------------------------------
# writing


def test_transformers_computes_the_same_logits_without_the_padding(model, folder):
    logits = theirs(folder)(IDX).logits
    assert logits.shape[-1] == 300 < model(IDX).shape[-1]
    torch.testing.assert_close(model(IDX)[..., :300], logits, atol=1e-5, rtol=0)


def test_a_checkpoint_exports_the_same_bytes_as_its_model(model, folder, tmp_path):
    state = torch.load(save(model, tmp_path / "ckpt_000001.pt"), weights_only=True)
    write_huggingface(state["model_config"], state["model"], tmp_path / "other")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()
    }


def test_an_export_keeps_the_dropout_of_the_run(small_model, tmp_path):
    config = dataclasses.replace(small_model.config, dropout=0.25)
    found = theirs(write(GPT(config), tmp_path / "hf")).config
    assert found.resid_pdrop == found.embd_pdrop == found.attn_pdrop == 0.25


HARD = [
    "Hello  world, don't we'll 'S 's I'll'd",
    "naïve café — ünïcödé aͤ̈ ก็ हिन्दी",
    "😀👩‍👩‍👧‍👦 🇩🇪 \U0010ffff",
    "   lead\n\n\n\ttabs \r\n end   ",
    "\x00\x1c\x1d\x1e\x1f a\x85b\u180e \u200b\u00a0\u2003x\ufeff\x7f",
    "<|endoftext|>a<|endoftext|>b <|endoftext|> <|endoftext",
    "123456 ½²³ Ⅷ 中文字符 日本語 ﬀ ǅ İ",
    " " * 100 + "x" + "ab" * 50,
    "",
]


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_the_exported_tokenizer_gives_the_same_ids_as_ours(full_folder, tmp_path, files):
    transformers = pytest.importorskip("transformers")
    for path in full_folder.iterdir():  # with one of its two forms alone
        if files == "tokenizer.json" or path.name != "tokenizer.json":
            os.link(path, tmp_path / path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.model_max_length) == (
        50257,
        50256,
        32,
    )
    for text in HARD:
        ids = get_tokenizer().encode(text, allowed_special="all")
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", [OSError, SafetensorError])  # safetensors has its own error
def test_a_failed_export_leaves_the_earlier_one(folder, small_model, monkeypatch, kind):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise kind("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        write(small_model, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def others_of(folder: Path) -> dict[str, bytes]:
    """Put files and folders of the user beside an export."""
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "thesis.tex").write_text("precious")
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    (folder / "link").symlink_to("notes/deep/thesis.tex")
    names = ("notes/deep/thesis.tex", "model-q4.gguf", "link")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("links", [True, False])
def test_a_new_export_replaces_the_earlier_one_but_no_other_files(
    folder, small_model, monkeypatch, links
):
    def no_links(*args, **kwargs):
        raise OSError("not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    before = (folder / "model.safetensors").read_bytes()
    others = others_of(folder)
    for _ in range(2):
        write(spread(small_model), folder)
        assert (folder / "model.safetensors").read_bytes() != before
        assert {name: (folder / name).read_bytes() for name in others} == others
        assert (folder / "link").is_symlink()
        assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_a_failed_export_leaves_the_files_of_the_user(folder, small_model, monkeypatch):
    others_of(folder)
    before = all_files(folder.parent)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    def fail_to_name(path: Path, target: Path) -> Path:
        return fail() if path.name == ".hf.new" else os.rename(path, target)

    for place, wrong in (("shutil.copytree", fail), ("pathlib.Path.rename", fail_to_name)):
        with monkeypatch.context() as patch:
            patch.setattr(place, wrong)
            with pytest.raises(OSError, match="no space"):
                write(small_model, folder)
        assert all_files(folder.parent) == before


def test_files_of_the_user_survive_a_kill_between_the_two_renames(folder, small_model, monkeypatch):
    others = others_of(folder)
    folder.rename(folder.with_name(".hf.old"))
    folder.with_name(".hf.new").mkdir()
    write(small_model, folder)
    assert {name: (folder / name).read_bytes() for name in others} == others
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_a_tokenizer_of_an_earlier_model_goes_with_it(folder, model):
    (folder / "vocab.json").write_text("{}")  # this model's vocabulary has 300 tokens
    write(model, folder)
    assert not (folder / "vocab.json").exists() and load_model(folder)


def test_a_model_card_of_the_user_stays_and_ours_is_renewed(folder, model):
    facts = {"step": 7, "val_loss": 3.25}
    sizes, weights = plain(model.config), dict(model.named_parameters())
    write_huggingface(sizes, weights, folder, facts)
    card = (folder / "README.md").read_text()
    assert "| validation loss | 3.2500 |" in card
    write_huggingface(sizes, weights, folder, {**facts, "val_loss": 3.0})
    assert "| validation loss | 3.0000 |" in (folder / "README.md").read_text()
    for text in (card + "It likes cats.\n", "mine", "\udcff"):
        (folder / "README.md").write_bytes(text.encode(errors="surrogateescape"))
        write_huggingface(sizes, weights, folder, facts)
        assert (folder / "README.md").read_bytes() == text.encode(errors="surrogateescape")


def test_the_exported_tokenizer_pads_texts_of_several_lengths(full_folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(full_folder, local_files_only=True)
    batch = tokenizer(["one", "one two three"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[505, 50256, 50256], [505, 734, 1115]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_the_code_on_the_model_card_writes_text(full_folder, capsys):
    pytest.importorskip("transformers")
    code = (full_folder / "README.md").read_text().split("```")[1].removeprefix("python")
    exec(code.replace("FOLDER", str(full_folder)), {})
    assert capsys.readouterr().out.startswith("Hello, I am")


@pytest.mark.parametrize("vocab_size", [50258, 50304])
def test_a_resized_or_padded_vocabulary_goes_to_transformers_and_back(tmp_path, vocab_size):
    model = spread(
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=vocab_size))
    )
    folder = write(model, tmp_path / "hf")
    idx = torch.tensor([[0, 50256, 50257]])
    logits = theirs(folder)(idx).logits
    assert logits.shape[-1] == vocab_size
    again = load_model(folder)
    assert again.config == model.config
    for each in (model, again):
        torch.testing.assert_close(each(idx)[..., :vocab_size], logits, atol=1e-5, rtol=0)


# -----------------------------------------------------------------------------
# reading


def test_an_export_reads_back_as_the_same_model(model, folder):
    again = load_model(folder)
    assert again.config == model.config and again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(again(IDX)[..., :300], model(IDX)[..., :300], atol=0, rtol=0)


def test_reads_older_files_without_prefix_and_with_mask_buffers(folder):
    expected = theirs(folder)(IDX).logits
    path = folder / "model.safetensors"
    old = {name.removeprefix("transformer."): t.clone() for name, t in load_file(path).items()}
    for i in range(2):
        old[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)
        old[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, path)
    change(folder, n_positions=None, layer_norm_epsilon=None, tie_word_embeddings=None)
    logits = load_model(folder)(IDX)[..., :300]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_padding_takes_no_probability_if_all_logits_are_far_below_zero(folder):
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    bias = torch.full((32,), 5.0)  # together these move the logits to around -100
    change_tensors(folder, wte__weight=embedding - 0.6, ln_f__bias=bias)
    model = load_model(folder)
    logits = model(IDX)
    assert -130 < logits.mean() < -70
    padding = logits.softmax(-1)[..., 300:].sum(-1)
    assert padding.max() <= (384 - 300) / 300


class Hub:
    """A hub with one model, the files of a folder."""

    def __init__(self, repo: str, folder: Path):
        self.repo, self.folder = repo, folder
        self.asked: list[str] = []  # method and file of every request
        self.denied = False  # access is restricted

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        prefix, _, file = handler.path.partition("/resolve/main/")
        self.asked.append(f"{handler.command} {file}")
        path = self.folder / file
        known = prefix == f"/{self.repo}"
        found = known and path.is_file() and not self.denied
        handler.send_response(200 if found else 403 if self.denied else 404)
        if not found:
            code = "EntryNotFound" if known else "RepoNotFound"
            handler.send_header("X-Error-Code", "GatedRepo" if self.denied else code)
        handler.send_header("X-Repo-Commit", "0" * 40)
        handler.send_header("ETag", f'"{file}"')
        body = path.read_bytes() if found else b""
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub that has the small export as org/small."""
    hub = Hub("org/small", folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "repo"),
    [("gpt2", "openai-community/gpt2"), ("distilgpt2", "distilgpt2"), ("org/small", "org/small")],
)
def test_reads_by_name_from_the_hub(folder, hub, monkeypatch, name, repo):
    hub.repo = repo
    model = load_model(name)
    expected = load_file(folder / "model.safetensors")["transformer.wpe.weight"]
    assert model.transformer.wpe.weight.equal(expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what is in the cache is enough
    assert load_model(name).transformer.wpe.weight.equal(expected)


def test_a_model_in_several_files_is_read_from_the_hub(folder, hub, monkeypatch):
    expected = load_model(folder)(IDX)
    split(folder)
    assert load_model("org/small")(IDX).equal(expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_model("org/small")(IDX).equal(expected)
    for path in Path(constants.HF_HUB_CACHE).rglob("model[-.]*"):  # a download that did not end
        path.unlink()
    with pytest.raises(FileNotFoundError, match="on the hub, or the hub does not answer: give a"):
        load_model("org/small")


def test_a_model_on_the_hub_with_another_tokenizer_is_refused_before_the_download(folder, hub):
    (folder / "spiece.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"org/small has another tokenizer .*\(spiece\.model\)"):
        load_model("org/small")
    assert not any("safetensors" in request for request in hub.asked)


def test_a_pickle_on_the_hub_is_refused_without_a_download(folder, hub):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has only pytorch_model\.bin, a pickle") as error:
        load_model("org/small")
    assert "M.from_pretrained('org/small').save_pretrained('NEW')" in str(error.value)
    assert "GET pytorch_model.bin" not in hub.asked


def test_a_download_that_breaks_off_is_one_line(hub, monkeypatch):
    def break_off(repo: str, file: str, **kwargs: object) -> str:
        if file == "model.safetensors":
            raise OSError("Consistency check failed: file should be of size 9\nbut has size 5")
        return download(repo, file, **kwargs)

    download = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", break_off)
    what = r"^org/small: model\.safetensors could not be downloaded \(Consistency .* 9\): try again"
    with pytest.raises(OSError, match=what):
        load_model("org/small")


@pytest.mark.parametrize(
    "error",
    [ImportError("Using SOCKS proxy, but"), httpx2.UnsupportedProtocol("Request URL is missing")],
)
def test_a_client_that_cannot_begin_is_one_line(hub, monkeypatch, error):
    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=rf"^org/small: .* \({error}\): give a checkpoint"):
        load_model("org/small")


def test_a_tokenizer_that_the_hub_does_not_give_now_is_not_taken_for_gpt2_s(hub, monkeypatch):
    def no_answer(repo: str, file: str, **kwargs: object) -> str:
        if file in silent:
            raise huggingface_hub.errors.LocalEntryNotFoundError("An error happened")
        return download(repo, file, **kwargs)

    download, silent = huggingface_hub.hf_hub_download, ["tokenizer.json", "vocab.json"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_answer)
    with pytest.raises(OSError, match=r"^org/small: tokenizer\.json could not be downloaded \(An"):
        load_model("org/small")
    assert not any("safetensors" in request for request in hub.asked)
    silent.clear()
    assert load_model("org/small")
    silent += ["tokenizer.json", "vocab.json"]  # the hub has said that there are none
    assert load_model("org/small")


def test_a_model_that_the_hub_does_not_give_is_one_line_with_the_reason(folder, hub):
    with pytest.raises(FileNotFoundError, match=r"no such name there, or a private one") as error:
        load_model("org/other")
    assert "\n" not in str(error.value) and "HF_TOKEN" in str(error.value)
    (folder / "config.json").rename(folder / "no.json")
    with pytest.raises(FileNotFoundError, match=r"org/small has no config\.json"):
        load_model("org/small")
    hub.denied = True
    with pytest.raises(FileNotFoundError, match=r"access is restricted: .*HF_TOKEN"):
        load_model("org/small")


def split(folder: Path) -> None:
    """Store the weights of an export in two files with an index, as transformers does."""
    tensors, names = load_file(folder / "model.safetensors"), {}
    for i, half in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"model-0000{i}-of-00002.safetensors"
        save_file({key: tensors[key] for key in half}, folder / name)
        names |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_a_model_in_several_files_is_the_same_model(folder):
    expected = load_model(folder)(IDX)
    split(folder)
    assert load_model(folder)(IDX).equal(expected)
    torch.testing.assert_close(theirs(folder)(IDX).logits, expected[..., :300], atol=1e-5, rtol=0)
    for name in ("model.safetensors.index.json", "model-00002-of-00002.safetensors", "config.json"):
        assert load_model(folder / name)(IDX).equal(expected), name


def test_one_of_several_files_that_is_missing_or_outside_is_named(folder):
    split(folder)
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00002.safetensors").rename(folder.parent / "x.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"has no model-00002-of-00002\.safetensors, one of"
    ):
        load_model(folder)
    for text in (
        index.read_text().replace("model-00002-of-00002", "../x"), "{", "[]", "[" * 100_000,
        '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}',
    ):  # fmt: skip
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json is not an index of weights: get the"):
            load_model(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors\.index\.json"):
        load_model(folder / "model-00001-of-00002.safetensors")


def test_a_safetensors_file_is_read_by_its_path(folder, tmp_path):
    expected = load_model(folder)(IDX)
    assert load_model(folder / "model.safetensors")(IDX).equal(expected)
    (folder / "model.safetensors").rename(folder / "best")  # also under another name
    assert load_model(folder / "best")(IDX).equal(expected)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"best needs a config\.json beside it: put it"):
        load_model(folder / "best")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_become_the_same_float32(folder, dtype):
    path = folder / "model.safetensors"
    half = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(half, path)
    change(folder, dtype=str(dtype).removeprefix("torch."))
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.transformer.wpe.weight.equal(half["transformer.wpe.weight"].float())
    expected = theirs(folder).float()(IDX).logits
    torch.testing.assert_close(model(IDX)[..., :300], expected, atol=1e-5, rtol=0)


def test_weights_that_torch_compile_has_renamed_are_read(folder):
    expected = load_model(folder)(IDX)
    path = folder / "model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}, path)
    assert load_model(folder)(IDX).equal(expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_pickle_alone_is_refused_with_a_command_that_converts_it(folder, name):
    expected = load_model(folder)(IDX)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    if name != "pytorch_model.bin":
        part = "pytorch_model-00001-of-00001.bin"
        (folder / "pytorch_model.bin").rename(folder / part)
        (folder / name).write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, part)})
        )
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=r"pytorch_model.*pickle, which can run code") as error:
            load_model(path)
        code = str(error.value).split('python -c "')[1].split('"')[0]
        assert str(folder) in code
    pytest.importorskip("transformers")
    exec(code.replace("'NEW'", repr(str(folder.parent / "new"))), {})
    assert load_model(folder.parent / "new")(IDX).equal(expected)


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\n", "<html>"])
def test_a_file_that_came_without_its_content_is_named(folder, text):
    (folder / "model.safetensors").write_text(text)
    what = "pointer of Git LFS: get the file with `git lfs" if "lfs" in text else "web page: downl"
    with pytest.raises(ValueError, match=rf"model\.safetensors: a {what}"):
        load_model(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "vocab.txt", "spiece.model"])
def test_a_model_with_another_tokenizer_is_refused_by_its_file(folder, full_folder, file):
    if file.endswith(".json"):
        text = (full_folder / file).read_text()
        (folder / file).write_text(text)
        assert load_model(folder)  # GPT-2's
        text = text.replace('"Ġthe"', '"x"').replace('"Ġa"', '"Ġthe"').replace('"x"', '"Ġa"')
        (folder / file).write_text(text)
    else:
        (folder / file).write_text("x")
    with pytest.raises(ValueError, match=rf"another tokenizer than GPT-2's \({file}\): give a m"):
        load_model(folder)


@pytest.mark.parametrize(
    ("vocab_size", "end", "other"),
    [(50257, 0, True), (52000, 2, True), (50257, EOT, False), (50257, None, False),
     (50258, 50257, False), (65, 0, False)],
)  # fmt: skip
def test_without_tokenizer_files_the_end_token_tells_another_tokenizer(
    folder, vocab_size, end, other
):
    change(folder, vocab_size=vocab_size, eos_token_id=end)
    what = rf"has another tokenizer than GPT-2's \(eos_token_id {end}\): give a model with GPT-2's"
    with pytest.raises(ValueError, match=what) if other else nullcontext():
        read_huggingface(folder)


def test_reading_gives_plain_sizes_and_float32_weights_without_padding(model, folder):
    sizes, weights = read_huggingface(str(folder))
    config = plain(model.config)
    del config["dropout"]
    assert sizes == config
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        expected = p[:300] if name == "transformer.wte.weight" else p
        assert weights[name].equal(expected) and weights[name].dtype == torch.float32


def test_the_weights_stay_when_the_file_is_gone(folder):
    weights = read_huggingface(str(folder))[1]
    before = {name: weight.clone() for name, weight in weights.items()}
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert all(weights[name].equal(before[name]) for name in before)


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("n_inner", 100),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("vocab_size", "many"),
        ("n_layer", -1),
        ("n_head", 7),
        ("n_embd", 10**15),
        ("n_layer", 10**15),
    ],
)
def test_a_config_of_another_architecture_is_refused_by_name(folder, name, value):
    change(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"{name}|transformer\.wte|transformer\.h\.9"):
        load_model(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{", "[" * 100_000, '{"n_embd": {}}', '{"n_embd": {}, "n_inner": 4}']
)
def test_a_damaged_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("h__1__mlp__c_fc__bias", None),
        ("h__1__ln_1__weight", None),
        ("wte__weight", None),
        ("wte__weight", torch.zeros(299, 32)),
        ("h__0__mlp__c_fc__weight", torch.zeros(128, 32)),  # as nn.Linear stores it
        ("ln_f__bias", torch.zeros(32, dtype=torch.int64)),
        ("h__2__ln_1__weight", torch.zeros(32)),
        ("lm_head__weight", torch.zeros(300, 32)),
    ],
)
def test_a_missing_wrong_or_extra_tensor_is_named(folder, name, tensor):
    change_tensors(folder, **{name: tensor})
    with pytest.raises(ValueError, match=name.replace("__", r"\.")) as error:
        load_model(folder)
    assert explain(error.value).endswith((": give another model", ": get the file again"))


@pytest.mark.parametrize("damage", ["short", "header", "huge", "empty", "pickle"])
def test_a_damaged_safetensors_file_is_refused(folder, damage):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    damaged = {
        "short": data[: len(data) // 2],
        "header": data[:8] + b"{" * 50 + data[58:],
        "huge": (2**62).to_bytes(8, "little") + data[8:],
        "empty": b"",
        "pickle": pickle.dumps({"a": 1}),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        load_model(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused_by_name(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load_model(folder)


@pytest.mark.parametrize("name", ["no-such-model", "org/no-such", "a/b/c", "../nowhere", "Ü b"])
def test_an_unknown_model_is_one_clear_line(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no such folder.*: give a checkpoint") as error:
        load_model(name)
    assert "\n" not in str(error.value)
