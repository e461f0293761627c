"""Hugging Face folders, both ways, compared with transformers."""

import dataclasses
import json
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import save, spread
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.cli import explain, plain
from common.huggingface import read_huggingface, write_huggingface
from common.tokenizer import get_tokenizer
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


def test_a_new_export_replaces_the_earlier_one_but_no_other_files(folder, small_model):
    before = (folder / "model.safetensors").read_bytes()
    write(spread(small_model), folder)
    assert (folder / "model.safetensors").read_bytes() != before
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        write(small_model, folder)
    assert (folder / "thesis.tex").exists()


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
