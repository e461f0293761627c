"""A run's metrics.jsonl, read: to resume it, to say what is known of it, and for its curves."""

import contextlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.significance import standard_error

METRICS = "metrics.jsonl"
DAMAGE = (ValueError, KeyError, TypeError, RecursionError, OverflowError)  # in a line
BY_UPDATE = ("train", "skip", "stats")  # events whose step is the index of an update, from 0

# -----------------------------------------------------------------------------
# resuming, adding up, facts


@dataclass
class Totals:
    """What the lines of a run add up to. Each step counts once, however often it was repeated.

    Seconds are of rank 0. Steps lost in a crash, which the resumed run did again, do not count.
    """

    train_seconds: float = 0.0  # the sum of dt: steps alone
    eval_seconds: float = 0.0  # validation, HellaSwag, samples
    save_seconds: float = 0.0  # checkpoints, and the export at the end
    compile_seconds: float = 0.0  # torch.compile, wherever it was needed
    startup_seconds: float = 0.0  # from the settings to the first line, added up over restarts
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
            self.val_loss = math.nan if entry["loss"] is None else entry["loss"]
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
        with contextlib.suppress(*DAMAGE):  # a crash cut the line off
            entry = json.loads(line)
            if branch and entry["event"] == "end":
                continue
            if entry["step"] < step + (entry["event"] not in BY_UPDATE):
                earlier.lines.append(line + "\n")
                earlier.events.add((entry["event"], entry["step"]))
                earlier.wandb_id = None if branch else entry.get("wandb_id", earlier.wandb_id)
                if entry["event"] == "val" and entry["loss"] is not None:  # it was a number
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
        with contextlib.suppress(*DAMAGE):  # such a line is left out
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
            if event == "val" and entry["loss"] is None:  # it was no number: no older one counts
                facts.pop("val_loss", None)
            words = ("data_source", "git", "hellaswag_style")
            facts |= {
                name: value
                for name, value in found.items()
                if (isinstance(value, str) if name in words else is_number(value))
            }
    return facts


# -----------------------------------------------------------------------------
# curves

HOUSEKEEPING = {  # settings that do not change the numbers
    "out_dir", "resume", "checkpoint_every", "keep_checkpoints", "timeout_minutes", "max_skipped",
    "eval_every", "hellaswag_every", "sample_every", "stats_every", "tensorboard", "wandb",
    "target_loss", "profile_step",
}  # fmt: skip


def is_number(value: Any) -> bool:
    # not by math.isfinite, which an integer of 400 digits, from a damaged line, stops
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def settings_of(about: dict[str, Any]) -> dict[str, Any]:
    """Return what a run event says of all that can change the numbers: settings, data, code."""
    known: dict[str, Any] = {}
    for name in ("config", "model_config"):
        part = about.get(name)
        known.update(part if isinstance(part, dict) else {})
    for name in ("device", "world_size", "dtype", "compile", "micro_batch_size", "data"):
        if name in about:
            known[name] = about[name]
    if isinstance(commit := about.get("git_hash"), str):
        known["commit"] = commit[:10] + "-dirty" * commit.endswith("-dirty")
    return {name: value for name, value in known.items() if name not in HOUSEKEEPING}


@dataclass(frozen=True)
class Crossing:
    """What a run had used when its validation curve reached a loss."""

    tokens: float
    steps: float
    seconds: float | None  # of training; None: the file lacks the time of a step


class Curves:
    """The numbers in a run's metrics.jsonl.

    `about` is the run event, `events` holds all events by name, and `left_out` counts what could
    not be used. Raises FileNotFoundError if there is no such file.
    """

    def __init__(self, path: Path):
        self.path = path / METRICS if path.is_dir() else path
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file: name a run's folder")
        self.about: dict[str, Any] = {}  # of several run events, the last one counts
        self.events: dict[str, list[dict]] = {}
        self.left_out: Counter[str] = Counter()
        hours, last_time = 0.0, None
        for line in read_lines(self.path):
            try:
                entry = json.loads(line)
                event, step, now = entry["event"], entry["step"], entry["time"]
            except DAMAGE:
                self.left_out["lines that could not be read"] += 1
                continue
            if not (isinstance(event, str) and is_number(step) and is_number(now)):
                self.left_out["lines that could not be read"] += 1
                continue
            if event == "run":
                self.about.update(entry)
            elif last_time is not None:  # a run event ends a pause, which does not count
                hours += max(0.0, now - last_time) / 3600
            last_time = now
            self.events.setdefault(event, []).append({**entry, "hours": hours})
        done = [(0, 0)]
        for entry in self.events.get("train", []):
            if is_number(entry.get("tokens_seen")):
                done.append((entry["step"] + 1, float(entry["tokens_seen"])))
        self.tokens_done = np.array(sorted(done)).T  # two rows: updates done, tokens seen so far

    def config(self, name: str) -> Any:
        config = self.about.get("config")
        return config.get(name) if isinstance(config, dict) else None

    def settings(self) -> dict[str, Any]:
        """Return the settings that can change a run's numbers, as its last start recorded them.

        A branch has those of its trunk too, where they differ. The path of its checkpoint, which is
        another one for each seed, becomes the step at which it branched off. A budget, a validation
        set or a commit that changed on the way is there with the step up to which it held.
        """
        known, starts = settings_of(self.about), []
        for run in self.events.get("run", []):  # a start from which no step is left does not count
            starts = [start for start in starts if start[0] < run["step"]]
            starts.append((run["step"], settings_of(run)))
        branch = known.get("branch_from")
        own = [start for start in starts if not branch or start[1].get("branch_from") == branch]
        of_trunk = [start for start in starts if start not in own]
        for prefix, part in ("", own), ("trunk's ", of_trunk):
            for (_, before), (step, after) in pairwise(part):
                for name in ("max_steps", "val_tokens", "commit"):
                    if before.get(name) != after.get(name):
                        known[f"{prefix}{name} until step {step:g}"] = before.get(name)
        if of_trunk and own and own[-1] is starts[-1]:  # the last start is of the branch
            known["branch_from"] = f"step {own[0][0]:g}"
            trunk = {name: v for name, v in of_trunk[-1][1].items() if v != known.get(name)}
            known |= {f"trunk's {name}": trunk[name] for name in trunk.keys() - {"seed"}}
        return known

    def on_fineweb_edu(self) -> bool:
        """Return whether the data is FineWeb-Edu, by its source or else by its folder's name."""
        source = self.about.get("data_source")
        if isinstance(source, str):
            return "HuggingFaceFW/fineweb-edu" in source
        return Path(str(self.config("data_dir"))).name == "edu_fineweb10B"

    def tokens_at(self, step: float) -> float:
        """Return the tokens seen in the first `step` updates."""
        return float(np.interp(step, *self.tokens_done))

    def seconds_at(self, step: float) -> float | None:
        """Return the training seconds of the first `step` updates; None if one has no time."""
        updates = self.events.get("train", []) + self.events.get("skip", [])
        times = {entry["step"]: entry.get("dt") for entry in updates if entry["step"] < step}
        # old files have no time for skipped steps, and damaged ones lack lines
        whole = len(times) == step and all(map(is_number, times.values()))
        return math.fsum(times.values()) if whole else None

    def position(self, entry: dict, x: str) -> float:
        """Return where an event lies on the x-axis."""
        if x == "hours":
            return entry["hours"]
        return entry["step"] if x == "steps" else self.tokens_at(entry["step"])

    def series(self, event: str, name: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions (n,) and the values (n,) or (n, layers) of an event's `name`."""
        positions, values, unusable = [], [], 0
        for entry in self.events.get(event, []):
            value = entry.get(name)
            numbers = value if isinstance(value, list) and event == "stats" else [value]
            usable = bool(numbers) and all(map(is_number, numbers))
            if usable and (not values or np.shape(value) == np.shape(values[0])):
                positions.append(self.position(entry, x))
                values.append(value)
            elif value is not None or name != "mfu":  # MFU is None if the peak is not known
                unusable += 1
        if unusable:
            self.left_out[f"{event} lines without a usable {name}"] = unusable
        return np.array(positions), np.array(values)

    def validation_losses(self) -> dict[float, float]:
        """Return the validation losses by the number of updates done, in order."""
        steps, losses = self.series("val", "loss", "steps")
        return dict(sorted(zip(steps.tolist(), losses.tolist(), strict=True)))

    def accuracy_errors(self, x: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions (n,) and the standard errors (n,) of HellaSwag's acc_norm."""
        positions, errors = [], []
        for entry in self.events.get("hellaswag", []):
            accuracy, n = entry.get("acc_norm"), entry.get("n")
            if is_number(accuracy) and is_number(n):
                positions.append(self.position(entry, x))
                errors.append(standard_error(accuracy, n))
        return np.array(positions), np.array(errors)

    def crossing(self, target: float) -> Crossing | None:
        """Return where the straight lines between validations first reach `target`; None: nowhere.

        It is the first validation if its loss is already low enough.
        """
        curve = list(self.validation_losses().items())
        for (step, loss), (before, high) in zip(curve, curve[:1] + curve, strict=False):
            if loss <= target:
                part = (high - target) / (high - loss) if high > loss else 1.0
                return Crossing(
                    between(self.tokens_at(before), self.tokens_at(step), part),
                    between(before, step, part),
                    between(self.seconds_at(before), self.seconds_at(step), part),
                )
        return None


def between(a: float | None, b: float | None, part: float) -> float | None:
    """Return the value at `part` of the way from a to b; None if one of them is not known."""
    return None if a is None or b is None else float(a + part * (b - a))
