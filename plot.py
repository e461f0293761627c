"""
A run's numbers: writing them (metrics.jsonl, the console, dashboards) and drawing them.

    python plot.py log                                   # log/curves.png
    python plot.py log/a log/b --x hours --out ab.svg    # several runs in one picture
"""

import atexit
import contextlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tyro.conf import Positional

from shards import MANIFEST, atomic_write

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from train_gpt2 import GPT

METRICS = "metrics.jsonl"
BY_UPDATE = ("train", "skip", "stats")  # events whose step is an update's index, from 0

# -----------------------------------------------------------------------------
# writing: metrics.jsonl, the console and dashboards


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


def data_source(data_dir: Path) -> str | None:
    """Return where the tokens came from, as their manifest has it; None where there is none."""
    try:
        return json.loads((data_dir / MANIFEST).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


# -----------------------------------------------------------------------------
# is every layer learning? (train_gpt2.py --stats_every)


class LayerStats:
    """Watch one update, for the length of a `with` block, and see how it treats each layer.

    Layer 0 is the embeddings, layer i the block `transformer.h[i - 1]`. The hooks are on what is
    never compiled, and only there while an update is watched. Every rank holds the same gradients
    and weights, so one rank can watch alone. The copy of the weights is taken between backward
    and update, when no activations fill the memory.
    """

    def __init__(self, model: "GPT", optimizers: dict[str, "torch.optim.Optimizer"]):
        self.model, self.optimizers = model, list(optimizers.values())
        parts = model.transformer
        embeddings = [parts.wte.weight, parts.wpe.weight]
        self.layers = [embeddings, *(list(block.parameters()) for block in parts.h)]
        self.before: list[list[torch.Tensor]] = []
        self.residual: list[torch.Tensor] = []  # mean squares
        self.gradient: list[torch.Tensor] = []  # squared norms, clipped; the last: of all weights
        self.update: list[torch.Tensor] = []  # ratios

    def __enter__(self) -> "LayerStats":
        self.hooks = [
            self.model.transformer.drop.register_forward_hook(self._see_stream),
            self.optimizers[0].register_step_pre_hook(self._see_gradients),
            self.optimizers[-1].register_step_post_hook(self._see_update),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.before = []

    def values(self, grad_norm: float) -> dict[str, list[float]]:
        """Return the numbers by layer: `update_ratio`, `residual_rms` and `grad_norm`.

        `update_ratio` is the norm of the update over that of the weight, of all matrices of a layer
        together; `residual_rms` is taken behind the layer, over the first row of the step, without
        dropout; `grad_norm` is before clipping, for which the whole `grad_norm` must be given.
        """
        import torch

        gradient = torch.stack(self.gradient).double().sqrt()
        before_clipping = grad_norm / max(gradient[-1].item(), 1e-30)
        return {
            "update_ratio": torch.stack(self.update).tolist(),
            "residual_rms": torch.stack(self.residual).sqrt().tolist(),
            "grad_norm": (gradient[:-1] * before_clipping).tolist(),
        }

    def _see_stream(self, module: "torch.nn.Module", args: tuple, x: "torch.Tensor") -> None:
        """Send the first row through the blocks once more: their compiled code has no hooks."""
        import torch

        if self.residual or torch.is_grad_enabled() is False:
            return
        with torch.no_grad():
            self.model.eval()  # dropout would draw random numbers that belong to the run
            x = x[:1]
            self.residual.append(x.float().square().mean())
            for block in self.model.transformer.h:
                x = block.forward(x)  # not block(x), which is compiled
                self.residual.append(x.float().square().mean())
            self.model.train()

    def _see_gradients(self, *_: Any) -> None:
        import torch

        def squared(params: list) -> torch.Tensor:
            norms = [p.grad.norm() for p in params if p.grad is not None]
            return torch.stack(norms).square().sum()

        self.gradient = [squared(params) for params in self.layers]
        self.gradient.append(squared(list(self.model.parameters())))
        self.before = [
            [p.detach().clone() for p in params if p.dim() >= 2] for params in self.layers
        ]

    def _see_update(self, *_: Any) -> None:
        import torch

        for params, before in zip(self.layers, self.before, strict=True):
            matrices = [p.detach() for p in params if p.dim() >= 2]
            moved = torch.stack([(p - b).norm() for p, b in zip(matrices, before, strict=True)])
            size = torch.stack([b.norm() for b in before])
            self.update.append(moved.norm() / size.norm())
        self.before = []


# -----------------------------------------------------------------------------
# reading a run


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw the curves of one run, or of several in one picture; also while they are going on."""

    runs: Positional[tuple[Path, ...]]  # folders of runs, or their metrics.jsonl
    out: Path | None = None  # picture, .png or .svg; left out: curves.png in the first run's folder
    x: Literal["steps", "tokens", "hours"] = "steps"  # the horizontal axis

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run given: name a folder that holds metrics.jsonl")
        if self.out and self.out.suffix not in (".png", ".svg"):
            raise ValueError(f"{self.out}: give a name that ends in .png or .svg")


class Run:
    """What is readable of a run's metrics.jsonl: `about` it, its `events`, and what was `left_out`.

    Raises FileNotFoundError where there is no such file.
    """

    def __init__(self, path: Path):
        self.path = path / METRICS if path.is_dir() else path
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file: name a run's folder")
        self.about: dict[str, Any] = {}  # the last run event
        self.events: dict[str, list[dict]] = {}
        self.left_out: Counter[str] = Counter()
        hours, last_time = 0.0, None
        for line in self.path.read_text(errors="replace").splitlines():
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
            elif last_time is not None:  # the time between a stop and its resumption is not counted
                hours += max(0.0, now - last_time) / 3600
            last_time = now
            self.events.setdefault(event, []).append({**entry, "hours": hours})
        done = [(0, 0)]
        for entry in self.events.get("train", []):
            if is_number(entry.get("tokens_seen")):
                done.append((entry["step"] + 1, entry["tokens_seen"]))
        self.tokens_done = np.array(sorted(done)).T  # updates done, tokens seen by then

    def config(self, name: str) -> Any:
        config = self.about.get("config")
        return config.get(name) if isinstance(config, dict) else None

    def settings(self) -> dict[str, Any]:
        """Return what distinguishes a run, as decided when it started."""
        known: dict[str, Any] = {}
        for name in ("config", "model_config"):
            part = self.about.get(name)
            known.update(part if isinstance(part, dict) else {})
        for name in ("device", "world_size", "dtype", "compile", "micro_batch_size"):
            if name in self.about:
                known[name] = self.about[name]
        return {name: value for name, value in known.items() if name not in HOUSEKEEPING}

    def on_fineweb_edu(self) -> bool:
        """Say whether its data is FineWeb-Edu: by its source or, where that is not known, name."""
        source = self.about.get("data_source")
        if isinstance(source, str):
            return "HuggingFaceFW/fineweb-edu" in source
        return Path(str(self.config("data_dir"))).name == "edu_fineweb10B"

    def position(self, entry: dict, x: str) -> float:
        if x == "hours":
            return entry["hours"]
        if x == "steps":
            return entry["step"]
        return float(np.interp(entry["step"], *self.tokens_done))

    def series(self, event: str, name: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """Return where on the x-axis an event's values lie, and the values (n,) or (n, layers)."""
        places, values = [], []
        for entry in self.events.get(event, []):
            value = entry.get(name)
            numbers = value if isinstance(value, list) and event == "stats" else [value]
            fits = not values or np.shape(value) == np.shape(values[0])
            if fits and numbers and all(map(is_number, numbers)):
                places.append(self.position(entry, x))
                values.append(value)
            elif value is not None or name != "mfu":  # no MFU where the peak is not known
                self.left_out[f"{event} lines without a usable {name}"] += 1
        return np.array(places), np.array(values)


HOUSEKEEPING = {  # settings that make no difference to the numbers
    "out_dir", "resume", "checkpoint_every", "keep_checkpoints", "timeout_minutes", "max_skipped",
    "eval_every", "hellaswag_every", "sample_every", "stats_every", "tensorboard", "wandb",
}  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def labels(runs: list[Run]) -> list[str]:
    """Return a name for each run: its folder, and the settings in which the runs differ."""
    names = [run.path.parent.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path.parent) for run in runs]
    settings = [run.settings() for run in runs]
    recorded = [known for known in settings if known]  # a run may have just begun, or be damaged
    differ = [  # among what all recorded: an older run knows nothing of a newer setting
        key
        for key, value in (recorded[0] if recorded else {}).items()
        if all(key in known for known in recorded)
        and any(known[key] != value for known in recorded)
    ]
    said = [
        ", ".join(f"{key} {known[key]}" for key in differ if key in known) for known in settings
    ]
    return [f"{name}: {what}" if what else name for name, what in zip(names, said, strict=True)]


# -----------------------------------------------------------------------------
# drawing

# Okabe and Ito's colours, told apart with every kind of colour vision; line styles go on from there
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
GREY = "#555555"


@dataclass(frozen=True)
class Panel:
    """One small picture: which numbers of which event, and how."""

    title: str
    event: str
    name: str
    smooth: bool = False  # a thick line through thin raw ones
    log: bool = False  # a logarithmic axis
    marker: str = ""
    form: Callable[[float], str] = "{:g}".format  # of the numbers beside the axis


def short(number: float) -> str:
    """Return 524288 as 524k: three digits and a unit."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


PANELS = (
    Panel("training loss (nats a token)", "train", "loss", smooth=True, log=True),
    Panel("validation loss (nats a token)", "val", "loss", log=True, marker="o"),
    Panel("HellaSwag, completion style: acc_norm", "hellaswag", "acc_norm", marker="o"),
    Panel("gradient norm, before clipping", "train", "grad_norm", smooth=True, log=True),
    Panel("learning rate", "train", "lr"),
    Panel("batch size (tokens a step)", "train", "batch_tokens", form=short),
    Panel("tokens a second", "train", "tokens_per_sec", smooth=True, form=short),
    Panel("MFU", "train", "mfu", smooth=True, form="{:.0%}".format),
)
LAYER_PANELS = (
    Panel("update / weight size", "stats", "update_ratio", log=True),
    Panel("residual stream, RMS", "stats", "residual_rms", log=True),
    Panel("gradient norm by layer", "stats", "grad_norm", log=True),
)


def smoothed(y: np.ndarray) -> np.ndarray:
    """Return the centred mean over a twentieth of the points, of which the ends have half."""
    half = len(y) // 40
    sums = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def draw_series(ax: "Axes", panel: Panel, x: np.ndarray, y: np.ndarray, look: dict) -> None:
    if panel.smooth:
        # as pixels: in an SVG these would be most of the file
        ax.plot(x, y, **look, linewidth=0.5, alpha=0.35, rasterized=True)
        # of norms the geometric mean: one spike would stand for the whole window
        norms = panel.name == "grad_norm" and (y > 0).all()
        mean = np.exp(smoothed(np.log(y))) if norms else smoothed(y)
        ax.plot(x, mean, **look, linewidth=1.8)
    else:
        marker = panel.marker or ("o" if len(y) == 1 else "")
        ax.plot(x, y, **look, linewidth=1.6, marker=marker, markersize=3)


def draw_layers(ax: "Axes", x: np.ndarray, y: np.ndarray, look: dict, alone: bool) -> None:
    """Draw (n, layers): a line each for a run alone; else the median layer and the range."""
    if not alone:
        ax.plot(x, np.median(y, axis=1), **look, linewidth=1.6)
        ax.fill_between(x, y.min(axis=1), y.max(axis=1), color=look["color"], alpha=0.15, lw=0)
        return
    import matplotlib

    depth = matplotlib.colormaps["viridis"].resampled(256)
    last = y.shape[1] - 1
    for layer in range(y.shape[1]):
        # the named ones, and those between them only by their colour
        name = {0: "embeddings", 1: "block 1", last: f"block {last}"}.get(layer)
        colour = GREY if layer == 0 else depth(0.9 * (layer - 1) / max(1, last - 1))
        style = "--" if layer == 0 else "-"
        marker = "o" if len(x) == 1 else ""
        ax.plot(x, y[:, layer], style, color=colour, linewidth=1.2, label=name, marker=marker, ms=3)


def draw_line_at(ax: "Axes", height: float, text: str) -> None:
    """Draw a horizontal line for comparison, with its name on it."""
    from matplotlib.patheffects import withStroke

    ax.axhline(height, color=GREY, linewidth=0.9, linestyle=(0, (5, 3)))
    ax.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), xytext=(-3, 2),
        textcoords="offset points", ha="right", va="bottom", fontsize=7.5, color=GREY,
        path_effects=[withStroke(linewidth=2, foreground="white")],  # readable across a curve
    )  # fmt: skip


def draw_references(ax: "Axes", panel: Panel, runs: list[Run], x: str, looks: list[dict]) -> None:
    """Add what a panel's numbers are compared with, and the steps that were not applied."""
    if panel.name == "acc_norm":
        draw_line_at(ax, 0.2955, "GPT-2 124M: 0.2955")  # both from build-nanogpt's notebook
        draw_line_at(ax, 0.337, "GPT-3 124M: 0.337")
    elif panel.event == "val" and all(run.on_fineweb_edu() for run in runs if "val" in run.events):
        draw_line_at(ax, 3.2924, "GPT-2 124M: 3.2924")  # the same notebook; on this data only
    elif panel.event == "stats" and panel.name == "update_ratio":
        draw_line_at(ax, 1e-3, "usual aim: 0.001")
    elif panel.name == "grad_norm" and panel.event == "train":
        for clip in dict.fromkeys(run.config("grad_clip") for run in runs):
            if is_number(clip) and clip > 0:
                draw_line_at(ax, clip, f"clipped to {clip:g}")
        for run, look in zip(runs, looks, strict=True):
            if skipped := run.events.get("skip"):
                at = [run.position(entry, x) for entry in skipped]
                label = f"{len(at)} skipped step{'s' if len(at) > 1 else ''}"
                # on the upper edge: a skipped step has no norm that could be drawn
                ax.plot(
                    at, [0.97] * len(at), "x", color=look["color"], label=label, clip_on=False,
                    transform=ax.get_xaxis_transform(), markersize=6, markeredgewidth=1.8,
                )  # fmt: skip


def draw(runs: list[Run], x: str) -> tuple["Figure", list[str]]:
    """Return the picture of some runs, and the titles of the panels that nothing was there for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    looks = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        for i in range(len(runs))
    ]
    numbers = {
        panel: [run.series(panel.event, panel.name, x) for run in runs]
        for panel in PANELS + LAYER_PANELS
    }
    there = [panel for panel, series in numbers.items() if any(len(y) for _, y in series)]
    upper = [panel for panel in there if panel in PANELS]
    lower = [panel for panel in there if panel in LAYER_PANELS]
    n_rows = math.ceil(len(upper) / 2) + (len(lower) > 0)

    plt.rcParams.update({"font.size": 8.5, "axes.titlesize": 9.5, "svg.hashsalt": "plot"})
    names = [textwrap.fill(label, 130, subsequent_indent="    ") for label in labels(runs)]
    heading = 0.3 + 0.17 * sum(name.count("\n") + 1 for name in names)
    figure = plt.figure(figsize=(9, max(1, n_rows) * 2.1 + heading), layout="constrained")
    figure.legend(
        handles=[plt.Line2D([], [], **look, linewidth=2.5) for look in looks],
        labels=names, loc="outside upper left", frameon=False,
    )  # fmt: skip
    if not there:
        figure.text(0.5, 0.4, "no numbers yet", ha="center", color=GREY)
        return figure, [panel.title for panel in numbers]
    grid = figure.add_gridspec(n_rows, 6)
    for i, panel in enumerate(there):
        if panel in LAYER_PANELS:
            width = 6 // len(lower)
            first = lower.index(panel) * width
            place = grid[n_rows - 1, first : first + width]
        elif i == 0 and len(upper) % 2:
            place = grid[0, :]  # an odd number: the first has a row of its own
        else:
            row, column = divmod(i + len(upper) % 2, 2)
            place = grid[row, 3 * column : 3 * column + 3]
        ax = figure.add_subplot(place)
        for (places, values), look in zip(numbers[panel], looks, strict=True):
            if len(values) and panel in LAYER_PANELS:
                draw_layers(ax, places, values, look, alone=len(runs) == 1)
            elif len(values):
                draw_series(ax, panel, places, values, look)
        draw_references(ax, panel, runs, x, looks)
        if panel.log and all((y > 0).all() for _, y in numbers[panel]):
            ax.set_yscale("log")
            ax.yaxis.set_minor_formatter(NullFormatter())
            low, high = ax.get_ylim()
            if high < 30 * low:  # too few powers of ten to read a curve by
                ax.yaxis.set_major_locator(MaxNLocator(5))
                ax.yaxis.set_minor_locator(NullLocator())
        elif panel.event == "train":
            ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _, form=panel.form: form(y)))
        ax.set_title(panel.title, loc="left")
        ax.set_xlabel({"steps": "step", "hours": "hours of training"}.get(x, x), labelpad=1)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        named = ax.get_legend_handles_labels()
        if named[0] and panel in LAYER_PANELS:  # the same in all of them: once, below
            if panel == lower[0]:
                figure.legend(*named, loc="outside lower center", ncols=3, frameon=False)
        elif named[0]:
            ax.legend(frameon=False, fontsize=7.5, loc="best")
    return figure, [panel.title for panel in numbers if panel not in there]


def plot(config: PlotConfig) -> Path:
    """Draw what PlotConfig says, print what had to be left out, and return the picture's path.

    Raises FileNotFoundError where there is no such run.
    """
    runs = [Run(path) for path in config.runs]
    out = config.out or runs[0].path.parent / "curves.png"
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder: make it, or give another --out")
    figure, missing = draw(runs, config.x)
    kind = out.suffix[1:]
    with atomic_write(out) as file:
        figure.savefig(file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {})
    for run in runs:
        for what, count in run.left_out.items():
            print(f"{run.path}: left out: {count} {what}")
    if missing:
        print(f"no numbers for: {', '.join(missing)}")
    print(out)
    return out


def main() -> None:
    from fineweb import run_command

    run_command(PlotConfig, plot)


if __name__ == "__main__":
    main()
