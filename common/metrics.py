"""Read a run's metrics.jsonl back: its settings, its curves, and what it needed to reach a loss."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.runlog import METRICS
from common.significance import standard_error

HOUSEKEEPING = {  # settings that do not change the numbers
    "out_dir", "resume", "checkpoint_every", "keep_checkpoints", "timeout_minutes", "max_skipped",
    "eval_every", "hellaswag_every", "sample_every", "stats_every", "tensorboard", "wandb",
    "target_loss", "profile_step",
}  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Crossing:
    """What a run had used when its validation curve reached a loss."""

    tokens: float
    steps: float
    seconds: float | None  # of training; None: the file lacks the time of a step


class Run:
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
        for line in self.path.read_text("utf-8", "replace").splitlines():
            try:
                entry = json.loads(line)
                event, step, now = entry["event"], entry["step"], entry["time"]
            except (ValueError, KeyError, TypeError, RecursionError):
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
                done.append((entry["step"] + 1, entry["tokens_seen"]))
        self.tokens_done = np.array(sorted(done)).T  # two rows: updates done, tokens seen so far

    def config(self, name: str) -> Any:
        config = self.about.get("config")
        return config.get(name) if isinstance(config, dict) else None

    def settings(self) -> dict[str, Any]:
        """Return the settings that can change a run's numbers, as its last start recorded them."""
        known: dict[str, Any] = {}
        for name in ("config", "model_config"):
            part = self.about.get(name)
            known.update(part if isinstance(part, dict) else {})
        for name in ("device", "world_size", "dtype", "compile", "micro_batch_size"):
            if name in self.about:
                known[name] = self.about[name]
        return {name: value for name, value in known.items() if name not in HOUSEKEEPING}

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
            fits = not values or np.shape(value) == np.shape(values[0])
            if fits and numbers and all(map(is_number, numbers)):
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
