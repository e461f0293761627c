"""
Convert a model between our checkpoints and folders in Hugging Face format:

    python export.py log/ckpt_019073.pt DIR     a folder that transformers, lm_eval and others load
    python export.py DIR ckpt_000000.pt         a checkpoint, from a folder or a hub name like gpt2
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from common.checkpoint import run_state, write_checkpoint
from common.cli import advice, plain, run_command
from common.huggingface import check_folder, write_huggingface
from train_gpt2 import GPT, TrainConfig, load_model


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Turn a checkpoint into a Hugging Face folder, or a folder into a checkpoint."""

    source: Positional[str]  # checkpoint *.pt, folder in Hugging Face format, or hub name
    target: Positional[Path]  # folder, or checkpoint *.pt


def export(config: ExportConfig) -> None:
    """Convert in the direction that the names give.

    Raises ValueError or OSError for what the user has to correct. The target is then unchanged.
    """
    source, target = config.source, config.target
    to_checkpoint = target.suffix == ".pt"
    if source.endswith(".pt") == to_checkpoint:
        raise ValueError(
            f"{source} to {target}: one must be a checkpoint ending in .pt, the other a folder"
        )
    if to_checkpoint and target.exists():
        raise ValueError(f"{target} exists: give another name")
    if not to_checkpoint:
        with advice("give a new folder, or one with an earlier export"):
            check_folder(target)
    model = load_model(source)
    try:
        if to_checkpoint:
            save_checkpoint(model, source, target)
        else:
            write_huggingface(plain(model.config), dict(model.named_parameters()), target)
    except OSError as error:
        what = f"{target} could not be written ({error})"
        raise OSError(f"{what}: give another target, or make room") from None
    print(f"{target}: written")


def save_checkpoint(model: GPT, source: str, target: Path) -> None:
    """Write a checkpoint of a model, to start training from with --init_from."""
    state = run_state(
        model=model, optimizers={"optimizer": {}}, scaler={}, step=0, windows_seen=0,
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
