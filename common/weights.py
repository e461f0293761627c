"""A model's weights by name: a checkpoint, a run, a folder in Hugging Face format, the hub."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import checkpoint_paths, is_checkpoint, read_pickle
from common.cli import advice
from common.foreign import STAND_INS, from_nanogpt, refuse_foreign, refuse_foreign_folder
from common.huggingface import CONFIG, INDEX, WEIGHTS, read_huggingface
from common.paths import walk

# A name with such an ending is a file's: the hub is not asked for it.
FILE_ENDINGS = (
    ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json", ".gguf", ".h5", ".msgpack", ".npz",
)  # fmt: skip

# -----------------------------------------------------------------------------
# which model


def default_model() -> str:
    """Return the name of the newest model below log/, else `gpt2`."""
    return str(newest_model(Path("log")) or "gpt2")


def newest_model(folder: Path) -> Path | None:
    """Return the newest model below a folder: the last checkpoint of the run that wrote last.

    Where there is no checkpoint of ours, it is the newest folder in Hugging Face format, or the
    newest checkpoint of nanoGPT or build-nanogpt. None: there is no model.
    """

    files = [Path(root, name) for root, names in walk(folder) for name in names]

    def below(pattern: str) -> list[Path]:
        return [path for path in files if path.match(pattern) and path.is_file()]

    runs = {path.parent for path in below("ckpt_*.pt")}
    last = [paths[0] for run in runs if (paths := checkpoint_paths(run))]
    exports = [path.parent for path in below(CONFIG) if has_weights(path.parent)]
    return newest(last) or newest(exports) or newest([*below("ckpt.pt"), *below("model_*.pt")])


def newest(paths: Iterable[Path]) -> Path | None:
    """Return the path that was written last; None if there are none."""
    return max(paths, key=lambda path: (path.stat().st_mtime_ns, path), default=None)


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds the weights of a model in Hugging Face format."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def find_model(name_or_path: str | Path | None) -> str:
    """Return the model that a name means: a file, a folder in Hugging Face format, or a hub name.

    None: the newest model below log/, else `gpt2`. Raises OSError or ValueError, with what to do,
    if there is no such file, or no model in a folder.
    """
    if name_or_path is None:
        return default_model()
    if not str(name_or_path):  # not the current folder: "$UNSET" is a mistake
        raise ValueError("the name of the model is empty: give one, or leave the flag out")
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{name_or_path}: {error}: give the whole path") from None
    if path.is_dir():
        if (path / CONFIG).is_file() and has_weights(path):
            return str(path)
        if own := checkpoint_paths(path):  # in a run's folder, that run is meant
            return str(own[0])
        if (path / CONFIG).is_file() or has_weights(path):
            return str(path)  # not whole: reading it says what is missing
        if model := newest_model(path):
            return str(model)
        refuse_foreign_folder(path)
        raise FileNotFoundError(
            f"{path} holds no checkpoint and no {CONFIG}: give a run's folder, a folder in Hugging "
            "Face format, or a checkpoint"
        )
    if path.name == CONFIG and path.is_file():
        return str(path.parent)
    if path.is_file():
        return str(path)
    if (index := path.with_name(f"{path.name}.index")).is_file():  # TensorFlow's model.ckpt.index
        refuse_foreign(index)
    if str(name_or_path).startswith("~") or path.is_absolute() or path.suffix in FILE_ENDINGS:
        kind = "checkpoint" if path.suffix == ".pt" else "file or folder"
        raise FileNotFoundError(f"{path}: no such {kind}: give another model")
    return str(name_or_path)


# -----------------------------------------------------------------------------
# its weights


def read_weights(name_or_path: str | Path | None) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the model's name, its sizes and its weights by Hugging Face's names, on the CPU.

    Which model a name means is `find_model`'s answer. It is printed on stderr, so that the user
    sees which model answers. Raises ValueError or OSError, with what to do, if there is no such
    model, or if its file is damaged or of another format.
    """
    name = find_model(name_or_path)
    path = Path(name)
    if path.is_file() and not is_safetensors(path):
        sizes, weights = read_file(path)
    else:
        sizes, weights = read_huggingface(name)
    print(f"model: {name}", file=sys.stderr, flush=True)
    return name, sizes, weights


def is_safetensors(path: Path) -> bool:
    """Tell whether a file is one with safetensors, or the index of several."""
    if path.name.endswith(".index.json") or path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        return file.read(10)[8:] == b'{"'  # after the header's length, eight bytes


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the sizes and weights of a checkpoint: ours, of nanoGPT, or of build-nanogpt."""
    refuse_foreign(path)
    with advice("give another model"):
        state = read_pickle(path, STAND_INS)
        if is_checkpoint(state):
            return state["model_config"], state["model"]
        try:
            if found := from_nanogpt(state):
                return found
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        tensors = isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values())
        what = "weights without sizes" if state and tensors else "no model"
        raise ValueError(f"{path}: not a whole checkpoint (it holds {what})")
