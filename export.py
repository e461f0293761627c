"""
A model in its two forms: our checkpoints, and folders in Hugging Face format.

    python export.py log/ckpt_019073.pt DIR     a folder that transformers, lm_eval and others load
    python export.py DIR ckpt_000000.pt         a checkpoint from a folder, or from a hub name: gpt2
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tyro.conf import Positional

from common.checkpoint import write_checkpoint
from common.cli import plain, run_command
from common.huggingface import write_huggingface
from train_gpt2 import TrainConfig, load_model


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Turn a checkpoint into a Hugging Face folder, or a folder into a checkpoint."""

    source: Positional[str]  # checkpoint *.pt; or folder in Hugging Face format, or hub name
    target: Positional[Path]  # folder; or checkpoint *.pt


def export(config: ExportConfig) -> None:
    """Convert in the direction that the names give."""
    if config.source.endswith(".pt") == (config.target.suffix == ".pt"):
        raise ValueError(
            f"{config.source} to {config.target}: one must be a checkpoint ending in .pt, the "
            "other a folder"
        )
    if config.target.suffix == ".pt" and config.target.exists():
        raise ValueError(f"{config.target} exists: give another name")
    model = load_model(config.source)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if config.target.suffix != ".pt":
        write_huggingface(plain(model.config), weights, config.target)
    else:
        state = dict(
            model=weights, optimizer={}, scaler={}, step=0, windows_seen=0,
            model_config=plain(model.config),
            train_config=plain(TrainConfig(init_from=config.source)),
            rng=torch.get_rng_state(),
            data="",  # no data: --init_from takes this checkpoint, --resume does not
        )  # fmt: skip
        config.target.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(config.target, state, keep=0)
    print(f"{config.target}: written")


def main() -> None:
    run_command(ExportConfig, export)


if __name__ == "__main__":
    main()
