"""Folders in Hugging Face format: read as sizes and weights, and written from them.

Such a folder holds config.json (the sizes), model.safetensors (the weights) and the tokenizer's
files. `transformers`, lm_eval and many other tools load it. A safetensors file holds numbers only:
unlike a pickle, it cannot run code.
"""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from common.tokenizer import EOT, get_tokenizer

# OpenAI's code multiplies x @ W, so these matrices are stored as (in, out), under the name Conv1D.
# nn.Linear holds them as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")
FILES = (  # of an export
    "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
)  # fmt: skip
ONLY = {  # settings in which relatives of GPT-2 differ, and the one value that our model computes
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}

# -----------------------------------------------------------------------------
# reading


def find_model_files(name_or_path: str) -> tuple[Path, Path]:
    """Return the config.json and the model.safetensors of a local folder or a hub name."""
    names = ("config.json", "model.safetensors")
    folder = Path(name_or_path)
    if folder.is_dir():
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}: give a folder in Hugging Face format, or a checkpoint"
                )
        return folder / names[0], folder / names[1]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    repo = name_or_path if "/" in name_or_path else f"openai-community/{name_or_path}"
    try:
        return Path(hf_hub_download(repo, names[0])), Path(hf_hub_download(repo, names[1]))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name_or_path}: no such folder, and the hub does not have it ({reason}): give a "
            "checkpoint, a folder, or a hub name such as gpt2"
        ) from None


def read_config(path: Path) -> dict[str, int]:
    """Return the sizes that a config.json gives; ValueError if the model is not a GPT-2.

    The names are those of GPTConfig. A size that the file leaves out is that of GPT-2 124M.
    """
    try:
        given = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValueError(f"{path} is not a JSON object: get the file again")
    if "n_ctx" in given:  # the older name of n_positions
        given = {"n_positions": given["n_ctx"], **given}
    wrong = {k: given[k] for k, only in ONLY.items() if given.get(k, only) != only}
    if wrong.get("activation_function") == "gelu_pytorch_tanh":  # the same function
        del wrong["activation_function"]
    inner, width = given.get("n_inner"), given.get("n_embd", 768)
    if inner is not None and (type(width) is not int or inner != 4 * width):
        wrong["n_inner"] = inner
    if wrong:
        listed = ", ".join(f"{name} {value!r}" for name, value in wrong.items())
        raise ValueError(f"{path}: not GPT-2's architecture ({listed}): give another model")
    ours = {"n_positions": "block_size"}
    names = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    sizes = {ours.get(name, name): given[name] for name in names if name in given}
    for name, size in sizes.items():
        if type(size) is not int:
            raise ValueError(f"{path}: {name} is {size!r}, not a number: get the file again")
    return sizes


def read_huggingface(name_or_path: str) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Return sizes and weights (float32) of a folder in Hugging Face format, or of a hub name.

    The names and layouts are ours: sizes as in GPTConfig, weights as in GPT. The embedding has
    `vocab_size` rows and no padding. Nothing is compared with the sizes: `build_model` does that.
    Raises FileNotFoundError or ValueError that names the file and what is wrong.
    """
    import safetensors

    config_path, path = find_model_files(name_or_path)
    sizes = read_config(config_path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return sizes, read_tensors(file, path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}): get the file again") from None


def read_tensors(file: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an open safetensors file under our names, as our layers store them."""
    # Older files have no prefix, and they hold the causal mask of every layer as a buffer.
    keys = [key for key in sorted(file.keys()) if not key.endswith((".attn.bias", ".masked_bias"))]
    weights = {}
    for key in keys:
        name = f"transformer.{key.removeprefix('transformer.')}"
        if name == "transformer.lm_head.weight":
            name = "lm_head.weight"
        tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            what = f"{name} holds {tensor.dtype}, not floats"
            raise ValueError(f"{path}: {what}: get the file again")
        if name.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        # A copy: the tensors of the file are memory-mapped, and the file may change or go away.
        weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return weights


# -----------------------------------------------------------------------------
# writing


def write_huggingface(
    model_config: dict[str, Any], weights: dict[str, torch.Tensor], folder: Path
) -> None:
    """Write a model as a folder that `transformers` can load.

    `model_config` and `weights` are those of a checkpoint (`model_config`, `model`). The folder
    appears whole or not at all, and replaces an earlier export. Raises what `check_folder` raises,
    and OSError if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_folder(folder)
    vocab_size, tensors = model_config["vocab_size"], {}
    for name, p in weights.items():
        tensor = p.detach().cpu().float()
        if name == "transformer.wte.weight":
            tensor = tensor[:vocab_size]  # the padding is not exported
        tensors[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    # A smaller vocabulary is not GPT-2's. We do not know its tokens, so no tokenizer is written.
    end = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOT)
    end = end if vocab_size > EOT else {}
    texts = tokenizer_files(model_config["block_size"]) if end else {}
    texts["generation_config.json"] = json.dumps(end, indent=2)
    texts["config.json"] = json.dumps(huggingface_config(model_config) | end, indent=2)

    # Fill a new folder, then give it the name: an error on the way leaves the earlier export.
    folder = folder.resolve()
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for leftover in new, old:
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        for path in new.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except SafetensorError as error:  # its form of an OSError
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raise ValueError if a folder holds other files than an earlier export."""
    unknown = {path.name for path in folder.glob("*")} - {*FILES}
    if unknown:
        raise ValueError(f"{folder} holds {min(unknown)}, which is not part of an export")
    if folder.is_file():
        raise ValueError(f"{folder} is a file")


def huggingface_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **ONLY,
        "vocab_size": model_config["vocab_size"],
        "n_positions": model_config["block_size"],
        "n_ctx": model_config["block_size"],  # the older name of n_positions
        "n_layer": model_config["n_layer"],
        "n_head": model_config["n_head"],
        "n_embd": model_config["n_embd"],
        **{f"{place}_pdrop": model_config["dropout"] for place in ("embd", "attn", "resid")},
        "dtype": "float32",
    }


def merges(tokens: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield, for each token longer than one byte, the two tokens that BPE merges into it.

    tiktoken's file lists the tokens by rank, without these pairs. To find a pair, run BPE on the
    token's own bytes, the merge of lowest rank first, and stop when two parts are left.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def tokenizer_files(block_size: int) -> dict[str, str]:
    """Return the files, by name, that make `AutoTokenizer` encode as `get_tokenizer()` does."""
    # These files are text, but tokens are bytes. GPT-2 writes each byte as a visible character:
    # itself if it is visible in Latin-1, else the next free one from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    def write(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    end = "<|endoftext|>"
    tokens = [get_tokenizer().decode_single_token_bytes(i) for i in range(EOT)]
    vocab = {write(token): i for i, token in enumerate(tokens)} | {end: EOT}
    lines = [f"{write(a)} {write(b)}" for a, b in merges(tokens)]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {"id": EOT, "content": end, "special": True, "normalized": False}
    special |= {"single_word": False, "lstrip": False, "rstrip": False}
    fast = {
        "version": "1.0",
        "added_tokens": [special],
        "pre_tokenizer": {**bytewise, "use_regex": True},  # GPT-2's split into words
        "post_processor": {**bytewise, "trim_offsets": False},
        "decoder": bytewise,
        "model": {"type": "BPE", "vocab": vocab, "merges": lines},
    }
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
    settings |= {"bos_token": end, "eos_token": end, "unk_token": end, "add_prefix_space": False}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *lines, ""]),
        "tokenizer.json": json.dumps(fast, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
