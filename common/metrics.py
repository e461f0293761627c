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
class Earlier:
    """The part of metrics.jsonl from before the step at which the run is resumed."""

    lines: list[str] = field(default_factory=list)
    events: set[tuple[str, int]] = field(default_factory=set)  # (event, step) of the lines
    best_loss: float = math.inf  # validation
    wandb_id: str | None = None


def read_earlier(path: Path, step: int) -> Earlier:
    """Read the lines of metrics.jsonl that a run resumed at `step` keeps.

    Update `step` comes next, so lines about it and about later updates are dropped. Validation,
    sample and checkpoint of `step` come before that update, so they are kept.
    """
    earlier = Earlier()
    for line in read_lines(path):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a crash cut the line off
            entry = json.loads(line)
            if entry["step"] < step + (entry["event"] not in BY_UPDATE):
                earlier.lines.append(line + "\n")
                earlier.events.add((entry["event"], entry["step"]))
                earlier.wandb_id = entry.get("wandb_id", earlier.wandb_id)
                if entry["event"] == "val":
                    earlier.best_loss = min(earlier.best_loss, entry["loss"])
    return earlier


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
