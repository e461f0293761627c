"""
Convert a model between our checkpoints and folders in Hugging Face format:

    python export.py log/ckpt_019073.pt DIR     a folder that transformers, lm_eval and others load
    python export.py DIR ckpt_000000.pt         a checkpoint, from a folder or a hub name like gpt2

The target's name tells the format: a checkpoint ends in .pt, all else is a folder. The source is
any model that the other commands read: see docs/inputs.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from common.checkpoint import checkpoint_paths, run_state, write_checkpoint
from common.cli import advice, plain, run_command
from common.huggingface import check_folder, write_huggingface
from common.metrics import run_facts
from common.weights import FILE_ENDINGS, find_model
from train_gpt2 import GPT, TrainConfig, load_model


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Turn a model into a Hugging Face folder or into a checkpoint."""

    source: Positional[str]  # checkpoint, run's folder, Hugging Face folder, or hub name
    target: Positional[Path]  # folder, or checkpoint *.pt


def export(config: ExportConfig) -> None:
    """Write the model in the format that the target's name tells.

    Raises ValueError or OSError for what the user has to correct. The target is then unchanged.
    """
    target = config.target
    to_checkpoint = target.suffix == ".pt"
    if not to_checkpoint and target.suffix in FILE_ENDINGS:
        raise ValueError(f"{target}: give a folder, or a checkpoint that ends in .pt")
    if to_checkpoint and target.exists():
        raise ValueError(f"{target} exists: give another name")
    if not to_checkpoint:
        with advice("give a new folder, or one with an earlier export"):
            check_folder(target)
    source = find_model(config.source)
    model = load_model(source)
    try:
        if to_checkpoint:
            save_checkpoint(model, source, target)
        else:
            weights = dict(model.named_parameters())
            write_huggingface(plain(model.config), weights, target, known_facts(Path(source)))
    except OSError as error:
        what = f"{target} could not be written ({error})"
        raise OSError(f"{what}: give another target, or make room") from None
    print(f"{target}: written")


def known_facts(path: Path) -> dict[str, Any]:
    """Return what the run of a checkpoint knows of it, for the model card."""
    if path not in checkpoint_paths(path.parent):
        return {}
    step = int(path.stem.removeprefix("ckpt_"))
    return run_facts(path.parent, step) | {"step": step}


def save_checkpoint(model: GPT, source: str, target: Path) -> None:
    """Write a checkpoint of a model, to start training from with --init_from."""
    state = run_state(
        weights=dict(model.named_parameters()), optimizers={"optimizer": {}}, scaler={},
        step=0, windows_seen=0,
        model_config=plain(model.config), train_config=plain(TrainConfig(init_from=source)),
        data="",  # belongs to no data: --init_from takes this checkpoint, --resume does not
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with advice("give a model with finite weights"):  # the one ValueError
        write_checkpoint(target, state, keep=0)


def main() -> None:
    run_command(ExportConfig, export)


if __name__ == "__main__":
    main()
