"""
Read the numbers of a run from its metrics.jsonl and draw them:

    python plot.py log                                   # log/curves.png
    python plot.py log/a log/b --x hours --out ab.svg    # several runs in one picture
    python plot.py log/a* --target_loss 3.28             # and what each needed to reach that loss

Runs that differ only in their seed become one curve: their mean, in a band from the lowest to the
highest seed.
"""

import io
import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tyro.conf import Positional

from common.cli import advice, run_command
from common.compare import Group, aligned, grouped, seed_lines, target_lines, target_of
from common.files import write_atomically
from common.metrics import Curves, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# -----------------------------------------------------------------------------
# what to draw


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw the curves of one run, or of several in one picture. A run may still be in progress."""

    runs: Positional[tuple[Path, ...]]  # folders of runs, or their metrics.jsonl
    out: Path | None = None  # .png or .svg file (curves.png in the first run's folder)
    x: Literal["steps", "tokens", "hours"] = "steps"  # the horizontal axis
    target_loss: float | None = None  # print when a run reached it (the run's own)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run given: name a folder that holds metrics.jsonl")
        if self.out and self.out.suffix not in (".png", ".svg"):
            raise ValueError(f"{self.out}: give a name that ends in .png or .svg")
        if self.target_loss is not None and not 0 < self.target_loss < math.inf:
            raise ValueError(f"target_loss {self.target_loss}: give a number above 0")


def labels(groups: list[Group]) -> list[str]:
    """Return a label for each curve: its name, what settings differ, its seeds' spread."""
    settings = [group.runs[0].settings() for group in groups]
    for known, group in zip(settings, groups, strict=True):
        if len(group.runs) > 1:
            known.pop("seed", None)
    recorded = [known for known in settings if known]  # a new or a damaged run has no settings
    differ = [  # only settings that all runs have: an older version did not have every setting
        key
        for key, value in (recorded[0] if recorded else {}).items()
        if all(key in known for known in recorded)
        and any(known[key] != value for known in recorded)
    ]
    found = []
    for group, known in zip(groups, settings, strict=True):
        differences = ", ".join(f"{key} {known[key]}" for key in differ if key in known)
        label = f"{group.name}: {differences}" if differences else group.name
        # a name that is no text (not UTF-8), or that matplotlib would take for mathematics
        label = "".join(c if c.isprintable() else "?" for c in label).replace("$", r"\$")
        found.append(f"{label}\n    {group.spread()}" if len(group.runs) > 1 else label)
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
    Panel(
        "HellaSwag, completion style: acc_norm ± its standard error",
        "hellaswag",
        "acc_norm",
        marker="o",
    ),
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
    """Draw values (seeds, n): one seed as it is, several as their mean and their range."""
    marker = panel.marker or ("o" if len(x) == 1 else "")
    if panel.smooth:
        if len(y) == 1:
            # as pixels: as vectors they would be most of an SVG file
            ax.plot(x, y[0], **look, linewidth=0.5, alpha=0.35, rasterized=True)
        # norms: the geometric mean, because one spike would dominate an arithmetic one
        norms = panel.name == "grad_norm" and (y > 0).all()
        y = np.stack([np.exp(smoothed(np.log(row))) if norms else smoothed(row) for row in y])
        marker = ""
    width = 1.8 if panel.smooth else 1.6
    ax.plot(x, y.mean(axis=0), **look, linewidth=width, marker=marker, markersize=3)
    if len(y) > 1:
        # the range: it holds every seed, needs no assumption and cannot fall below zero
        ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=look["color"], alpha=0.2, lw=0)


def draw_errors(
    ax: "Axes", group: Group, axis: str, x: np.ndarray, y: np.ndarray, look: dict
) -> None:
    """Add one standard error above and below the mean of HellaSwag accuracies (seeds, n).

    It is the error of one run: all seeds answer the same questions, so more seeds do not lower it.
    """
    errors = [run.accuracy_errors(axis) for run in group.runs]
    there = [np.interp(x, at, error) for at, error in errors if len(at)]
    if there:
        ax.errorbar(
            x, y.mean(axis=0), yerr=np.mean(there, axis=0), fmt="none", ecolor=look["color"],
            elinewidth=1.0, capsize=2.5, alpha=0.7,
        )  # fmt: skip


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


def draw_line_at(ax: "Axes", height: float, text: str, end: str = "right") -> None:
    """Draw a horizontal line to compare with, and its name: above it at the right end, or below it
    at the left one, where a loss that falls comes last.
    """
    from matplotlib.patheffects import withStroke

    ax.axhline(height, color=GREY, linewidth=0.9, linestyle=(0, (5, 3)))
    ax.annotate(
        text, (float(end == "right"), height), xycoords=("axes fraction", "data"),
        xytext=(-3, 2) if end == "right" else (3, -2), textcoords="offset points", ha=end,
        va="bottom" if end == "right" else "top",
        fontsize=7.5, color=GREY,
        path_effects=[withStroke(linewidth=2, foreground="white")],  # readable on top of a curve
    )  # fmt: skip


def draw_references(ax: "Axes", panel: Panel, runs: list[Curves], target: float | None) -> None:
    """Add the lines to compare a panel with.

    The published numbers are from build-nanogpt: the validation loss of GPT-2 and the accuracy of
    GPT-3 from its notebook play.ipynb, the accuracy of GPT-2 from a comment in its hellaswag.py
    (the notebook has 0.2945 for it).
    """
    if panel.name == "acc_norm":
        draw_line_at(ax, 0.2955, "GPT-2 124M: 0.2955")
        draw_line_at(ax, 0.337, "GPT-3 124M: 0.337")
        ax.margins(y=0.15)  # room for the name of the upper line, below the title
    elif panel.event == "val":
        if all(run.on_fineweb_edu() for run in runs if "val" in run.events):
            draw_line_at(ax, 3.2924, "GPT-2 124M: 3.2924")  # true for this data only
        for loss in dict.fromkeys(target_of(run, target) for run in runs):
            if loss is not None:
                draw_line_at(ax, loss, f"target: {loss:g}", end="left")
    elif panel.event == "stats" and panel.name == "update_ratio":
        draw_line_at(ax, 1e-3, "usual aim: 0.001")
    elif panel.name == "grad_norm" and panel.event == "train":
        for clip in dict.fromkeys(run.config("grad_clip") for run in runs):
            if is_number(clip) and clip > 0:
                draw_line_at(ax, clip, f"clipped to {clip:g}")


def draw_skipped(ax: "Axes", groups: list[Group], x: str, looks: list[dict]) -> None:
    """Mark the skipped steps at the upper edge: they have no norm that could be drawn."""
    for group, look in zip(groups, looks, strict=True):
        at = [run.position(e, x) for run in group.runs for e in run.events.get("skip", [])]
        if at:
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


def empty_picture(groups: list[Group], looks: list[dict], n_rows: int) -> "Figure":
    """Return a picture that holds only the legend of the runs."""
    # not by pyplot, which would keep every picture in memory
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [
        "\n".join(textwrap.fill(line, 130, subsequent_indent="    ") for line in label.split("\n"))
        for label in labels(groups)
    ]
    seeds = any(len(group.runs) > 1 for group in groups)
    title = "of several seeds: the mean, and a band from the lowest to the highest"
    heading = 0.3 + 0.17 * (sum(name.count("\n") + 1 for name in names) + seeds)  # inches
    figure = Figure(figsize=(9, n_rows * 2.1 + heading), layout="constrained")
    figure.legend(
        handles=[Line2D([], [], **look, linewidth=2.5) for look in looks],
        labels=names, loc="outside upper left", frameon=False, alignment="left",
        title=title if seeds else None,
    )  # fmt: skip
    return figure


def curve(group: Group, panel: Panel, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions (n,) and the values (seeds, n) or (seeds, n, layers) of a panel."""
    series = [run.series(panel.event, panel.name, x) for run in group.runs]
    return aligned([(at, y) for at, y in series if len(y)])


def draw(runs: list[Curves], x: str, target: float | None = None) -> tuple["Figure", list[str]]:
    """Return the picture of some runs, and the titles of the panels that have no numbers."""
    os.environ["MPLBACKEND"] = "Agg"  # it draws files; a wrong one would be an error
    import matplotlib

    matplotlib.rcParams.update({"font.size": 8.5, "axes.titlesize": 9.5, "svg.hashsalt": "plot"})
    groups = grouped(runs)
    looks = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        for i in range(len(groups))
    ]
    numbers = {
        panel: [curve(group, panel, x) for group in groups] for panel in PANELS + LAYER_PANELS
    }
    shown = [panel for panel, curves in numbers.items() if any(len(at) for at, _ in curves)]
    lower = [panel for panel in shown if panel in LAYER_PANELS]
    cells = grid_cells(len(shown) - len(lower), len(lower))
    n_rows = 1 + max((row for row, _ in cells), default=0)
    figure = empty_picture(groups, looks, n_rows)
    if not shown:
        figure.text(0.5, 0.4, "no numbers yet", ha="center", color=GREY)
    grid = figure.add_gridspec(n_rows, 6)
    for panel, (row, columns) in zip(shown, cells, strict=True):
        ax = figure.add_subplot(grid[row, columns])
        for group, (at, values), look in zip(groups, numbers[panel], looks, strict=True):
            if len(at) and panel in lower:
                draw_layers(ax, at, values.mean(axis=0), look, alone=len(groups) == 1)
            elif len(at):
                draw_series(ax, panel, at, values, look)
                if panel.event == "hellaswag":
                    draw_errors(ax, group, x, at, values, look)
        draw_references(ax, panel, runs, target)
        if panel.name == "grad_norm" and panel.event == "train":
            draw_skipped(ax, groups, x, looks)
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
    runs = [Curves(path) for path in config.runs]
    out = config.out or runs[0].path.parent / "curves.png"
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder: make it, or give another --out")
    figure, missing = draw(runs, config.x, config.target_loss)
    kind = out.suffix[1:]
    picture = io.BytesIO()
    no_date = {"Date": None} if kind == "svg" else {}
    figure.savefig(picture, format=kind, dpi=200, metadata=no_date)
    with advice("make room, or give another --out"):
        write_atomically(out, picture.getvalue())
    for run in runs:
        for what, count in run.left_out.items():
            print(f"{run.path}: left out: {count} {what}")
    groups = grouped(runs)
    lines = [line for group in groups for line in target_lines(group, config.target_loss)]
    for line in (*seed_lines(groups), *lines):
        print(line)
    if missing:
        print(f"no numbers for: {', '.join(missing)}")
    print(out)
    return out


def main() -> None:
    run_command(PlotConfig, plot)


if __name__ == "__main__":
    main()
