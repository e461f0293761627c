"""A run's numbers for other programs to show: TensorBoard, Weights & Biases."""

import importlib.util
import os
from pathlib import Path
from typing import Any


def check_installed(package: str) -> None:
    """Raise ValueError if the package that the flag of the same name needs is missing."""
    spec = importlib.util.find_spec(package)
    # a plain folder of that name (wandb makes one for its files) has a spec too, but no origin
    if spec is None or spec.origin is None:
        raise ValueError(f"--{package}: the package is not installed: pip install {package}")


class TensorBoard:
    """Write a run's numbers for TensorBoard, into the folder `tensorboard` of the run."""

    def __init__(self, out_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a run resumed at `step` writes again
        folder = str(out_dir / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=30)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        for name, number in as_scalars(event, values).items():
            self.writer.add_scalar(name, number, step)
        if event == "sample":
            self.writer.add_text("sample", values["text"], step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Send a run's numbers to Weights & Biases.

    `run_id` is the id of the run to continue; None starts a new one. Project, name and folder
    are those of WANDB_PROJECT, WANDB_NAME and WANDB_DIR, else `gpt2` and those of the run. wandb
    itself reads WANDB_ENTITY and its other variables. Raises ValueError if wandb refuses, for
    example because nobody is logged in.
    """

    def __init__(self, out_dir: Path, run_id: str | None):
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "gpt2",  # an argument beats a variable
                name=os.environ.get("WANDB_NAME") or out_dir.resolve().name,
                dir=os.environ.get("WANDB_DIR") or out_dir,
                id=run_id, resume="allow" if run_id else None,
            )  # fmt: skip
        except wandb.errors.Error as error:
            what = str(error).splitlines()[0]
            what_to_do = "run `wandb login` or set WANDB_MODE=offline"
            raise ValueError(f"--wandb: {what}: {what_to_do}") from None
        # wandb's own step counter never goes back, but the step of a resumed run does
        self.run.define_metric("*", step_metric="step")

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        if event == "run":
            self.run.config.update(values["config"], allow_val_change=True)
        if numbers := as_scalars(event, values):
            self.run.log({"step": step, **numbers})

    def close(self) -> None:
        self.run.finish()


def as_scalars(event: str, values: dict[str, Any]) -> dict[str, float]:
    """Return an event's numbers by name: `event/name`, or `event/name/layer` for stats."""
    if event == "run":
        return {}
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if event == "stats":
            numbers |= {f"stats/{name}/{layer:02d}": number for layer, number in enumerate(value)}
        elif isinstance(value, int | float):
            numbers[f"{event}/{name}"] = value
    return numbers
