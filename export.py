"""
The two forms a model is kept in: our checkpoints, and Hugging Face's folders.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from _reader import atomic_write

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
    """Write a checkpoint, whole or not at all; then delete all but the `keep` newest (0: keep all)."""
    with atomic_write(path) as file:
        torch.save(state, file)
    for old in checkpoint_paths(path.parent)[keep:] if keep else []:
        old.unlink()
