"""Standard errors, confidence intervals and Welch's t-test: is a difference more than chance?"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

LEVEL = 0.95  # of every interval


def standard_error(p: float, n: float) -> float:
    """Return the standard error of a proportion `p` of `n` examples; NaN if n is less than 2.

    It is the sample standard deviation of n zeros and ones, divided by sqrt(n), as
    lm-evaluation-harness reports it under the name `acc_norm_stderr`.
    """
    return math.sqrt(p * (1 - p) / (n - 1)) if 0 <= p <= 1 and n >= 2 else math.nan


# -----------------------------------------------------------------------------
# Student's t distribution


def p_two_sided(t: float, df: float) -> float:
    """Return the probability that Student's t is at least as far from 0 as `t`; NaN if unknown.

    Student's density is proportional to (1 + t^2 / df)^(-(df + 1) / 2). With t = sqrt(df) / tan(u)
    it becomes sin(u)^(df - 1) du, and a tail of t becomes the interval from 0 to u.
    """
    u = math.atan2(math.sqrt(df), abs(t))
    return sine_power(u, df - 1) / sine_power(math.pi / 2, df - 1)


@functools.cache
def legendre() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights that give an error below 1e-11 up to 1,000 degrees of freedom."""
    return np.polynomial.legendre.leggauss(200)


def sine_power(end: float, power: float) -> float:
    """Return the integral of sin(u)^power from 0 to `end`, by Gauss-Legendre quadrature."""
    nodes, weights = legendre()
    # u = s^2 makes the integrand smooth at 0, where a power between 0 and 1 is steep
    s = math.sqrt(end) * (nodes + 1) / 2
    return float(math.sqrt(end) / 2 * np.sum(weights * 2 * s * np.sin(s**2) ** power))


def t_critical(df: float) -> float:
    """Return the t that 5% of Student's distribution lies beyond, on both sides together."""
    low, high = 0.0, math.pi / 2  # the u of p_two_sided: a larger u has a larger tail
    if not df > 0:
        return math.nan
    whole = sine_power(high, df - 1)
    for _ in range(60):
        u = (low + high) / 2
        low, high = (u, high) if sine_power(u, df - 1) < (1 - LEVEL) * whole else (low, u)
    return math.sqrt(df) / math.tan(high)


# -----------------------------------------------------------------------------
# samples


@dataclass(frozen=True)
class Summary:
    """Some numbers in short. With fewer than two, the deviation and the interval are NaN."""

    n: int
    mean: float
    sd: float  # standard deviation of the sample, with n - 1
    low: float  # 95% interval of the mean
    high: float


def summary(values: Sequence[float]) -> Summary:
    """Return n, mean, standard deviation and Student's 95% interval of the mean (Student, 1908)."""
    n = len(values)
    mean = fmean(values) if n else math.nan
    sd = stdev(values) if n > 1 and math.isfinite(mean) else math.nan
    margin = t_critical(n - 1) * sd / math.sqrt(n) if n > 1 else math.nan
    return Summary(n, mean, sd, mean - margin, mean + margin)


@dataclass(frozen=True)
class Welch:
    """The comparison of two means. All but the difference is NaN if there is nothing to test."""

    difference: float  # mean of a minus mean of b
    low: float  # 95% interval of the difference
    high: float
    t: float
    df: float  # degrees of freedom
    p: float  # two-sided


def welch(a: Sequence[float], b: Sequence[float]) -> Welch:
    """Compare the means of two samples whose variances may differ.

    With v = variance / n of each sample, t = (mean_a - mean_b) / sqrt(v_a + v_b) follows about
    Student's distribution, with (v_a + v_b)^2 / (v_a^2 / (n_a - 1) + v_b^2 / (n_b - 1)) degrees of
    freedom.
    B. L. Welch, "The generalization of Student's problem when several different population
    variances are involved", Biometrika 34, 1947. The degrees of freedom: F. E. Satterthwaite, "An
    approximate distribution of estimates of variance components", Biometrics Bulletin 2, 1946.
    """
    one, two = summary(a), summary(b)
    difference = one.mean - two.mean
    v_a, v_b = one.sd**2 / max(1, one.n), two.sd**2 / max(1, two.n)
    error = math.sqrt(v_a + v_b)
    if not error > 0:  # a sample of one or of none, a NaN, or samples without any spread
        return Welch(difference, *[math.nan] * 5)
    share = v_a / (v_a + v_b)  # the formula divided by (v_a + v_b)^2, which could underflow
    df = 1 / (share**2 / (one.n - 1) + (1 - share) ** 2 / (two.n - 1))
    margin = t_critical(df) * error
    t = difference / error
    return Welch(difference, difference - margin, difference + margin, t, df, p_two_sided(t, df))
