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

import torch

from common import hardware, parallel
from common.cli import plain
from common.dashboards import TensorBoard, WeightsAndBiases, check_installed
from common.files import atomic_write
from common.metrics import METRICS, read_earlier
from common.profiling import Clock, StepProfiler
from common.shards import data_source
from common.significance import plus_minus

# -----------------------------------------------------------------------------
# the log


class RunLog:
    """Write a run's events to metrics.jsonl, the console and the dashboards.

    Only the first rank (`is_main`) writes. On every other rank the methods do nothing. For a
    resumed run, `kept` holds the (event, step) of each line that stays in metrics.jsonl. As a
    context manager, the log closes itself.

    An event is written as soon as its work is done. So the time since the event before it is the
    time that it took: `seconds`, without those of the compiler, `compile_seconds`. (A step has its
    own time, `dt`.)
    """

    def __init__(
        self,
        out_dir: Path,
        step: int,
        is_main: bool,
        tensorboard: bool = False,
        wandb: bool = False,
        trunk: Path | None = None,
    ):
        """Open metrics.jsonl, and drop the lines that a run resumed at `step` will write again.

        A run that branches off at `step` starts with the lines of its `trunk`, the folder of
        another run, and drops its own. Raises ValueError, on every rank and before anything is
        written, if the package of a dashboard is missing. Raises OSError, as `write` and `close`
        do, if metrics.jsonl cannot be written.
        """
        for package, wanted in (("tensorboard", tensorboard), ("wandb", wandb)):
            if wanted:
                check_installed(package)
        self.kept: set[tuple[str, int]] = set()
        self.file: TextIO | None = None  # None: write nothing
        self.profiler: StepProfiler | None = None
        self.device: torch.device | None = None  # whose peak memory belongs to the end
        if not is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        self.path = out_dir / METRICS
        # A branch that was killed before its first checkpoint starts again: with new lines of its
        # trunk, which may have come further.
        earlier = read_earlier((trunk or out_dir) / METRICS, step, branch=trunk is not None)
        self.kept, self.totals = earlier.events, earlier.totals
        self.console = Console(earlier.best_loss)
        self.clock = Clock()
        self.dashboards: list[TensorBoard | WeightsAndBiases] = []
        # recorded, so that a resumed run continues its dashboard, and a branch not its trunk's
        self.ids: dict[str, str | None] = {"wandb_id": None} if trunk else {}
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
        seconds, compiling = self.clock.lap()
        if "dt" in values:
            values["dt"] -= compiling
        elif event not in ("run", "stats"):
            values.setdefault("seconds", seconds - compiling)
        if compiling:
            values["compile_seconds"] = compiling
        if event == "run":
            source = data_source(Path(values["config"]["data_dir"]))
            values |= {**software(), "data_source": source, **self.ids}
            values["startup_seconds"] += seconds  # those of the dashboards
            self.about = values
            if values["compile"]:
                self.clock.watch_compiler()
        elif event == "train":
            values |= self.speed(values["batch_tokens"], values["dt"])
        elif event == "end" and self.device:
            values["peak_memory"] = hardware.peak_memory(self.device)
        entry = {"event": event, "step": step, "time": time.time(), **values}
        self.totals.add(entry)
        if event == "end":
            self.console.say_held()
            if self.profiler:  # it prints too, and the summary comes last
                self.profiler.finish()
            values |= self.summary()
            entry |= values
        for name, value in values.items():  # JSON has no NaN: the loss after a run has diverged
            if isinstance(value, float) and not math.isfinite(value):
                entry[name] = None
        with naming(self.path):
            print(json.dumps(entry), file=self.file, flush=True)
        self.console.write(event, step, values)
        for dashboard in self.dashboards:
            dashboard.write(event, step, values)

    def speed(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """Return tokens a second, and MFU (None: the GPU's peak is not known)."""
        speed = tokens / seconds if seconds else 0.0
        # MFU, model FLOPs utilisation (PaLM paper): the part of the GPUs' peak that is used
        flops, peak = self.about["flops_per_token"], self.about["peak_flops"]
        return {"tokens_per_sec": speed, "mfu": speed * flops / peak if peak else None}

    def summary(self) -> dict[str, Any]:
        """Return what the run adds up to, with its earlier parts, for the line that ends it."""
        totals = vars(self.totals).copy()
        tokens = totals.pop("tokens")
        totals["peak_memory"] = totals["peak_memory"] or None  # not known on Windows
        speed = self.speed(tokens, totals["train_seconds"])
        return {**totals, **speed, "n_params": self.about["n_params"]}

    def write_step(
        self, step: int, result: Any, batch_tokens: int, tokens_seen: int, T: int, **values: float
    ) -> None:
        """Record a step with its rates and times or, if it was not applied, on which windows."""
        if result.applied:
            self.write(
                "train", step, loss=result.loss, grad_norm=result.grad_norm, **values,
                batch_tokens=batch_tokens, tokens_seen=tokens_seen, data_wait=result.data_wait,
            )  # fmt: skip
            if result.stop and self.file is not None:
                self.console.say_held()  # a signal: it was the last step
            return
        windows = [(tokens_seen - batch_tokens) // T, tokens_seen // T]  # to look at
        why = f"loss {result.loss}, gradient norm {result.grad_norm}"
        self.write(
            "skip", step, why=why, windows=windows, dt=values["dt"],
            batch_tokens=batch_tokens, tokens_seen=tokens_seen,
        )  # fmt: skip

    def profiled(self, step: int) -> contextlib.AbstractContextManager:
        """Profile the step inside the `with` block, if `--profile_step` asks for it."""
        return self.profiler.step(step) if self.profiler else contextlib.nullcontext()

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
        self.clock.close()
        if self.profiler:
            self.profiler.finish()
        file, self.file = self.file, None
        self.console.close()
        for dashboard in self.dashboards:
            if at_exit:
                atexit.register(dashboard.close)
            else:
                dashboard.close()
        with naming(self.path):  # a network file system may report a full disk only here
            file.close()


def open_log(run: Any, startup_seconds: float) -> RunLog:
    """Open the log of a run and write down what this run is. Then print the run's notes."""
    config, machine, model = run.config, run.machine, run.model
    boards = config.tensorboard, config.wandb
    log = RunLog(config.out_dir, run.step, machine.is_main, *boards, run.trunk)
    log.device = machine.device
    log.write(
        "run", run.step, config=plain(config), model_config=plain(model.config),  # as JSON types
        n_params=model.n_params, data=run.data, device=hardware.device_name(machine.device),
        micro_batch_size=run.micro_batch_size, world_size=machine.world_size, compile=run.compiled,
        shard=parallel.is_sharded(model), recompute=model.recompute,
        dtype=str(machine.dtype).removeprefix("torch."),  # of matrix products
        **hardware.flops_of_run(model, machine.device, machine.world_size),  # for MFU
        passes=config.budget / (len(run.train_windows) * model.config.block_size),  # epochs
        startup_seconds=startup_seconds,
    )  # fmt: skip
    for note in run.notes:
        machine.print(f"note: {note}")
    if machine.is_main and config.profile_step is not None:
        kind = machine.device.type
        log.profiler = StepProfiler(config.profile_step, config.out_dir, kind, log.say)
    return log


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
        self.printed = -math.inf  # when the last training line was printed
        self.held = ""  # the training line that came too soon after it
        self.target = -math.inf  # validation loss that ends the run
        self.bar: Any = None  # the status line, from the first step on

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Print an event's line and bring the status line up to date."""
        if event == "run":
            self.budget = values["config"]["max_steps"] * values["config"]["total_batch_size"]
            self.target = values["config"].get("target_loss") or -math.inf
        elif event == "train":
            self.step_time = smoothed(self.step_time, values["dt"])
        elif event == "val":
            self.best_loss = min(self.best_loss, values["loss"])
        # the last training line comes before what ends the run
        if event == "skip" or (event == "val" and self.best_loss <= self.target):
            self.say_held()
        line = self.line(event, step, values)
        if event == "train":
            # A line a second is as much as anybody reads. The first and the last step have theirs.
            last = values["tokens_seen"] >= self.budget
            if not last and time.monotonic() - self.printed < 1.0:
                self.held, line = line, ""
            else:
                self.held, self.printed = "", time.monotonic()
        if line:
            self.say(line)
        if event == "train" and self.on_terminal:
            self.show_status(step, values)

    def say(self, line: str) -> None:
        """Print a line, above the status line if there is one."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def say_held(self) -> None:
        """Print the newest training line, if it was held back."""
        if self.held:
            self.say(self.held)
            self.held = ""

    def close(self) -> None:
        """Print the last training line if it was held back, and remove the status line."""
        self.say_held()
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
                bits = f" ({values['bpb']:.4f} bits per byte)" if values.get("bpb") else ""
                return f"step {step}: validation loss {values['loss']:.4f}{bits}"
            case "hellaswag":
                return hellaswag_line(step, values)
            case "sample":
                return f"step {step}: sample: {values['text']!r}"
            case "skip":
                return f"step {step}: not applied: {values['why']}"
            case "checkpoint":
                return f"step {step}: saved {values['path']}"
            case "end":
                return end_block(step, values)
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
        return timedelta(seconds=round(min(steps_left * self.step_time, 1e9)))  # 31 years


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
    scores = f"acc {v['acc']:.4f}, acc_norm {v['acc_norm']:.4f}{plus_minus(v['acc_norm_stderr'])}"
    return f"step {step}: HellaSwag ({v['style']}): {scores}"


def end_block(step: int, v: dict[str, Any]) -> str:
    """Return the last lines of a run, for people and for scripts: a name, a colon, a value.

    The names are those of metrics.jsonl. Memory is in bytes.
    """
    form = {"val_loss": ".6f", "tokens_per_sec": ".0f", "mfu": ".4f"}
    form |= {f"{name}_seconds": ".1f" for name in ("train", "eval", "save", "compile", "startup")}
    names = [
        "why", "val_loss", "train_seconds", "eval_seconds", "save_seconds", "compile_seconds",
        "startup_seconds", "steps", "tokens_seen", "tokens_per_sec", "peak_memory", "mfu",
        "n_params",
    ]  # fmt: skip
    values = v | {"steps": step}
    shown = {name: values[name] for name in names if values[name] is not None}
    return "\n".join(f"{name}: {value:{form.get(name, '')}}" for name, value in shown.items())
