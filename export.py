"""
The two forms a model is kept in: our checkpoints, and Hugging Face's folders.

    python export.py log/ckpt_019073.pt DIR     a folder that transformers, lm_eval, ... load
    python export.py DIR ckpt_000000.pt         a checkpoint of a folder, or of a hub name: gpt2
"""

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from tyro.conf import Positional

from fineweb import EOT, get_tokenizer, run_command
from shards import atomic_write
from train_gpt2 import GPT, MODEL_FIELDS, GPTConfig, TrainConfig, load_model

# -----------------------------------------------------------------------------
# checkpoints


def checkpoint_paths(out_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    found = [path for path in out_dir.glob("ckpt_*.pt") if path.stem[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's dict, on the CPU. Raises ValueError if a byte of it is wrong."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint: name one that exists")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if archive.testzip() is not None:
                raise ValueError("a checksum differs")
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no pickled code
        if not {"model", "model_config"} <= state.keys():
            raise ValueError("it holds no model")
    except Exception as error:  # zipfile, pickle and torch raise many kinds on damage
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a whole checkpoint ({reason}): use another one") from None
    return state


def newest_checkpoint(out_dir: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the newest checkpoint that is whole, or None where there is none at all."""
    paths = checkpoint_paths(out_dir)
    for path in paths:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            say(f"warning: {error}: trying the one before")
    if paths:
        raise ValueError(f"{out_dir}: every checkpoint is damaged: restore one, or start afresh")
    return None


def write_checkpoint(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, whole or not at all; then delete all but the `keep` newest (0: all)."""
    # a sum is finite if all its terms are (float32 sums of weights do not overflow), and cheap
    wrong = [name for name, weight in state["model"].items() if not weight.sum().isfinite()]
    if wrong:
        raise ValueError(f"{wrong[0]} is not finite: go on from {path.parent} with --resume")
    with atomic_write(path) as file:
        torch.save(state, file)
    for old in checkpoint_paths(path.parent)[keep:] if keep else []:
        old.unlink()


def build_model(config: GPTConfig, weights: dict[str, torch.Tensor]) -> GPT:
    """Return a model with these parameters, the tied one once; ValueError names what differs."""
    wte, wpe = (weights.get(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    sizes = [(config.padded_vocab_size, config.n_embd), (config.block_size, config.n_embd)]
    there = [tuple(getattr(w, "shape", ())) for w in (wte, wpe)]
    if sizes != there or len(weights) != 12 * config.n_layer + 4:  # before memory is taken for it
        raise ValueError(f"weights of another architecture: wte, wpe are {there}, not {sizes}")
    model = GPT(config)
    try:
        model.load_state_dict({**weights, "lm_head.weight": wte})
    except RuntimeError as error:
        raise ValueError(f"weights of another architecture: {error}") from None
    return model


def make_model(config: TrainConfig, state: dict[str, Any] | None) -> GPT:
    """Return the model of a checkpoint's state, of given weights, or a fresh one, on the CPU."""
    torch.manual_seed(config.seed)
    if state:
        model = build_model(GPTConfig(**state["model_config"]), state["model"])
    elif config.init_from:
        given = load_model(config.init_from)
        for name in MODEL_FIELDS:
            asked, has = getattr(config, name), getattr(given.config, name)
            if asked not in (None, has):
                raise ValueError(f"{name} {asked}: {config.init_from} has {has}: leave it out")
        model = GPT(dataclasses.replace(given.config, dropout=config.dropout))
        model.load_state_dict(given.state_dict())
    else:
        model = GPT(config.model_config())
    return model


def plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as a dict of plain types, fit for JSON and for a checkpoint."""
    values = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


RUN_IS = (  # what a run is: a resumed one must agree. What it runs on may change.
    "seed", "shuffle", "total_batch_size", "batch_ramp_tokens", "batch_ramp_start", "optimizer",
    "max_lr", "warmup_steps", "schedule", "min_lr_ratio", "weight_decay", "beta1", "beta2", "eps",
    "muon_lr", "muon_momentum", "grad_clip",
)  # fmt: skip


def check_same_run(config: TrainConfig, state: dict[str, Any], data: str) -> None:
    """Raise ValueError, listing the differences, if a checkpoint is of another run."""
    pairs = {name: (state["train_config"].get(name), getattr(config, name)) for name in RUN_IS}
    for name in (*MODEL_FIELDS, "dropout"):
        if getattr(config, name) is not None:
            pairs[name] = (state["model_config"][name], getattr(config, name))
    pairs["data"] = (state["data"], data)
    differ = [f"{name} was {a}, is now {b}" for name, (a, b) in pairs.items() if a != b]
    if differ:
        listed = "; ".join(differ)
        raise ValueError(f"the checkpoint is of another run ({listed}): give another --out_dir")


# -----------------------------------------------------------------------------
# Hugging Face's folders: config.json, model.safetensors, and what a tokenizer needs

TRANSPOSED = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out): a "Conv1D"
FILES = (
    "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
)  # fmt: skip
ONLY = {  # settings of GPT-2's relatives, and the one value that this model computes
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def find_files(name_or_path: str) -> tuple[Path, Path]:
    """Return the config.json and the model.safetensors of a local folder or a hub name."""
    names = ("config.json", "model.safetensors")
    folder = Path(name_or_path)
    if folder.is_dir():
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder}: no {name} in it: give a folder that export.py or save_pretrained "
                    "wrote, or a checkpoint"
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
            f"{name_or_path}: no such folder, and not to be had from the hub ({reason}): give a "
            "checkpoint, a folder, or a hub name such as gpt2"
        ) from None


def read_config(path: Path) -> GPTConfig:
    """Return the architecture that a config.json describes; ValueError if it is not GPT-2's."""
    try:
        given = json.loads(path.read_bytes())
        given = {"n_positions": given.get("n_ctx", GPTConfig.block_size), **given}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}: no JSON object: get the file again") from None
    inner, width = given.get("n_inner"), given.get("n_embd", GPTConfig.n_embd)
    wrong = {k: given[k] for k, only in ONLY.items() if given.get(k, only) != only}
    if wrong.get("activation_function") == "gelu_pytorch_tanh":  # the same function
        del wrong["activation_function"]
    if inner is not None and inner != 4 * width:
        wrong["n_inner"] = inner
    if wrong:
        listed = ", ".join(f"{name} {value!r}" for name, value in wrong.items())
        raise ValueError(f"{path}: not GPT-2's architecture ({listed}): give another model")
    sizes = {"block_size": given["n_positions"]}
    for name in ("vocab_size", "n_layer", "n_head", "n_embd"):
        sizes[name] = given.get(name, getattr(GPTConfig, name))  # GPT-2's own may be left out
    for name, size in sizes.items():
        if type(size) is not int:
            raise ValueError(f"{path}: {name} is {size!r}, not a number: get the file again")
    return GPTConfig(**sizes)


def read_huggingface(name_or_path: str) -> GPT:
    """Return the model in a folder in Hugging Face format, or of that name on the hub.

    Holds one tensor beside the model at a time. Raises FileNotFoundError or ValueError, naming
    the file and the tensor or setting in it that is missing or wrong.
    """
    config_path, path = find_files(name_or_path)
    config = read_config(config_path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return read_tensors(file, path, config)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}): get the file again") from None


def read_tensors(file: Any, path: Path, config: GPTConfig) -> GPT:
    """Return a model with the tensors of an open safetensors file."""
    # Older files lack the prefix, and carry the causal mask of every layer as a buffer.
    keys = [key for key in sorted(file.keys()) if not key.endswith((".attn.bias", ".masked_bias"))]
    stored = {f"transformer.{key.removeprefix('transformer.')}": key for key in keys}
    head = stored.pop("transformer.lm_head.weight", None)

    def take(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in stored:
            raise ValueError(f"{path}: no tensor {name}: get the file again")
        tensor = file.get_tensor(stored.pop(name))
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, and config.json asks "
                f"for {shape} of floats: get both files from one place"
            )
        return tensor

    if f"transformer.h.{config.n_layer - 1}.ln_1.weight" not in stored:  # before making room
        raise ValueError(f"{path}: no tensor transformer.h.{config.n_layer - 1}.ln_1.weight")
    embedding = take("transformer.wte.weight", (config.vocab_size, config.n_embd))
    if head and not torch.equal(file.get_tensor(head), embedding):
        raise ValueError(f"{path}: lm_head.weight is not the token embedding, as in GPT-2")
    with torch.device("meta"):  # no time spent on weights that are replaced
        model = GPT(config)
    model.to_empty(device="cpu")
    model.lm_head.weight = model.transformer.wte.weight  # tied again
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "transformer.wte.weight":
                p[: config.vocab_size] = embedding
                # Not zeros: GPT-2's logits lie around -30 to -100, where a logit of 0 would take
                # all the probability. The logit of the mean row is the mean logit, and exp(mean)
                # is at most the mean of exp (Jensen), so 47 such rows take at most 47/50257 of it.
                p[config.vocab_size :] = p[: config.vocab_size].mean(dim=0)
            elif name.endswith(TRANSPOSED):
                p.copy_(take(name, tuple(p.shape)[::-1]).t())
            else:
                p.copy_(take(name, tuple(p.shape)))
    if stored:
        raise ValueError(f"{path}: GPT-2 has no tensor {min(stored)}: give another model")
    return model


def write_huggingface(model: GPT | dict[str, Any], folder: Path) -> None:
    """Write a model, or a checkpoint's dict, as a folder that `transformers` loads by itself.

    The folder appears whole or not at all. An earlier export there is replaced; ValueError if
    the folder holds anything else.
    """
    if isinstance(model, dict):
        config, weights = GPTConfig(**model["model_config"]), model["model"]
    else:
        config, weights = model.config, dict(model.named_parameters())
    unknown = {path.name for path in folder.glob("*")} - {*FILES}
    if unknown or folder.is_file():
        what = f"holds {min(unknown)}" if unknown else "is a file"
        raise ValueError(f"{folder} {what}: give a new folder, or one with an earlier export")
    tensors = {}
    for name, p in weights.items():
        tensor = p.detach().cpu().float()
        if name == "transformer.wte.weight":
            tensor = tensor[: config.vocab_size]  # the padding stays here
        tensors[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    # a smaller vocabulary is not GPT-2's: it has other tokens, unknown here
    end = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOT)
    end = end if config.vocab_size > EOT else {}
    texts = tokenizer_files(config.block_size) if end else {}
    texts["generation_config.json"] = json.dumps(end, indent=2)
    texts["config.json"] = json.dumps(huggingface_config(config) | end, indent=2)

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
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def huggingface_config(config: GPTConfig) -> dict[str, Any]:
    """Return what goes into config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **ONLY,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # its older name
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        **{f"{place}_pdrop": config.dropout for place in ("embd", "attn", "resid")},
        "dtype": "float32",
    }


def merges(tokens: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pair that each token longer than a byte is merged from, in the order of the ids.

    A list of ranks leaves the pairs out. What BPE has made of a token's bytes before its last
    merge is that pair.
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
    """Return the files, by name, that make `AutoTokenizer` encode as `fineweb.get_tokenizer()`."""
    # A byte is written as a visible character: itself, or one from 256 on.
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


# -----------------------------------------------------------------------------
# command


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Turn a checkpoint into a Hugging Face folder, or a folder into a checkpoint."""

    source: Positional[str]  # checkpoint *.pt; or folder in Hugging Face format, or hub name
    target: Positional[Path]  # folder; or checkpoint *.pt


def export(config: ExportConfig) -> None:
    """Convert, whichever way the names say."""
    if config.source.endswith(".pt") == (config.target.suffix == ".pt"):
        raise ValueError(
            f"{config.source} to {config.target}: one must be a checkpoint ending in .pt, the "
            "other a folder"
        )
    if config.target.suffix != ".pt":
        write_huggingface(load_model(config.source), config.target)
    elif config.target.exists():
        raise ValueError(f"{config.target} exists: give another name")
    else:
        model = read_huggingface(config.source)
        state = dict(
            model={name: p.detach() for name, p in model.named_parameters()},
            optimizer={}, scaler={}, step=0, windows_seen=0,
            model_config=plain(model.config),
            train_config=plain(TrainConfig(init_from=config.source)),
            rng=torch.get_rng_state(),
            data="",  # of none: --init_from takes this checkpoint, --resume does not
        )  # fmt: skip
        config.target.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(config.target, state, keep=0)
    print(f"{config.target}: written")


def main() -> None:
    run_command(ExportConfig, export)


if __name__ == "__main__":
    main()
