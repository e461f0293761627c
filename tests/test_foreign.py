"""Model files of other programs: nanoGPT's and build-nanogpt's are read, all others are named."""

import io
import os
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, spread

from common.cli import explain
from common.foreign import clean_name, describe
from train_gpt2 import GPT, load_model

IDX = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(small_model: GPT) -> GPT:
    return spread(small_model)


def their_weights(model: GPT, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the state_dict of the same model in nanoGPT, with its masks and without padding."""
    state = {name: p.detach().clone() for name, p in model.state_dict().items()}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state["transformer.wte.weight"][:300]
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    return {prefix + name: p for name, p in state.items()}


def nanogpt(model: GPT, path: Path, prefix: str = "_orig_mod.", **args: object) -> Path:
    state = {
        "model": their_weights(model, prefix), "optimizer": {"state": {}},
        "model_args": {**SMALL, "bias": True, "dropout": 0.0, **args},
        "iter_num": 7, "best_val_loss": torch.tensor(3.0), "config": {"dataset": "openwebtext"},
    }  # fmt: skip
    torch.save(state, path)
    return path


# -----------------------------------------------------------------------------
# nanoGPT and build-nanogpt


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_checkpoint_of_nanogpt_is_the_same_model(model, tmp_path, prefix):
    again = load_model(nanogpt(model, tmp_path / "ckpt.pt", prefix))
    assert again.config == model.config and not again.training
    assert again(IDX)[..., :300].equal(model(IDX)[..., :300])


def logits_without_biases(w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute nanoGPT's model of two layers and two heads with bias=False."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (32,), w[f"transformer.{name}.weight"])

    x = w["transformer.wte.weight"][IDX] + w["transformer.wpe.weight"]
    for i in range(2):
        linear = {n: w[f"transformer.h.{i}.{n}.weight"].T for n in LINEAR}
        qkv = (norm(x, f"h.{i}.ln_1") @ linear["attn.c_attn"]).split(32, dim=2)
        q, k, v = (t.view(2, 16, 2, 16).transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(2, 16, 32) @ linear["attn.c_proj"]
        y = F.gelu(norm(x, f"h.{i}.ln_2") @ linear["mlp.c_fc"], approximate="tanh")
        x = x + y @ linear["mlp.c_proj"]
    return norm(x, "ln_f") @ w["lm_head.weight"].T


LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def test_a_model_of_nanogpt_without_biases_computes_the_same(model, tmp_path):
    path = nanogpt(model, tmp_path / "ckpt.pt", "", bias=False)
    state = torch.load(path)
    weights = state["model"]
    state["model"] = {n: p for n, p in weights.items() if not n.endswith(".bias")}
    torch.save(state, path)
    again = load_model(path)
    expected = logits_without_biases(state["model"])
    torch.testing.assert_close(again(IDX)[..., :300], expected, atol=1e-4, rtol=1e-5)
    state["model_args"]["bias"] = True  # then they are missing
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"h\.0\.ln_1\.bias is missing"):
        load_model(path)


@pytest.fixture
def pickled_config(monkeypatch) -> type:
    """Be the script that pickles build-nanogpt's configuration: its class is in __main__."""

    @dataclass
    class GPTConfig:
        block_size: int = 16
        vocab_size: int = 300
        n_layer: int = 2
        n_head: int = 2
        n_embd: int = 32

        def __post_init__(self) -> None:
            if self.n_embd < 0:
                os.mkdir("sprung")

    GPTConfig.__module__, GPTConfig.__qualname__ = "__main__", "GPTConfig"
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    return GPTConfig


def test_a_checkpoint_of_build_nanogpt_is_the_same_model(
    model, pickled_config, tmp_path, monkeypatch
):
    path = tmp_path / "model_19072.pt"
    state = {"model": their_weights(model), "config": pickled_config(), "step": 19072}
    torch.save({**state, "val_loss": 3.07}, path)
    monkeypatch.delattr(sys.modules["__main__"], "GPTConfig")  # its class is not ours
    again = load_model(path)
    assert again.config == model.config
    assert again(IDX)[..., :300].equal(model(IDX)[..., :300])
    torch.save({**state, "config": {**SMALL}}, path)  # as some forks do
    assert load_model(path)(IDX).equal(again(IDX))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_with_any_other_object_is_refused_and_runs_no_code(
    model, pickled_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path / "model_1.pt", {"model": their_weights(model)}
    for state in (
        {**good, "config": pickled_config(), "extra": Trap()},
        {**good, "config": pickled_config(n_head=Trap())},
        {**good, "config": Trap()},
        {**good, "model_args": {**SMALL, "bias": Trap()}},
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"\(it holds \w+\.mkdir, which may run code\)") as e:
            load_model(path)
        assert explain(e.value).endswith(": give another model")
    pickled_config.__qualname__ = pickled_config.__name__ = "Config"
    monkeypatch.setattr(sys.modules["__main__"], "Config", pickled_config, raising=False)
    torch.save({**good, "config": pickled_config()}, path)
    with pytest.raises(ValueError, match=r"it holds __main__\.Config, which may run code"):
        load_model(path)
    assert not (tmp_path / "sprung").exists()


def test_a_fork_of_nanogpt_with_another_architecture_is_refused(model, tmp_path):
    for args, what in (
        ({"use_relu": True}, r"not GPT-2's architecture \(it has use_relu True\)"),
        ({"n_layer": "2"}, "n_layer is '2', not a number"),
        ({"vocab_size": None}, "vocab_size is None, not a number"),
        ({"n_embd": 64}, r"another architecture: transformer\.wte\.weight is \(384, 32\)"),
    ):
        with pytest.raises(ValueError, match=rf"ckpt\.pt: .*{what}") as error:
            load_model(nanogpt(model, tmp_path / "ckpt.pt", **args))
        assert explain(error.value).endswith(": give another model")
    assert load_model(nanogpt(model, tmp_path / "ckpt.pt", use_relu=False))
    torch.save({"model": {"a": 5}, "model_args": {**SMALL, "bias": False}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: its model holds other things than tensors"):
        load_model(tmp_path / "x.pt")


def test_prefixes_and_masks_go_but_not_the_bias_of_a_layer():
    assert clean_name("module._orig_mod.lm_head.weight") == "lm_head.weight"
    assert clean_name("transformer.h.0.attn.c_attn.bias") == "transformer.h.0.attn.c_attn.bias"
    assert clean_name("_orig_mod.transformer.h.0.attn.bias") is None
    assert clean_name("h.0.attn.masked_bias") is None


# -----------------------------------------------------------------------------
# files that are not read


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, b"")
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model"))
    return data.getvalue()


def magic(number: int) -> bytes:
    return number.to_bytes(4, "little") + bytes(2000)


EXPORT_HF = "export_hf.py"
FILES = {  # what it is, what to do
    "gpt2_124M.bin": (magic(20240326), "a model of llm.c", EXPORT_HF),
    "model.bin": (magic(20240326), "a model of llm.c", EXPORT_HF),
    "state_00001000_00000.bin": (magic(20240527), "optimizer's state of llm.c", "model_*.bin"),
    "fineweb_train_000001.bin": (magic(20240520), "a file of tokens", "give a model"),
    "gpt2.gguf": (b"GGUF" + bytes(100), "a GGUF file", "Hugging Face format"),
    "renamed.pt": (b"GGUF" + bytes(100), "a GGUF file", "Hugging Face format"),
    "ggml-model-f16.bin": (b"lmgg" + bytes(100), "llama.cpp", "Hugging Face format"),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n", "a TensorFlow model", "from_tf"),
    "model.ckpt.data-00000-of-00001": (bytes(100), "a TensorFlow model", "`gpt2` on the hub"),
    "model.ckpt": (None, "a TensorFlow model", "from_tf"),  # a prefix, as TensorFlow names it
    "flax_model.msgpack": (b"\x81\xabtransformer", "a Flax model", "from_flax"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "an ONNX model", "Hugging Face format"),
    "ckpt.pt": (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS", "lfs pull"),
    "model_1.pt": (b"<!DOCTYPE html>\n<html>", "a web page", "/resolve/, not /blob/"),
    "weights.npz": (zipped("wte.npy"), "an archive", "unpack"),
    "model.pt": (zipped("readme.txt"), "an archive", "unpack"),
    "model.tar.gz": (b"\x1f\x8b" + bytes(100), "an archive", "unpack"),
    "model.tar": (tarred(), "an archive", "unpack"),
    "pytorch_model.bin": (zipped("archive/data.pkl"), "a pickle", "save_pretrained('NEW')"),
    "old_model.bin": (b"\x80\x02\x8a\nl\xfc\x9cF", "a pickle", "save_pretrained('NEW')"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_program_is_refused_with_what_it_is_and_what_to_do(tmp_path, name):
    data, what, what_to_do = FILES[name]
    path = tmp_path / name
    if data is None:
        (tmp_path / f"{name}.index").write_bytes(bytes(10))
    else:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}.* is .*{what}.*: .*") as error:
        load_model(path)
    assert what_to_do in explain(error.value) and "\n" not in explain(error.value)


@pytest.mark.parametrize(
    "name", ["gpt2_124M.bin", "gpt2.gguf", "flax_model.msgpack", "tf_model.h5", "pytorch_model.bin"]
)
def test_a_folder_with_a_model_of_another_program_says_so(tmp_path, name):
    data, what, what_to_do = FILES[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "archive.zip").write_bytes(zipped("x"))  # beside the point
    with pytest.raises(ValueError, match=f"{name} .*{what}") as error:
        load_model(tmp_path)
    assert what_to_do in explain(error.value)


def test_what_is_read_is_not_taken_for_a_file_of_another_program(model, tmp_path):
    assert describe(nanogpt(model, tmp_path / "ckpt.pt")) is None
    (tmp_path / "x.pt").write_bytes(b"no")
    assert describe(tmp_path / "x.pt") is None
    (tmp_path / "x.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:-30])  # a damaged zip
    assert describe(tmp_path / "x.pt") is None
