"""Folders in Hugging Face format: read as sizes and weights, and written from them.

Such a folder holds config.json (the sizes), model.safetensors or several such files with an index
(the weights), and the tokenizer's files. `transformers`, lm_eval and many other tools load it. A
safetensors file holds numbers only: unlike a pickle, it cannot run code.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.files import sync
from common.foreign import clean_name, describe, pickled, refuse_foreign_folder
from common.model_card import CARD, is_untouched, model_card
from common.tokenizer import EOT
from common.tokenizer_files import find_other_tokenizer, tokenizer_files

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OTHERWISE = "give a folder in Hugging Face format, or a checkpoint"
# OpenAI's code multiplies x @ W, so these matrices are stored as (in, out), under the name Conv1D.
# nn.Linear holds them as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")
FILES = (  # of an export, besides the model card
    CONFIG, WEIGHTS, "generation_config.json",
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
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # short for openai-community/gpt2, ...
Find = Callable[[str], Path | None]  # from a file's name to its path; None: the model has no such

# -----------------------------------------------------------------------------
# finding a model's files


def find_in_folder(folder: Path) -> Find:
    """Return what finds the files of a folder."""
    return lambda name: folder / name if (folder / name).is_file() else None


def find_on_hub(name: str) -> Find:
    """Return what finds, and downloads, the files of a model on the hub.

    Without the hub, it finds the files that were downloaded before. Raises FileNotFoundError if the
    hub has no such model or cannot be reached.
    """
    import httpx2
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    repo = f"openai-community/{name}" if name in OPENAI else name

    def find(file: str) -> Path | None:
        large = file.endswith(".bin")  # only whether it exists: it is not read
        try:
            found = hf_hub_download(repo, file, dry_run=large)
        except errors.RemoteEntryNotFoundError:
            return None
        except (httpx2.HTTPError, OSError) as error:
            # No answer is not "no such file": it may be the tokenizer that tells another model.
            # Offline, or if the hub has said so before (the cache knows it), there is none.
            if isinstance(error, errors.LocalEntryNotFoundError) and (
                constants.HF_HUB_OFFLINE or try_to_load_from_cache(repo, file) is not None
            ):
                return None
            what = f"{name}: {file} could not be downloaded ({first_line(error)})"
            raise OSError(f"{what}: try again later") from None
        return Path(file if large else found)

    try:
        hf_hub_download(repo, CONFIG)
        return find
    except errors.GatedRepoError:
        reason = "access is restricted: ask for it on the model's page, and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "no such name there, or a private one, which needs HF_TOKEN"
    except (
        OSError,
        ImportError,  # a SOCKS proxy needs one more package
        httpx2.HTTPError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
    ) as error:
        gone = isinstance(error, errors.RemoteEntryNotFoundError)
        reason = f"{repo} has no {CONFIG}" if gone else first_line(error)
    raise FileNotFoundError(
        f"{name}: no such folder, and the hub does not have it ({reason}): give a checkpoint, a "
        "folder, or a hub name such as gpt2"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error, which may have many."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def find_weights(source: str | Path, file: str | None, find: Find) -> list[Path]:
    """Return a model's safetensors files. `file`: the one that the user has named, if any.

    Raises OSError or ValueError if a file is missing or the weights are in another format.
    """
    if file and (part := re.fullmatch(r"(.+)-\d+-of-\d+\.safetensors", file)):
        file = f"{part[1]}.safetensors.index.json"  # the other parts are needed too
    names = [file] if file else [WEIGHTS, INDEX]
    for name in names:
        if path := find(name):
            return [path] if path.suffix != ".json" else find_parts(source, path, find)
    if find("pytorch_model.bin") or find("pytorch_model.bin.index.json"):
        what, what_to_do = pickled(source)
        raise ValueError(f"{source} has only pytorch_model.bin, {what}: {what_to_do}")
    if Path(source).is_dir():
        refuse_foreign_folder(Path(source))
    where = "" if Path(source).is_dir() else " on the hub, or the hub does not answer"
    raise FileNotFoundError(f"{source} has no {' and no '.join(names)}{where}: {OTHERWISE}")


def find_parts(source: str | Path, index: Path, find: Find) -> list[Path]:
    """Return the files that an index names. Raises OSError or ValueError if one is missing."""
    try:
        names = sorted({*json.loads(index.read_bytes())["weight_map"].values()})
        inside = all(name == os.path.basename(name) for name in names)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        names, inside = [], False
    if not names or not inside:
        raise ValueError(f"{index} is not an index of weights: get the file again")
    if not names[0].endswith(".safetensors"):
        what, what_to_do = pickled(source)
        raise ValueError(f"{index} names {names[0]}, {what}: {what_to_do}")
    paths = {name: find(name) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        what = f"{source} has no {missing[0]}, one of {len(names)} files with its weights"
        raise FileNotFoundError(f"{what}: get the file")
    return [path for path in paths.values() if path]


# -----------------------------------------------------------------------------
# reading


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


def other_end(path: Path) -> str | None:
    """Return the end token that a config.json names, if in GPT-2's vocabulary it is another token.

    If there are no tokenizer files, this shows that the tokenizer is not GPT-2's. Ids from 50257 on
    are tokens that somebody has added to GPT-2's. A smaller vocabulary is never taken for GPT-2's.
    """
    given = json.loads(path.read_bytes())
    end = given.get("eos_token_id")
    small = given.get("vocab_size", EOT + 1) <= EOT
    return f"eos_token_id {end}" if type(end) is int and end < EOT and not small else None


def read_huggingface(name_or_path: str | Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Return sizes and weights (float32) of a model in Hugging Face format.

    `name_or_path`: a folder, a safetensors file or index in it, or a hub name. The names and
    layouts are ours: sizes as in GPTConfig, weights as in GPT. The embedding has `vocab_size` rows
    and no padding. Nothing is compared with the sizes: `build_model` does that. Raises OSError or
    ValueError that names the file, what is wrong and what to do.
    """
    path, source, file = Path(name_or_path), name_or_path, None
    if path.is_file():
        source, file = path.parent, path.name
    find = find_in_folder(Path(source)) if Path(source).is_dir() else find_on_hub(str(source))
    config = find(CONFIG)
    if config is None:
        if file:
            raise FileNotFoundError(f"{path} needs a {CONFIG} beside it: put it there")
        refuse_foreign_folder(path)
        raise FileNotFoundError(f"{path} has no {CONFIG}: {OTHERWISE}")
    sizes = read_config(config)
    # Another tokenizer gives every id another meaning. This comes before a long download.
    if other := find_other_tokenizer(find, other_end(config)):
        what = f"{source} has another tokenizer than GPT-2's ({other})"
        raise ValueError(f"{what}: give a model with GPT-2's")
    weights = {}
    for part in find_weights(source, file, find):
        weights |= read_safetensors(part)
    return sizes, weights


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file under our names, as our layers store them."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return read_tensors(file, path)
    except safetensors.SafetensorError as error:
        what, what_to_do = describe(path) or (f"damaged ({error})", "get the file again")
        raise ValueError(f"{path}: {what}: {what_to_do}") from None


def read_tensors(file: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors (float32) of an open safetensors file under our names, in our layout."""
    weights = {}
    for key in sorted(file.keys()):
        name = clean_name(key)
        if name is None:
            continue
        if name != "lm_head.weight":  # older files have no prefix
            name = f"transformer.{name.removeprefix('transformer.')}"
        tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            what = f"{name} holds {tensor.dtype}, not floats"
            raise ValueError(f"{path}: {what}: give another model")
        if name.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        # A copy: the tensors of the file are memory-mapped, and the file may change or go away.
        weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return weights


# -----------------------------------------------------------------------------
# writing


def write_huggingface(
    model_config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    folder: Path,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write a model as a folder that `transformers` can load.

    `model_config` and `weights` are those of a checkpoint (`model_config`, `model`), `facts` those
    of `run_facts`, for the model card. The folder appears whole or not at all, and replaces an
    earlier export. Other files in it stay, and so does a model card that the user has changed.
    Raises OSError if the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

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
    texts[CONFIG] = json.dumps(huggingface_config(model_config) | end, indent=2)
    texts[CARD] = model_card(model_config, facts or {})

    # Fill a new folder, then give it the name: an error on the way leaves the earlier export.
    folder = folder.resolve()
    if Path.cwd().is_relative_to(folder):  # the shell would stay in the old one
        raise OSError(f"{folder} is the current folder, or holds it, and cannot be replaced")
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    restore(old, folder)  # if a process was killed between the two renames below
    for leftover in new, old:
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        if (folder / CARD).exists() and not is_untouched(folder / CARD):
            del texts[CARD]
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (new / name).write_bytes(text.encode())
        # safetensors makes a file that only its owner can read
        (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)
        for path in new.iterdir():
            with open(path, "rb+") as file:
                sync(file.fileno())
        if folder.exists():
            keep_others(folder, new)
            folder.rename(old)
        new.rename(folder)
    except SafetensorError as error:  # its form of an OSError
        raise OSError(str(error)) from None
    finally:
        restore(old, folder)
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def restore(old: Path, folder: Path) -> None:
    """Give a folder its name again, if nothing has taken its place."""
    if old.exists() and not folder.exists():
        old.rename(folder)


def keep_others(folder: Path, new: Path) -> None:
    """Give the files of a folder that `new` does not have to `new` too, as links or as copies."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except (NotImplementedError, OSError):  # not every system has hard links
            shutil.copy2(source, target, follow_symlinks=False)

    for path in folder.iterdir():
        if path.name in FILES or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=link)
        else:
            link(str(path), str(new / path.name))


def check_folder(folder: Path) -> None:
    """Raise ValueError if an export cannot go here: to a file, or a folder of other things."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names and not is_export(folder):
        raise ValueError(f"{folder} holds {names[0]} and no earlier export")


def is_export(folder: Path) -> bool:
    """Tell whether a folder holds the configuration of a GPT-2."""
    try:
        read_config(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return True


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
