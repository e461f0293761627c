"""Model files of other programs: nanoGPT's and build-nanogpt's are read, all others are named.

People have files of many formats, often under the name of another one. What a file is, is therefore
read from its first bytes where they tell it, and only then from its name.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")

# -----------------------------------------------------------------------------
# checkpoints of nanoGPT and build-nanogpt


class PickledConfig:
    """Stands in for build-nanogpt's GPTConfig: its attributes are read, its code is never run."""


# The only name in a pickle that is replaced. torch.load refuses all others with weights_only.
STAND_INS = [(PickledConfig, "__main__.GPTConfig")]


def clean_name(name: str) -> str | None:
    """Return a weight's name without the prefixes of torch.compile and DDP; None for a mask.

    Older models hold the causal mask of every layer as a buffer, under the name attn.bias.
    """
    name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)
    return None if name.endswith((".attn.bias", ".attn.masked_bias")) else name


def from_nanogpt(state: Any) -> tuple[dict[str, int], dict[str, torch.Tensor]] | None:
    """Return sizes and weights of a checkpoint of nanoGPT or build-nanogpt; None if it is neither.

    nanoGPT's checkpoint has the sizes in a dict, `model_args`, build-nanogpt's in a pickled
    dataclass, `config`, and some forks have a dict of that name. All hold the weights as our model
    does. Where a model has no biases (`bias=False`), they become zeros, which compute the same.
    nanoGPT computes GELU exactly, our model its tanh approximation: on a model of 4 layers that
    moves the loss by 4e-6. Raises ValueError if the model is not GPT-2.
    """
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        return None
    config = state.get("model_args", state.get("config"))
    if isinstance(config, PickledConfig):
        config = vars(config)
    if not isinstance(config, dict) or not {*SIZES} <= config.keys():
        return None
    known = {*SIZES, "dropout", "bias"}
    if other := sorted(name for name in config if name not in known and config[name]):
        raise ValueError(f"not GPT-2's architecture (it has {other[0]} {config[other[0]]!r})")
    for name in SIZES:
        if type(config.get(name)) is not int:
            raise ValueError(f"{name} is {config.get(name)!r}, not a number")
    if not all(isinstance(weight, torch.Tensor) for weight in state["model"].values()):
        raise ValueError("its model holds other things than tensors")
    names = {name: clean_name(str(name)) for name in state["model"]}
    weights = {new: state["model"][old] for old, new in names.items() if new}
    if config.get("bias") is False:
        for name in [*weights]:
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "c_attn.weight",
                              "c_proj.weight", "c_fc.weight")):  # fmt: skip
                bias = weights[name].new_zeros(len(weights[name]))
                weights.setdefault(f"{name.removesuffix('weight')}bias", bias)
    return {name: config[name] for name in SIZES}, weights


# -----------------------------------------------------------------------------
# what a file is, and what to do with it

FROM_WHERE = "give the folder in Hugging Face format that it was made from"
TRANSFORMERS_4 = "give a copy with model.safetensors, or convert it with transformers 4"
TENSORFLOW = "a TensorFlow model", f"{TRANSFORMERS_4} (from_tf=True); OpenAI's is `gpt2` on the hub"
FLAX = "a Flax model", f"{TRANSFORMERS_4} (from_flax=True)"
ARCHIVE = "an archive", "unpack it, and give the model in it"
LLM_C = "convert it with llm.c's dev/eval/export_hf.py, and give the folder that it writes"
LLM_C_STATE = "the optimizer's state of llm.c", "convert the model_*.bin beside it, as llm.c says"
WEB_PAGE = "a web page", "download the file: its address on the hub has /resolve/, not /blob/"
BY_START = (  # llm.c's files start with a magic number (int32), which is a date
    (b"GGUF", ("a GGUF file, for llama.cpp", FROM_WHERE)),
    (b"version https://git-lfs", ("a pointer of Git LFS", "get the file with `git lfs pull`")),
    (b"\x89HDF\r\n", TENSORFLOW),
    ((20240326).to_bytes(4, "little"), ("a model of llm.c", LLM_C)),
    ((20240527).to_bytes(4, "little"), LLM_C_STATE),
    ((20240520).to_bytes(4, "little"), ("a file of tokens", "give a model")),
    (b"\x93NUMPY", ("an array of numpy", "give a model")),
    (b"\x1f\x8b", ARCHIVE),
)
BY_NAME = (
    (r"\.msgpack$", FLAX),
    (r"\.h5$|\.ckpt\.|^checkpoint$", TENSORFLOW),
    (r"\.onnx$", ("an ONNX model", FROM_WHERE)),
    (r"^ggml-|\.(gguf|ggml)$", ("a model for llama.cpp", FROM_WHERE)),
)
MODEL_NAMES = re.compile(  # of files in a folder that are worth a look
    r"(model|gpt2?|ggml).*\.bin$|\.(gguf|ggml|h5|msgpack|onnx)$|\.ckpt\.|^checkpoint$"
)


def pickled(source: str | Path) -> tuple[str, str]:
    """Describe the weights of a folder or a hub name that has only pytorch_model.bin."""
    convert = f"M.from_pretrained('{Path(source).as_posix()}').save_pretrained('NEW')"
    code = f'python -c "from transformers import AutoModelForCausalLM as M; {convert}"'
    return "a pickle, which can run code", f"convert it with {code}, and give the folder NEW"


def describe(path: Path) -> tuple[str, str] | None:
    """Return what a file is that is not read as a model, and what to do; None if it is unknown."""
    with open(path, "rb") as file:
        start = file.read(512)
    for magic, answer in BY_START:
        if start.startswith(magic):
            return answer
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return WEB_PAGE
    names = names_in_zip(path)
    is_pickle = any(name.endswith("data.pkl") for name in names)  # as torch.save writes it
    if (names and not is_pickle) or start[257:262] == b"ustar":
        return ARCHIVE
    if path.suffix == ".bin" and (is_pickle or start[:1] == b"\x80"):  # \x80: not zipped, older
        return pickled(path.parent)
    return next((answer for pattern, answer in BY_NAME if re.search(pattern, path.name)), None)


def names_in_zip(path: Path) -> list[str]:
    """Return the names in a zip archive; none if the file is damaged or no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # on damage, zipfile raises many kinds
        return []


def refuse_foreign(path: Path) -> None:
    """Raise ValueError, with what to do, if a file is known not to be a model that is read."""
    if found := describe(path):
        raise ValueError(f"{path} is {found[0]}: {found[1]}")


def refuse_foreign_folder(folder: Path) -> None:
    """Raise ValueError, with what to do, if a folder holds a model of another program."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and MODEL_NAMES.search(path.name):
            refuse_foreign(path)
