"""A model's weights by name: a checkpoint, a folder in Hugging Face format, a name on the hub."""

from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import checkpoint_paths, read_checkpoint
from common.cli import advice
from common.huggingface import read_huggingface


def default_model() -> str:
    """Return the name of the newest checkpoint in log/, else `gpt2`."""
    return str(next(iter(checkpoint_paths(Path("log"))), "gpt2"))


def read_weights(name_or_path: str | Path | None) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the model's name, its sizes and its weights by Hugging Face's names, on the CPU.

    None: the newest checkpoint in log/, else `gpt2`. Raises ValueError or OSError if there is no
    such model or its file is damaged.
    """
    name = default_model() if name_or_path is None else str(name_or_path)
    if not name.endswith(".pt"):
        return name, *read_huggingface(name)
    with advice("give another model"):
        state = read_checkpoint(Path(name))
    return name, state["model_config"], state["model"]
