"""A run's metrics.jsonl, read: to resume the run, and to say what is known of it."""

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
BY_UPDATE = ("train", "skip", "stats")  # events whose step is the index of an update, from 0


@dataclass
class Totals:
    """What the lines of a run add up to. Each step counts once, however often it was repeated.

    Seconds are of rank 0. Steps lost in a crash, which the resumed run did again, do not count.
    """

    train_seconds: float = 0.0  # the sum of dt: steps alone
    eval_seconds: float = 0.0  # validation, HellaSwag, samples
    save_seconds: float = 0.0  # checkpoints, and the export at the end
    compile_seconds: float = 0.0  # torch.compile, wherever it was needed
    startup_seconds: float = 0.0  # from the command to the first line, added up over restarts
    tokens: int = 0  # of the steps in train_seconds
    val_loss: float | None = None  # the newest one
    peak_memory: int = 0  # bytes, as earlier ends recorded it

    def add(self, entry: dict[str, Any]) -> None:
        """Add one line. What it lacks (an older version wrote it) counts as 0."""
        event, seconds = entry["event"], entry.get("seconds", 0)
        if event == "run":
            self.startup_seconds += entry.get("startup_seconds", 0)
        elif event in ("train", "skip"):
            self.train_seconds += entry.get("dt", 0)
            self.tokens += entry.get("batch_tokens", 0)
        elif event in ("val", "hellaswag", "sample"):
            self.eval_seconds += seconds
        elif event == "checkpoint":
            self.save_seconds += seconds
        elif event == "end":  # its other numbers are totals already
            self.save_seconds += seconds
            self.peak_memory = max(self.peak_memory, entry.get("peak_memory") or 0)
        if event == "val":
            self.val_loss = entry["loss"]
        if event != "end":
            self.compile_seconds += entry.get("compile_seconds", 0)


@dataclass
class Earlier:
    """The part of metrics.jsonl from before the step at which the run is resumed."""

    lines: list[str] = field(default_factory=list)
    events: set[tuple[str, int]] = field(default_factory=set)  # (event, step) of the lines
    best_loss: float = math.inf  # validation
    wandb_id: str | None = None
    ended_at: int | None = None  # the step of the last end that was no signal
    totals: Totals = field(default_factory=Totals)


def read_earlier(path: Path, step: int, branch: bool = False) -> Earlier:
    """Read the lines of metrics.jsonl that a run resumed at `step` keeps.

    Update `step` comes next, so lines about it and about later updates are dropped. Validation,
    sample and checkpoint of `step` come before that update, so they are kept. A `branch` takes the
    lines over from another run, whose end and dashboard are not its own.
    """
    earlier = Earlier()
    for line in read_lines(path):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a crash cut the line off
            entry = json.loads(line)
            if branch and entry["event"] == "end":
                continue
            if entry["step"] < step + (entry["event"] not in BY_UPDATE):
                earlier.lines.append(line + "\n")
                earlier.events.add((entry["event"], entry["step"]))
                earlier.wandb_id = None if branch else entry.get("wandb_id", earlier.wandb_id)
                if entry["event"] == "val":
                    earlier.best_loss = min(earlier.best_loss, entry["loss"])
                elif entry["event"] == "end" and entry["why"] != "signal":
                    earlier.ended_at = entry["step"]
                earlier.totals.add(entry)
    return earlier


def how_it_went(path: Path, step: int) -> tuple[float, bool]:
    """Return the best validation loss up to `step`, and whether the run's end there is recorded."""
    earlier = read_earlier(path, step)
    return earlier.best_loss, earlier.ended_at == step


def read_lines(path: Path) -> list[str]:
    """Return the lines of metrics.jsonl; none if there is no such file."""
    # the file is ASCII, unless a crash or a disk damaged it: such a line is no JSON
    return path.read_text("utf-8", "replace").splitlines() if path.is_file() else []


def run_facts(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Return what metrics.jsonl in a run's folder knows of the model after `step` updates.

    Of each fact it is the last value up to `step` (None: the newest): `step` (updates done),
    `val_loss`, `hellaswag_acc`, `hellaswag_acc_norm`, `hellaswag_n`, `hellaswag_style`,
    `data_source` and `git` (the commit). Facts that are not known are left out. Without
    metrics.jsonl, nothing is known.
    """
    facts: dict[str, Any] = {}
    for line in read_lines(folder / METRICS):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line is left out
            entry = json.loads(line)
            event, done = entry["event"], entry["step"] + (entry["event"] in BY_UPDATE)
            if step is not None and done > step:
                continue
            found = {"step": done}
            if event == "run":
                found |= {"data_source": entry.get("data_source"), "git": entry.get("git_hash")}
            elif event == "val":
                found |= {"val_loss": entry["loss"]}
            elif event == "hellaswag":
                names = ("acc", "acc_norm", "n", "style")
                found |= {f"hellaswag_{name}": entry.get(name) for name in names}
            facts |= {name: value for name, value in found.items() if value is not None}
    return facts
