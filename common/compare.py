"""Compare runs: seeds as one group, their spread, Welch's test, what it took to reach a loss."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from common.metrics import Crossing, Curves, is_number
from common.significance import Summary, Welch, summary, welch

# -----------------------------------------------------------------------------
# runs that differ only in their seed


@dataclass(frozen=True)
class Group:
    """A run, or runs that differ only in their seed."""

    runs: list[Curves]
    names: list[str]  # of the runs: their folders

    @property
    def name(self) -> str:
        others = len(self.runs) - 1
        more = {0: "", 1: " and 1 more seed"}.get(others, f" and {others} more seeds")
        return self.names[0] + more

    def last_losses(self) -> tuple[float | None, list[float]]:
        """Return the last validation step that all runs have, and the loss of each run there.

        The last loss of each run would be unfair to one that is still in progress. Runs without a
        validation do not count. If there is no such step, it is None.
        """
        curves = [curve for run in self.runs if (curve := run.validation_losses())]
        step = max(set.intersection(*map(set, curves)), default=None) if curves else None
        return step, [] if step is None else [curve[step] for curve in curves]

    def spread(self) -> str:
        """Return in words how the seeds spread in their last common validation loss."""
        step, losses = self.last_losses()
        if step is None:
            return "no validation loss at a common step"
        found = summary(losses)
        text = f"n = {found.n}, validation loss at step {step:g}: mean {found.mean:.4f}"
        if found.n > 1:
            text += f", standard deviation {found.sd:.4f}, 95% interval {interval(found, '.4f')}"
        return text

    def gaps(self) -> list[str]:
        """Return in words which runs have more or less than what the group is compared by."""
        step, _ = self.last_losses()
        notes = []
        for run, name in zip(self.runs, self.names, strict=True):
            if step is not None and max(run.validation_losses(), default=0) > step:
                notes.append(f"{name} went on after step {step:g}, the last that all have")
            for event in ("train", "val", "hellaswag", "stats"):
                if event not in run.events and any(event in other.events for other in self.runs):
                    notes.append(f"{name} has no {event} lines and is left out there")
        return notes


def interval(found: Summary | Welch, form: str) -> str:
    if math.isnan(found.low):  # of a single number
        return "unknown"
    return f"{found.low:{form}} to {found.high:{form}}"


def differ_only_in_seed(a: Curves, b: Curves) -> bool:
    # a setting of None was not given: an older version, which did not have it, recorded nothing
    one, two = (
        {name: value for name, value in run.settings().items() if value is not None}
        for run in (a, b)
    )
    seeds = one.pop("seed", None), two.pop("seed", None)
    return None not in seeds and seeds[0] != seeds[1] and one == two


def grouped(runs: list[Curves]) -> list[Group]:
    """Return the runs, those that differ only in their seed together, in order of the first one.

    The same seed again is a group of its own: it would not be an independent sample.
    """
    names = [run.path.parent.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path.parent) for run in runs]
    groups: list[Group] = []
    for run, name in zip(runs, names, strict=True):
        for group in groups:
            if all(differ_only_in_seed(run, member) for member in group.runs):
                group.runs.append(run)
                group.names.append(name)
                break
        else:
            groups.append(Group([run], [name]))
    return groups


def aligned(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return common positions (n,) and the values of each curve there (curves, n, ...).

    They cover only what all curves cover. The positions are those of the curve with the fewest
    points, because the others need the least interpolation there. A curve of another number of
    layers than the first is damaged, and left out.
    """
    curves = [(x, y) for x, y in curves if y.shape[1:] == curves[0][1].shape[1:]]
    if len(curves) == 1:
        return curves[0][0], curves[0][1][None]
    low = max((x.min() for x, _ in curves), default=0)
    high = min((x.max() for x, _ in curves), default=-1)
    if low > high:
        return np.array([]), np.array([])
    common = np.unique(np.clip(min((x for x, _ in curves), key=len), low, high))
    values = []
    for x, y in curves:
        order = np.argsort(x, kind="stable")
        columns = y[order].reshape(len(y), -1).T
        there = np.stack([np.interp(common, x[order], column) for column in columns], axis=-1)
        values.append(there.reshape(len(common), *y.shape[1:]))
    return common, np.stack(values)


# -----------------------------------------------------------------------------
# in words


def seed_lines(groups: list[Group]) -> list[str]:
    """Return the spread of each group of seeds, and Welch's test of every pair of groups."""
    groups = [group for group in groups if len(group.runs) > 1]
    lines = []
    for group in groups:
        lines.append(f"{group.name}: {group.spread()}")
        lines += [f"{group.name}: {gap}" for gap in group.gaps()]
    pairs = list(itertools.combinations(groups, 2))
    lines += [welch_line(a, b) for a, b in pairs]
    if len(pairs) > 1:
        lines.append(f"each p is that of a single test; these are {len(pairs)} tests")
    return lines


def welch_line(a: Group, b: Group) -> str:
    """Return Welch's test of the last validation losses of two groups."""
    (step_a, losses_a), (step_b, losses_b) = a.last_losses(), b.last_losses()
    line = f"{a.name} against {b.name}: "
    if None in (step_a, step_b):
        return line + "no test without a validation loss in each"
    found = welch(losses_a, losses_b)
    line += f"difference of the mean losses {found.difference:.4f}"
    if step_a != step_b:
        line += f" (at different steps, {step_a:g} and {step_b:g})"
    if math.isnan(found.p):
        return f"{line}; no test: it needs two losses in each group, and some spread"
    return (
        f"{line}, 95% interval {interval(found, '.4f')}; Welch's t {found.t:.2f}, "
        f"{found.df:.1f} degrees of freedom, two-sided p = {found.p:.2g}"
    )


def target_of(run: Curves, given: float | None = None) -> float | None:
    """Return the validation loss to reach: the `given` one, else the run's own, else None."""
    target = given if given is not None else run.config("target_loss")
    return target if is_number(target) and target > 0 else None


def target_lines(group: Group, given: float | None = None) -> list[str]:
    """Return what each run needed to reach its target, and for several seeds the mean of it."""
    lines, targets, crossings = [], [], []
    for run, name in zip(group.runs, group.names, strict=True):
        target = target_of(run, given)
        targets.append(target)
        if target is not None:
            crossings.append(run.crossing(target))
            lines.append(f"{name}: {target_words(run, target)}")
    if len(targets) > 1 and len(set(targets)) == 1 and targets[0] is not None:
        lines.append(f"{group.name}: {mean_words(crossings, targets[0])}")
    return lines


def target_words(run: Curves, target: float) -> str:
    crossing, losses = run.crossing(target), run.validation_losses()
    if crossing is not None:
        # the time of a step is missing in old files and behind damaged lines: no guess
        seconds = "unknown" if crossing.seconds is None else f"{crossing.seconds:,.1f}"
        return (
            f"reached loss {target:g} after {crossing.tokens:,.0f} tokens, "
            f"{crossing.steps:,.1f} steps, {seconds} training seconds"
        )
    if not losses:
        return f"no validation loss, so it is unknown if it reached loss {target:g}"
    best = min(losses, key=losses.get)
    return f"did not reach loss {target:g}; its best is {losses[best]:.4f}, at step {best:g}"


def mean_words(crossings: list[Crossing | None], target: float) -> str:
    """Return the mean of what several seeds needed to reach a target, with its 95% interval."""
    n, reached = len(crossings), [crossing for crossing in crossings if crossing is not None]
    if len(reached) < n:  # a mean of the others would leave out the slowest
        return f"{len(reached)} of {n} seeds reached loss {target:g}, so there is no mean"
    parts = []
    for name, form in (("tokens", ",.0f"), ("steps", ",.1f"), ("seconds", ",.1f")):
        numbers = [getattr(crossing, name) for crossing in reached]
        if None in numbers:
            parts.append(f"{name} unknown")
        else:
            found = summary(numbers)
            parts.append(f"{name} {found.mean:{form}} ({interval(found, form)})")
    return f"all {n} seeds reached loss {target:g}; mean and 95% interval: {', '.join(parts)}"
