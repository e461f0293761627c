"""
Read the numbers of a run from its metrics.jsonl and draw them:

    python plot.py log                                   # log/curves.png
    python plot.py log/a log/b --x hours --out ab.svg    # several runs in one picture
"""

import io
import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tyro.conf import Positional

from common.cli import advice, run_command
from common.files import write_atomically
from common.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# -----------------------------------------------------------------------------
# reading a run


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw the curves of one run, or of several in one picture. A run may still be in progress."""

    runs: Positional[tuple[Path, ...]]  # folders of runs, or their metrics.jsonl
    out: Path | None = None  # .png or .svg file (default: curves.png in the first run's folder)
    x: Literal["steps", "tokens", "hours"] = "steps"  # the horizontal axis

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run given: name a folder that holds metrics.jsonl")
        if self.out and self.out.suffix not in (".png", ".svg"):
            raise ValueError(f"{self.out}: give a name that ends in .png or .svg")


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

    def position(self, entry: dict, x: str) -> float:
        """Return where an event lies on the x-axis."""
        if x == "hours":
            return entry["hours"]
        if x == "steps":
            return entry["step"]
        return float(np.interp(entry["step"], *self.tokens_done))

    def series(self, event: str, name: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions (n,) and the values (n,) or (n, layers) of an event's `name`."""
        positions, values = [], []
        for entry in self.events.get(event, []):
            value = entry.get(name)
            numbers = value if isinstance(value, list) and event == "stats" else [value]
            fits = not values or np.shape(value) == np.shape(values[0])
            if fits and numbers and all(map(is_number, numbers)):
                positions.append(self.position(entry, x))
                values.append(value)
            elif value is not None or name != "mfu":  # MFU is None if the peak is not known
                self.left_out[f"{event} lines without a usable {name}"] += 1
        return np.array(positions), np.array(values)


HOUSEKEEPING = {  # settings that do not change the numbers
    "out_dir", "resume", "checkpoint_every", "keep_checkpoints", "timeout_minutes", "max_skipped",
    "eval_every", "hellaswag_every", "sample_every", "stats_every", "tensorboard", "wandb",
}  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def labels(runs: list[Run]) -> list[str]:
    """Return a label for each run: its folder, and the settings in which the runs differ."""
    names = [run.path.parent.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path.parent) for run in runs]
    settings = [run.settings() for run in runs]
    recorded = [known for known in settings if known]  # a new or a damaged run has no settings
    differ = [  # only settings that all runs have: an older version did not have every setting
        key
        for key, value in (recorded[0] if recorded else {}).items()
        if all(key in known for known in recorded)
        and any(known[key] != value for known in recorded)
    ]
    found = []
    for name, known in zip(names, settings, strict=True):
        differences = ", ".join(f"{key} {known[key]}" for key in differ if key in known)
        found.append(f"{name}: {differences}" if differences else name)
    return found


# -----------------------------------------------------------------------------
# panels

# Okabe and Ito's colours, which people with any kind of colour blindness can tell apart. After the
# last colour they start again with the next line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
GREY = "#555555"


@dataclass(frozen=True)
class Panel:
    """One diagram of the picture: the numbers that it shows, and how."""

    title: str
    event: str
    name: str
    smooth: bool = False  # a thick smoothed line over the thin raw one
    log: bool = False  # a logarithmic y-axis
    marker: str = ""
    form: Callable[[float], str] = "{:g}".format  # how the y-axis writes a number


def short(number: float) -> str:
    """Return a number with three digits and a unit: 524288 as 524k."""
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


# -----------------------------------------------------------------------------
# drawing into a panel


def smoothed(y: np.ndarray) -> np.ndarray:
    """Return the moving average over a twentieth of the points, at the ends over half of that."""
    half = len(y) // 40
    sums = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def draw_series(ax: "Axes", panel: Panel, x: np.ndarray, y: np.ndarray, look: dict) -> None:
    if panel.smooth:
        # as pixels: as vectors they would be most of an SVG file
        ax.plot(x, y, **look, linewidth=0.5, alpha=0.35, rasterized=True)
        # norms: the geometric mean, because one spike would dominate an arithmetic one
        norms = panel.name == "grad_norm" and (y > 0).all()
        mean = np.exp(smoothed(np.log(y))) if norms else smoothed(y)
        ax.plot(x, mean, **look, linewidth=1.8)
    else:
        marker = panel.marker or ("o" if len(y) == 1 else "")
        ax.plot(x, y, **look, linewidth=1.6, marker=marker, markersize=3)


def draw_layers(ax: "Axes", x: np.ndarray, y: np.ndarray, look: dict, alone: bool) -> None:
    """Draw values (n, layers) as the median layer and the range; for a run `alone`, every layer."""
    if not alone:
        ax.plot(x, np.median(y, axis=1), **look, linewidth=1.6)
        ax.fill_between(x, y.min(axis=1), y.max(axis=1), color=look["color"], alpha=0.15, lw=0)
        return
    import matplotlib

    depth = matplotlib.colormaps["viridis"].resampled(256)
    last = y.shape[1] - 1
    for layer in range(y.shape[1]):
        # the legend names only these: the colour shows where the others lie between them
        name = {0: "embeddings", 1: "block 1", last: f"block {last}"}.get(layer)
        colour = GREY if layer == 0 else depth(0.9 * (layer - 1) / max(1, last - 1))
        style = "--" if layer == 0 else "-"
        marker = "o" if len(x) == 1 else ""
        ax.plot(x, y[:, layer], style, color=colour, linewidth=1.2, label=name, marker=marker, ms=3)


def draw_line_at(ax: "Axes", height: float, text: str) -> None:
    """Draw a horizontal line to compare with, and its name above it."""
    from matplotlib.patheffects import withStroke

    ax.axhline(height, color=GREY, linewidth=0.9, linestyle=(0, (5, 3)))
    ax.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), xytext=(-3, 2),
        textcoords="offset points", ha="right", va="bottom", fontsize=7.5, color=GREY,
        path_effects=[withStroke(linewidth=2, foreground="white")],  # readable on top of a curve
    )  # fmt: skip


def draw_references(ax: "Axes", panel: Panel, runs: list[Run], x: str, looks: list[dict]) -> None:
    """Add the lines to compare a panel with, and the steps that were not applied.

    The published numbers are from build-nanogpt: the validation loss of GPT-2 and the accuracy of
    GPT-3 from its notebook play.ipynb, the accuracy of GPT-2 from a comment in its hellaswag.py
    (the notebook has 0.2945 for it).
    """
    if panel.name == "acc_norm":
        draw_line_at(ax, 0.2955, "GPT-2 124M: 0.2955")
        draw_line_at(ax, 0.337, "GPT-3 124M: 0.337")
    elif panel.event == "val" and all(run.on_fineweb_edu() for run in runs if "val" in run.events):
        draw_line_at(ax, 3.2924, "GPT-2 124M: 3.2924")  # true for this data only
    elif panel.event == "stats" and panel.name == "update_ratio":
        draw_line_at(ax, 1e-3, "usual aim: 0.001")
    elif panel.name == "grad_norm" and panel.event == "train":
        for clip in dict.fromkeys(run.config("grad_clip") for run in runs):
            if is_number(clip) and clip > 0:
                draw_line_at(ax, clip, f"clipped to {clip:g}")
        draw_skipped(ax, runs, x, looks)


def draw_skipped(ax: "Axes", runs: list[Run], x: str, looks: list[dict]) -> None:
    """Mark the skipped steps at the upper edge: they have no norm that could be drawn."""
    for run, look in zip(runs, looks, strict=True):
        if skipped := run.events.get("skip"):
            at = [run.position(entry, x) for entry in skipped]
            label = f"{len(at)} skipped step{'s' if len(at) > 1 else ''}"
            ax.plot(
                at, [0.97] * len(at), "x", color=look["color"], label=label, clip_on=False,
                transform=ax.get_xaxis_transform(), markersize=6, markeredgewidth=1.8,
            )  # fmt: skip


def format_axes(ax: "Axes", panel: Panel, x: str, positive: bool) -> None:
    """Set title, scales, numbers and grid of a panel. Only `positive` values can be logarithmic."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    if panel.log and positive:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
        low, high = ax.get_ylim()
        if high < 30 * low:  # one or two powers of ten are not enough to read a curve
            ax.yaxis.set_major_locator(MaxNLocator(5))
            ax.yaxis.set_minor_locator(NullLocator())
    elif panel.event == "train":
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.form(value)))
    ax.set_title(panel.title, loc="left")
    ax.set_xlabel({"steps": "step", "hours": "hours of training"}.get(x, x), labelpad=1)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


# -----------------------------------------------------------------------------
# the picture


def grid_cells(n_upper: int, n_lower: int) -> list[tuple[int, slice]]:
    """Return the row and the columns (of 6) of each panel.

    The upper panels are in pairs. If their number is odd, the first has a row for itself. The
    lower panels share the last row.
    """
    odd = n_upper % 2
    found = []
    for i in range(n_upper):
        row, half = divmod(i + odd, 2)
        found.append((row, slice(3 * half, 3 * half + 3)))
    if odd:
        found[0] = (0, slice(0, 6))
    for i in range(n_lower):
        width = 6 // n_lower
        found.append((math.ceil(n_upper / 2), slice(i * width, (i + 1) * width)))
    return found


def empty_picture(runs: list[Run], looks: list[dict], n_rows: int) -> "Figure":
    """Return a picture that holds only the legend of the runs."""
    from matplotlib import pyplot as plt

    names = [textwrap.fill(label, 130, subsequent_indent="    ") for label in labels(runs)]
    heading = 0.3 + 0.17 * sum(name.count("\n") + 1 for name in names)  # inches
    figure = plt.figure(figsize=(9, n_rows * 2.1 + heading), layout="constrained")
    figure.legend(
        handles=[plt.Line2D([], [], **look, linewidth=2.5) for look in looks],
        labels=names, loc="outside upper left", frameon=False,
    )  # fmt: skip
    return figure


def draw(runs: list[Run], x: str) -> tuple["Figure", list[str]]:
    """Return the picture of some runs, and the titles of the panels that have no numbers."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 8.5, "axes.titlesize": 9.5, "svg.hashsalt": "plot"})
    looks = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        for i in range(len(runs))
    ]
    numbers = {
        panel: [run.series(panel.event, panel.name, x) for run in runs]
        for panel in PANELS + LAYER_PANELS
    }
    shown = [panel for panel, series in numbers.items() if any(len(y) for _, y in series)]
    lower = [panel for panel in shown if panel in LAYER_PANELS]
    cells = grid_cells(len(shown) - len(lower), len(lower))
    n_rows = 1 + max((row for row, _ in cells), default=0)
    figure = empty_picture(runs, looks, n_rows)
    if not shown:
        figure.text(0.5, 0.4, "no numbers yet", ha="center", color=GREY)
    grid = figure.add_gridspec(n_rows, 6)
    for panel, (row, columns) in zip(shown, cells, strict=True):
        ax = figure.add_subplot(grid[row, columns])
        for (positions, values), look in zip(numbers[panel], looks, strict=True):
            if len(values) and panel in lower:
                draw_layers(ax, positions, values, look, alone=len(runs) == 1)
            elif len(values):
                draw_series(ax, panel, positions, values, look)
        draw_references(ax, panel, runs, x, looks)
        format_axes(ax, panel, x, positive=all((y > 0).all() for _, y in numbers[panel]))
        handles, names = ax.get_legend_handles_labels()
        if handles and panel not in lower:
            ax.legend(frameon=False, fontsize=7.5, loc="best")
        elif handles and panel == lower[0]:  # all lower panels have the same: once, below them
            figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure, [panel.title for panel in numbers if panel not in shown]


def plot(config: PlotConfig) -> Path:
    """Draw the runs into a file, print what was left out, and return the path of the picture.

    Raises FileNotFoundError if a run or the picture's folder does not exist.
    """
    runs = [Run(path) for path in config.runs]
    out = config.out or runs[0].path.parent / "curves.png"
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder: make it, or give another --out")
    figure, missing = draw(runs, config.x)
    kind = out.suffix[1:]
    picture = io.BytesIO()
    no_date = {"Date": None} if kind == "svg" else {}
    figure.savefig(picture, format=kind, dpi=200, metadata=no_date)
    with advice("make room, or give another --out"):
        write_atomically(out, picture.getvalue())
    for run in runs:
        for what, count in run.left_out.items():
            print(f"{run.path}: left out: {count} {what}")
    if missing:
        print(f"no numbers for: {', '.join(missing)}")
    print(out)
    return out


def main() -> None:
    run_command(PlotConfig, plot)


if __name__ == "__main__":
    main()
