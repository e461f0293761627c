"""Hugging Face folders, both ways: transformers is the oracle."""

import dataclasses
import json
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import run_command_line, run_train
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import export as export_module
from export import (
    ExportConfig,
    export,
    plain,
    read_huggingface,
    write_checkpoint,
    write_huggingface,
)  # fmt: skip
from fineweb import get_tokenizer
from train_gpt2 import GPT, GPTConfig, load_model

IDX = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))


def spread(model: GPT) -> GPT:
    """Make the weights larger than at initialisation: that shows more errors."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture
def model(small_model: GPT) -> GPT:
    return spread(small_model)


@pytest.fixture
def folder(model: GPT, tmp_path: Path) -> Path:
    """A small export, to read or to damage."""
    write_huggingface(model, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with GPT-2's vocabulary, and so with its tokenizer."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    write_huggingface(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32)), folder)
    return folder


def save(model: GPT, path: Path) -> Path:
    state = {"model": dict(model.named_parameters()), "model_config": plain(model.config)}
    write_checkpoint(path, state, keep=0)
    return path


def change(folder: Path, **settings: object) -> None:
    """Change settings of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors, named without `transformer.` and with __ for a dot; None takes one out."""
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


def test_a_checkpoint_dict_exports_like_its_model(model, folder, tmp_path):
    state = torch.load(save(model, tmp_path / "ckpt_000001.pt"), weights_only=True)
    write_huggingface(state, tmp_path / "other")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()
    }


def test_training_goes_on_in_transformers_with_the_dropout_of_the_run(small_model, tmp_path):
    config = dataclasses.replace(small_model.config, dropout=0.25)
    write_huggingface(GPT(config), tmp_path / "hf")
    found = theirs(tmp_path / "hf").config
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
def test_their_tokenizer_gives_the_ids_of_ours(full_folder, tmp_path, files):
    transformers = pytest.importorskip("transformers")
    for path in full_folder.iterdir():  # with either form alone
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


def test_a_failed_export_leaves_the_earlier_one(folder, small_model, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(export_module, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        write_huggingface(small_model, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_a_new_export_replaces_the_earlier_one_but_no_other_files(folder, small_model):
    before = (folder / "model.safetensors").read_bytes()
    spread(small_model)
    write_huggingface(small_model, folder)
    assert (folder / "model.safetensors").read_bytes() != before
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        write_huggingface(small_model, folder)
    assert (folder / "thesis.tex").exists()


# -----------------------------------------------------------------------------
# reading


def test_what_was_written_reads_the_same(model, folder):
    again = read_huggingface(str(folder))
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
    logits = read_huggingface(str(folder))(IDX)[..., :300]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_padding_takes_no_probability_where_all_logits_are_far_below_zero(folder):
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    bias = torch.full((32,), 5.0)  # with these, logits around -100
    change_tensors(folder, wte__weight=embedding - 0.6, ln_f__bias=bias)
    model = read_huggingface(str(folder))
    logits = model(IDX)
    assert -130 < logits.mean() < -70
    padding = logits.softmax(-1)[..., 300:].sum(-1)
    assert padding.max() <= (384 - 300) / 300


@pytest.mark.parametrize("name", ["gpt2", "org/small"])
def test_reads_by_name_from_the_hub(folder, tmp_path, monkeypatch, name):
    repo = "openai-community/gpt2" if name == "gpt2" else name

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            prefix, _, file = self.path.partition("/resolve/main/")
            found = prefix == f"/{repo}" and (folder / file).is_file()
            body = (folder / file).read_bytes() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"' + file + '"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        model = load_model(name)
        server.shutdown()
    expected = load_file(folder / "model.safetensors")["transformer.wpe.weight"]
    assert model.transformer.wpe.weight.equal(expected)


# -----------------------------------------------------------------------------
# checkpoints of folders


def test_there_and_back_again_gives_a_checkpoint_to_train_from(model, data_dir, tmp_path):
    source = save(model, tmp_path / "ckpt_000007.pt")
    export(ExportConfig(source=str(source), target=tmp_path / "hf"))
    target = tmp_path / "run" / "ckpt_000000.pt"
    export(ExportConfig(source=str(tmp_path / "hf"), target=target))
    assert load_model(target)(IDX)[..., :300].equal(load_model(source)(IDX)[..., :300])

    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))
    start = dict(**sizes, init_from=str(target), max_steps=1, warmup_steps=0)
    metrics = run_train(data_dir, tmp_path / "tuned", **start)
    assert [m["step"] for m in metrics if m["event"] == "train"] == [0]
    with pytest.raises(ValueError, match="another run"):
        run_train(data_dir, target.parent, **start, resume=True)


def test_a_checkpoint_is_never_written_over(folder, tmp_path):
    (tmp_path / "ckpt_000001.pt").write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        export(ExportConfig(source=str(folder), target=tmp_path / "ckpt_000001.pt"))
    assert (tmp_path / "ckpt_000001.pt").read_text() == "precious"


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
        read_huggingface(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"n_embd": {}}'])
def test_a_damaged_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_huggingface(str(folder))


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("h__1__mlp__c_fc__bias", None),
        ("h__1__ln_1__weight", None),
        ("wte__weight", None),
        ("wte__weight", torch.zeros(299, 32)),
        ("h__0__mlp__c_fc__weight", torch.zeros(128, 32)),  # as nn.Linear has it
        ("ln_f__bias", torch.zeros(32, dtype=torch.int64)),
        ("h__2__ln_1__weight", torch.zeros(32)),
        ("lm_head__weight", torch.zeros(300, 32)),
    ],
)
def test_a_missing_wrong_or_needless_tensor_is_named(folder, name, tensor):
    change_tensors(folder, **{name: tensor})
    with pytest.raises(ValueError, match=name.replace("__", r"\.")):
        read_huggingface(str(folder))


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
        read_huggingface(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused_by_name(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        read_huggingface(str(folder))


@pytest.mark.parametrize("name", ["no-such-model", "org/no-such", "a/b/c", "../nowhere", "Ü b"])
def test_a_model_that_is_nowhere_is_one_clear_line(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no such folder.*: give a checkpoint") as error:
        load_model(name)
    assert "\n" not in str(error.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no", {"model": Trap()}, {"step": 1}, [1, 2]])
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_nothing(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt_000001.pt"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        torch.save(data, path)
    with pytest.raises(ValueError, match=r"ckpt_000001\.pt: not a whole checkpoint"):
        load_model(path)
    assert not (tmp_path / "sprung").exists()


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    result = run_command_line("export.py", "a.pt", "b.pt")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("export.py: error: a.pt to b.pt: one must be a checkpoint")
    assert result.stderr.count("\n") == 1
