"""The only place that writes a run's numbers: metrics.jsonl, the console, dashboards."""

import atexit
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from common.dashboards import TensorBoard, WeightsAndBiases, check_installed
from common.files import atomic_write
from common.metrics import METRICS, read_earlier
from common.shards import data_source

# -----------------------------------------------------------------------------
# the log


class RunLog:
    """Write a run's events to metrics.jsonl, the console and the dashboards.

    Only the first rank (`is_main`) writes. On every other rank the methods do nothing. For a
    resumed run, `kept` holds the (event, step) of each line that stays in metrics.jsonl. As a
    context manager, the log closes itself.
    """

    def __init__(
        self,
        out_dir: Path,
        step: int,
        is_main: bool,
        tensorboard: bool = False,
        wandb: bool = False,
    ):
        """Open metrics.jsonl, and drop the lines that a run resumed at `step` will write again.

        Raises ValueError, on every rank and before anything is written, if the package of a
        dashboard is missing. Raises OSError, as `write` and `close` do, if metrics.jsonl cannot
        be written.
        """
        for package, wanted in (("tensorboard", tensorboard), ("wandb", wandb)):
            if wanted:
                check_installed(package)
        self.kept: set[tuple[str, int]] = set()
        self.file: TextIO | None = None  # None: write nothing
        if not is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        self.path = out_dir / METRICS
        earlier = read_earlier(self.path, step)
        self.kept = earlier.events
        self.console = Console(earlier.best_loss)
        self.dashboards: list[TensorBoard | WeightsAndBiases] = []
        self.ids: dict[str, str] = {}  # recorded, so that a resumed run continues its dashboard
        if tensorboard:
            self.dashboards.append(TensorBoard(out_dir, step))
        if wandb:
            board = WeightsAndBiases(out_dir, earlier.wandb_id)
            self.dashboards.append(board)
            self.ids["wandb_id"] = board.run.id
        with naming(self.path):
            with atomic_write(self.path) as file:
                file.write("".join(earlier.lines).encode())
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, one from closing would hide it. After a failed write it is the same one.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close(at_exit=kind is not None)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Record one event. JSON must be able to hold the values."""
        if self.file is None:
            return
        if event == "run":
            source = data_source(Path(values["config"]["data_dir"]))
            values |= {**software(), "data_source": source, **self.ids}
            self.flops = values["flops_per_token"], values["peak_flops"]
        elif event == "train":
            speed = values["batch_tokens"] / values["dt"]  # tokens a second
            # MFU, model FLOPs utilisation (PaLM paper): the part of the GPUs' peak that is used
            flops, peak = self.flops
            mfu = speed * flops / peak if peak else None
            values |= {"tokens_per_sec": speed, "mfu": mfu}
        entry = {"event": event, "step": step, "time": time.time(), **values}
        with naming(self.path):
            print(json.dumps(entry), file=self.file, flush=True)
        self.console.write(event, step, values)
        for dashboard in self.dashboards:
            dashboard.write(event, step, values)

    def write_step(
        self, step: int, result: Any, batch_tokens: int, tokens_seen: int, T: int, **values: float
    ) -> None:
        """Record a step with its rates and times or, if it was not applied, on which windows."""
        if result.applied:
            self.write(
                "train", step, loss=result.loss, grad_norm=result.grad_norm, **values,
                batch_tokens=batch_tokens, tokens_seen=tokens_seen, data_wait=result.data_wait,
            )  # fmt: skip
            return
        windows = [(tokens_seen - batch_tokens) // T, tokens_seen // T]  # to look at
        why = f"loss {result.loss}, gradient norm {result.grad_norm}"
        self.write("skip", step, why=why, windows=windows)

    def say(self, line: str) -> None:
        """Print a line on the console, above the status line if there is one."""
        if self.file is not None:
            self.console.say(line)

    def close(self, at_exit: bool = False) -> None:
        """Remove the status line and let the dashboards finish. Later calls write nothing.

        `at_exit`: the dashboards finish when Python ends. An upload may take minutes, and after an
        error the message must be printed first.
        """
        if self.file is None:
            return
        file, self.file = self.file, None
        self.console.close()
        for dashboard in self.dashboards:
            if at_exit:
                atexit.register(dashboard.close)
            else:
                dashboard.close()
        with naming(self.path):  # a network file system may report a full disk only here
            file.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError from the block, which may have only a number."""
    try:
        yield
    except OSError as error:
        what = f"{path} cannot be written ({error.strerror})"
        what_to_do = "make room or repair the disk, and continue with --resume"
        raise OSError(f"{what}: {what_to_do}") from None


def software() -> dict[str, Any]:
    """Return the versions that a run depends on, and the commit of this checkout."""
    here = str(Path(__file__).parent)
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, check=True).stdout.decode().strip()
    except (OSError, subprocess.CalledProcessError):  # git is missing, or this is no checkout
        commit = None
    packages = {name: version(name) for name in ("torch", "numpy", "tiktoken")}
    return {"git_hash": commit, "versions": {"python": platform.python_version(), **packages}}


# -----------------------------------------------------------------------------
# the console


class Console:
    """Print one line per event. A terminal also gets a status line, which stays at the bottom."""

    def __init__(self, best_loss: float = math.inf):
        self.on_terminal = sys.stdout.isatty() and "CI" not in os.environ
        self.best_loss = best_loss  # validation
        self.budget = 0  # tokens of the whole run
        self.step_time = 0.0  # seconds, smoothed
        self.bar: Any = None  # the status line, from the first step on

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Print an event's line and bring the status line up to date."""
        if event == "run":
            self.budget = values["config"]["max_steps"] * values["config"]["total_batch_size"]
        elif event == "train":
            self.step_time = smoothed(self.step_time, values["dt"])
        elif event == "val":
            self.best_loss = min(self.best_loss, values["loss"])
        if line := self.line(event, step, values):
            self.say(line)
        if event == "train" and self.on_terminal:
            self.show_status(step, values)

    def say(self, line: str) -> None:
        """Print a line, above the status line if there is one."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Remove the status line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def line(self, event: str, step: int, values: dict[str, Any]) -> str:
        """Return the line of an event; empty for an event that prints none."""
        match event:
            case "run":
                return run_line(values, self.budget)
            case "train" if self.on_terminal:  # the status line has the time left
                return train_row(step, values)
            case "train":
                return f"{train_line(step, values)}, {self.time_left(values)} left"
            case "val":
                return f"step {step}: validation loss {values['loss']:.4f}"
            case "hellaswag":
                return hellaswag_line(step, values)
            case "sample":
                return f"step {step}: sample: {values['text']!r}"
            case "skip":
                return f"step {step}: not applied: {values['why']}"
            case "checkpoint":
                return f"step {step}: saved {values['path']}"
            case "stats":  # for plot.py: too many numbers to read
                return ""
        raise AssertionError(f"no such event: {event}")

    def show_status(self, step: int, values: dict[str, Any]) -> None:
        """Show progress, time left and the best validation loss in the status line."""
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.budget, file=sys.stdout, leave=False, dynamic_ncols=True, miniters=1,
                bar_format="{percentage:3.0f}% |{bar}| {desc}",
            )  # fmt: skip
        best = f", best validation loss {self.best_loss:.4f}" if self.best_loss < math.inf else ""
        self.bar.n = values["tokens_seen"]
        self.bar.set_description_str(f"step {step}, {self.time_left(values)} left{best}")

    def time_left(self, values: dict[str, Any]) -> timedelta:
        """Return the time that the rest of the budget takes, in steps as large as this one."""
        steps_left = (self.budget - values["tokens_seen"]) / values["batch_tokens"]
        return timedelta(seconds=round(steps_left * self.step_time))


def smoothed(before: float, dt: float) -> float:
    """Return the smoothed time of a step, from the one before (0: none) and the newest time.

    It falls at once to a shorter time, and rises by a tenth of the difference to a longer one. So
    the first step, which is long because it compiles, soon has no effect.
    """
    return dt if before == 0 else min(dt, 0.9 * before + 0.1 * dt)


def run_line(v: dict[str, Any], budget: int) -> str:
    return (
        f"{v['n_params']:,} parameters on {v['world_size']} x {v['device']}, "
        f"{v['dtype']}, {'compiled' if v['compile'] else 'not compiled'}; "
        f"{budget:,} tokens ({v['passes']:.2f} passes over the data) in steps of "
        f"{v['config']['total_batch_size']:,}, {v['micro_batch_size']} rows at a time"
    )


def train_row(step: int, v: dict[str, Any]) -> str:
    """Return the line of a step for a terminal, in columns."""
    wait = v["data_wait"] / v["dt"]
    mfu = f"  mfu {v['mfu']:.0%}" if v["mfu"] else ""
    waited = f"  waited {wait:.0%}" if wait > 0.01 else ""
    return (
        f"{step:6d}  loss {v['loss']:.4f}  lr {v['lr']:.2e}  norm {v['grad_norm']:6.3f}  "
        f"{v['dt'] * 1e3:5.0f} ms  {v['tokens_per_sec']:9,.0f} tok/s{mfu}{waited}"
    )


def train_line(step: int, v: dict[str, Any]) -> str:
    """Return the line of a step for a file or a pipe, in words."""
    wait = v["data_wait"] / v["dt"]
    mfu = f", mfu {v['mfu']:.1%}" if v["mfu"] else ""
    waited = f", waited {wait:.0%} for data" if wait > 0.01 else ""
    return (
        f"step {step}: loss {v['loss']:.4f}, lr {v['lr']:.2e}, norm {v['grad_norm']:.3f}, "
        f"{v['dt'] * 1e3:.0f} ms, {v['tokens_per_sec']:,.0f} tokens/s{mfu}{waited}"
    )


def hellaswag_line(step: int, v: dict[str, Any]) -> str:
    scores = f"acc {v['acc']:.4f}, acc_norm {v['acc_norm']:.4f}"
    return f"step {step}: HellaSwag ({v['style']}): {scores}"
