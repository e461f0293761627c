"""common/significance.py: Student's distribution, intervals and Welch's test, by known values."""

import math

import pytest

from common.significance import p_two_sided, standard_error, summary, t_critical, welch

# R's data set `sleep`: extra hours of sleep with two drugs (Student, 1908). R prints for
# t.test(extra ~ group, data = sleep): t = -1.8608, df = 17.776, p-value = 0.07939 and the interval
# -3.3654832 to 0.2054832. The longer numbers below were computed with mpmath, at 40 digits.
DRUG_1 = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
DRUG_2 = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def test_the_standard_error_of_hellaswag_is_that_of_the_harness():
    answers = [1] * 3 + [0] * 7
    deviation = math.sqrt(sum((x - 0.3) ** 2 for x in answers) / 9)
    assert standard_error(0.3, 10) == pytest.approx(deviation / math.sqrt(10), rel=1e-12)
    assert standard_error(0.2955, 10042) == pytest.approx(0.0046, abs=5e-5)


def test_a_standard_error_that_is_not_known_is_nan():
    for p, n in ((0.3, 1), (0.3, 0), (1.5, 10), (math.nan, 10)):
        assert math.isnan(standard_error(p, n)), (p, n)


@pytest.mark.parametrize("t", [0, 1e-3, 0.5, 2.0, -2.0, 40.0, 1e6])
def test_one_and_two_degrees_of_freedom_have_a_closed_form(t):
    cauchy = 2 / math.pi * math.atan2(1, abs(t))
    assert p_two_sided(t, 1) == pytest.approx(cauchy, rel=1e-12)
    root = math.sqrt(2 + t * t)
    two = 2 / (root * (root + abs(t)))  # 1 - |t| / root, without the difference of near numbers
    assert p_two_sided(t, 2) == pytest.approx(two, rel=1e-12)


@pytest.mark.parametrize(
    ("df", "t"),  # tables of Student's distribution, column 0.975
    [(1, 12.706205), (2, 4.302653), (4, 2.776445), (10, 2.228139), (30, 2.042272), (100, 1.983972)],
)
def test_critical_values_are_those_of_the_tables(df, t):
    assert t_critical(df) == pytest.approx(t, abs=5e-7)
    assert p_two_sided(t_critical(df), df) == pytest.approx(0.05, rel=1e-10)


@pytest.mark.parametrize(
    ("t", "df", "p"),  # mpmath: the regularised incomplete beta function, at 40 digits
    [
        (1.0, 1.3, 0.467242387586),
        (25.0, 3.5, 4.51990276213e-5),
        (2.1, 500, 0.0362292739299),
    ],
)
def test_degrees_of_freedom_need_not_be_whole(t, df, p):
    assert p_two_sided(t, df) == pytest.approx(p, rel=1e-10)


def test_a_summary_has_students_interval():
    # mean 3, deviation sqrt(2.5), t_0.975(4) = 2.776445
    found = summary([1, 2, 3, 4, 5])
    assert (found.n, found.mean, found.sd) == (5, 3, pytest.approx(math.sqrt(2.5)))
    margin = 2.776445 * math.sqrt(2.5 / 5)
    assert (found.low, found.high) == pytest.approx((3 - margin, 3 + margin), abs=1e-6)


def test_a_sample_of_one_has_a_mean_but_no_interval():
    found = summary([2.5])
    assert (found.n, found.mean) == (1, 2.5)
    assert all(map(math.isnan, (found.sd, found.low, found.high)))
    assert math.isnan(summary([]).mean)


def test_welch_agrees_with_a_published_example():
    found = welch(DRUG_1, DRUG_2)
    assert found.difference == pytest.approx(-1.58)
    assert found.t == pytest.approx(-1.860813467486853, rel=1e-12)
    assert found.df == pytest.approx(17.77647351617849, rel=1e-12)
    assert found.p == pytest.approx(0.07939414018735814, rel=1e-10)
    assert found.low == pytest.approx(-3.365483230711711, rel=1e-10)
    assert found.high == pytest.approx(0.205483230711711, rel=1e-10)


def test_welch_weighs_samples_of_different_size_and_variance():
    # by hand: means 2 and 20, variances 1 and 200
    found = welch([1, 2, 3], [10, 30])
    v = 1 / 3, 100.0
    assert found.t == pytest.approx(-18 / math.sqrt(sum(v)))
    assert found.df == pytest.approx(sum(v) ** 2 / (v[0] ** 2 / 2 + v[1] ** 2 / 1))
    swapped = welch([10, 30], [1, 2, 3])
    assert (swapped.t, swapped.df, swapped.p) == pytest.approx((-found.t, found.df, found.p))


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ([1, 1, 1], [2, 2], -1),  # no spread at all
        ([1], [2, 3], -1.5),
        ([], [2, 3], math.nan),
        ([1, math.nan], [2, 3], math.nan),
        ([1, math.inf], [2, 3], math.inf),
    ],
)
def test_what_cannot_be_tested_is_nan_and_no_error(a, b, difference):
    found = welch(a, b)
    assert found.difference == pytest.approx(difference, nan_ok=True)
    assert all(map(math.isnan, (found.low, found.high, found.t, found.df, found.p)))


def test_one_sample_without_spread_can_be_tested():
    assert welch([1, 1, 1], [1, 2]).df == pytest.approx(1)
    tiny = welch([1e-100, 3e-100], [0.0, 0.0])  # the square of its variance is zero
    assert (tiny.t, tiny.df) == pytest.approx((2, 1))
