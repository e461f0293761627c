"""The one place where a run's numbers are written: metrics.jsonl, the console, dashboards."""

import atexit
import contextlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.files import atomic_write
from common.shards import data_source

METRICS = "metrics.jsonl"
BY_UPDATE = ("train", "skip", "stats")  # events whose step is an update's index, from 0


def software() -> dict[str, Any]:
    """Return the versions that a run depends on, and the commit of this checkout."""
    here = str(Path(__file__).parent)
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        commit = None
    packages = {name: version(name) for name in ("torch", "numpy", "tiktoken")}
    return {"git_hash": commit, "versions": {"python": platform.python_version(), **packages}}


class RunLog:
    """The one place where a run's numbers are written: metrics.jsonl, console, dashboards.

    On ranks other than the first (`is_main` False) it writes nothing.
    """

    def __init__(
        self,
        out_dir: Path,
        step: int,
        is_main: bool,
        tensorboard: bool = False,
        wandb: bool = False,
    ):
        """Open for appending, less the lines that a run resumed at `step` will write again.

        Raises ValueError, before anything is written, where a dashboard's package is missing.
        """
        for name, asked in (("tensorboard", tensorboard), ("wandb", wandb)):
            spec = importlib.util.find_spec(name) if asked else None
            if asked and (spec is None or spec.origin is None):  # a mere folder has no origin
                raise ValueError(f"--{name}: the package is not installed: pip install {name}")
        self.kept: set[tuple[str, int]] = set()  # (event, step) of the lines before
        self.seconds = 0.0  # a step, smoothed
        self.budget = 0  # tokens of the run
        self.best = math.inf  # validation loss
        self.file = self.bar = self.board = self.wandb = None
        self.on_terminal = sys.stdout.isatty() and "CI" not in os.environ
        if not is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / METRICS
        lines, wandb_id = [], None
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut off by a crash
                entry = json.loads(line)
                if entry["step"] < step + (entry["event"] not in BY_UPDATE):
                    lines.append(line + "\n")
                    self.kept.add((entry["event"], entry["step"]))
                    wandb_id = entry.get("wandb_id", wandb_id)
                    if entry["event"] == "val":
                        self.best = min(self.best, entry["loss"])
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(out_dir / "tensorboard")  # purged of what is written again
            self.board = SummaryWriter(folder, purge_step=step + 1, flush_secs=30)
        if wandb:
            self.wandb = start_wandb(out_dir, wandb_id)
        with atomic_write(path) as file:
            file.write("".join(lines).encode())
        self.file = open(path, "a")  # noqa: SIM115 - as long as the run
        atexit.register(self.close)  # where an error ends the run

    def write(self, event: str, step: int, **values: Any) -> None:
        """Record one event; `values` must be fit for JSON."""
        if self.file is None:
            return
        if event == "run":
            values |= software() | {"data_source": data_source(Path(values["config"]["data_dir"]))}
            if self.wandb:
                values["wandb_id"] = self.wandb.id
                self.wandb.config.update(values["config"], allow_val_change=True)
        entry = {"event": event, "step": step, "time": time.time(), **values}
        print(json.dumps(entry), file=self.file, flush=True)
        if line := self._console_line(event, step, values):
            self.say(line)
        if self.on_terminal and event in ("train", "val"):
            self._show_status(step, values)
        numbers = as_scalars(event, values)
        if self.board:
            for name, number in numbers.items():
                self.board.add_scalar(name, number, step)
            if event == "sample":
                self.board.add_text("sample", values["text"], step)
        if self.wandb and numbers:
            self.wandb.log({"step": step, **numbers})

    def say(self, line: str) -> None:
        """Print a line on the console, above the status line if there is one."""
        if self.bar is not None:
            self.bar.write(line)
        elif self.file is not None:
            print(line, flush=True)

    def close(self) -> None:
        """Take the status line away and let the dashboards finish; nothing is written after."""
        atexit.unregister(self.close)
        if self.bar is not None:
            self.bar.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()
        if self.file is not None:
            self.file.close()
        self.file = self.bar = self.board = self.wandb = None

    def _show_status(self, step: int, values: dict[str, Any]) -> None:
        """Keep a line at the bottom of the terminal: progress, time left, best validation loss."""
        if "tokens_seen" not in values:  # a validation
            self.best = min(self.best, values["loss"])
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.budget, file=sys.stdout, leave=False, dynamic_ncols=True, miniters=1,
                bar_format="{percentage:3.0f}% |{bar}| {desc}",
            )  # fmt: skip
        best = "" if self.best == math.inf else f", best validation loss {self.best:.4f}"
        self.bar.n = values["tokens_seen"]
        self.bar.set_description_str(f"step {step}, {self._time_left(values)} left{best}")

    def _time_left(self, v: dict[str, Any]) -> timedelta:
        steps_left = (self.budget - v["tokens_seen"]) / v["batch_tokens"]
        return timedelta(seconds=round(steps_left * self.seconds))

    def _console_line(self, event: str, step: int, v: dict[str, Any]) -> str:
        match event:
            case "run":
                config = v["config"]
                self.budget = config["max_steps"] * config["total_batch_size"]
                return (
                    f"{v['n_params']:,} parameters on {v['world_size']} x {v['device']}, "
                    f"{v['dtype']}, {'compiled' if v['compile'] else 'not compiled'}; "
                    f"{self.budget:,} tokens ({v['passes']:.2f} passes over the data) in steps of "
                    f"{config['total_batch_size']:,}, {v['micro_batch_size']} rows at a time"
                )
            case "train":
                # smoothed; the first step, which compiles, is soon forgotten
                self.seconds = (
                    v["dt"]
                    if self.seconds == 0
                    else min(v["dt"], 0.9 * self.seconds + 0.1 * v["dt"])
                )
                wait = v["data_wait"] / v["dt"]
                if self.on_terminal:
                    return (
                        f"{step:6d}  loss {v['loss']:.4f}  lr {v['lr']:.2e}  "
                        f"norm {v['grad_norm']:6.3f}  {v['dt'] * 1e3:5.0f} ms  "
                        f"{v['tokens_per_sec']:9,.0f} tok/s"
                        + (f"  mfu {v['mfu']:.0%}" if v["mfu"] else "")
                        + (f"  waited {wait:.0%}" if wait > 0.01 else "")
                    )
                mfu = f", mfu {v['mfu']:.1%}" if v["mfu"] else ""
                waited = f", waited {wait:.0%} for data" if wait > 0.01 else ""
                return (
                    f"step {step}: loss {v['loss']:.4f}, lr {v['lr']:.2e}, "
                    f"norm {v['grad_norm']:.3f}, {v['dt'] * 1e3:.0f} ms, "
                    f"{v['tokens_per_sec']:,.0f} tokens/s{mfu}{waited}, "
                    f"{self._time_left(v)} left"
                )
            case "val":
                return f"step {step}: validation loss {v['loss']:.4f}"
            case "hellaswag":
                return (
                    f"step {step}: HellaSwag ({v['style']}): acc {v['acc']:.4f}, "
                    f"acc_norm {v['acc_norm']:.4f}"
                )
            case "sample":
                return f"step {step}: sample: {v['text']!r}"
            case "skip":
                return f"step {step}: not applied: {v['why']}"
            case "checkpoint":
                return f"step {step}: saved {v['path']}"
            case "stats":  # for pictures: too many numbers to read
                return ""
        raise AssertionError(f"no such event: {event}")


def as_scalars(event: str, values: dict[str, Any]) -> dict[str, float]:
    """Return an event's numbers by name, `event/name`; those of layers as `event/name/layer`."""
    numbers: dict[str, float] = {}
    if event != "run":
        for name, value in values.items():
            layers = enumerate(value) if event == "stats" else [(None, value)]
            for layer, number in layers:
                if isinstance(number, int | float):
                    tag = f"{event}/{name}" + ("" if layer is None else f"/{layer:02d}")
                    numbers[tag] = number
    return numbers


def start_wandb(out_dir: Path, run_id: str | None) -> Any:
    """Start or, given the id of a run, go on with a run of Weights & Biases.

    Raises ValueError where it does not let us in.
    """
    import wandb

    try:
        run = wandb.init(
            project="gpt2", name=out_dir.name, dir=out_dir, id=run_id,
            resume="allow" if run_id else None,
        )  # fmt: skip
    except wandb.errors.Error as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--wandb: {why}: run `wandb login` or set WANDB_MODE=offline") from None
    # wandb's own counter never goes back, as a resumed run must
    run.define_metric("*", step_metric="step")
    return run
