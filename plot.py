"""
A run's numbers: writing metrics.jsonl and the console, and drawing curves.
"""

import contextlib
import json
import platform
import subprocess
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards import atomic_write


def software() -> dict[str, Any]:
    """Return the versions that a run depends on, and the commit of this checkout."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        commit = None
    packages = {name: version(name) for name in ("torch", "numpy", "tiktoken")}
    return {"git_hash": commit, "versions": {"python": platform.python_version(), **packages}}


class RunLog:
    """The one place where a run's numbers are written: metrics.jsonl and the console.

    On ranks other than the first (`is_main` False) it writes nothing.
    """

    def __init__(self, out_dir: Path, step: int, is_main: bool):
        """Open for appending, less the lines that a run resumed at `step` will write again."""
        self.kept: set[tuple[str, int]] = set()  # (event, step) of the lines before
        self.seconds = 0.0  # a step, smoothed
        self.budget = 0  # tokens of the run
        self.file = None
        if not is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / "metrics.jsonl"
        lines = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut off by a crash
                entry = json.loads(line)
                if entry["step"] < step + (entry["event"] not in ("train", "skip")):
                    lines.append(line + "\n")
                    self.kept.add((entry["event"], entry["step"]))
        with atomic_write(path) as file:
            file.write("".join(lines).encode())
        self.file = open(path, "a")  # noqa: SIM115 - as long as the run

    def write(self, event: str, step: int, **values: Any) -> None:
        """Record one event; `values` must be fit for JSON."""
        if self.file is None:
            return
        if event == "run":
            values = {**values, **software()}
        entry = {"event": event, "step": step, "time": time.time(), **values}
        print(json.dumps(entry), file=self.file, flush=True)
        print(self._console_line(event, step, values), flush=True)

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
                steps_left = (self.budget - v["tokens_seen"]) / v["batch_tokens"]
                mfu = f", mfu {v['mfu']:.1%}" if v["mfu"] else ""
                wait = v["data_wait"] / v["dt"]
                waited = f", waited {wait:.0%} for data" if wait > 0.01 else ""
                return (
                    f"step {step}: loss {v['loss']:.4f}, lr {v['lr']:.2e}, "
                    f"norm {v['grad_norm']:.3f}, {v['dt'] * 1e3:.0f} ms, "
                    f"{v['tokens_per_sec']:,.0f} tokens/s{mfu}{waited}, "
                    f"{timedelta(seconds=round(steps_left * self.seconds))} left"
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
        raise AssertionError(f"no such event: {event}")
