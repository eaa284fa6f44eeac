"""Rank correlations and their intervals, against scipy, exact permutation tests and a published approximation."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import spearmanr, ttest_1samp

from igpt.metric.statistics import mean_interval, rank_correlation, rank_correlation_interval, weigh_gap_at_equal_x


def test_the_interval_of_a_mean_is_that_of_the_t_test() -> None:
    """Independent source: scipy. By hand: no width where all values are equal."""
    values = [0.03, 0.01, 0.04, -0.01, 0.02]
    for confidence in (0.95, 0.5):
        expected = ttest_1samp(values, 0.0).confidence_interval(confidence)
        assert mean_interval(values, confidence=confidence)[1] == pytest.approx((expected.low, expected.high))
    assert mean_interval(values)[0] == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert mean_interval([0.5, 0.5]) == (0.0, (0.5, 0.5))


def test_rank_correlation_is_spearmans() -> None:
    """Independent source: scipy, with equal values among them."""
    x, y = [3.0, 1.0, 2.0, 2.0, 5.0], [0.3, 0.3, 0.1, 0.4, 0.9]
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))


def test_the_interval_leaves_out_zero_as_the_exact_test_does() -> None:
    """Independent source: all orders of n points are equally likely without a correlation."""
    orders = {n: [list(order) for order in itertools.permutations(range(n))] for n in (4, 5, 6)}
    exact = {n: np.array([spearmanr(range(n), order).statistic for order in orders[n]]) for n in orders}
    for order in (
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 4, 3],
        [1, 0, 2, 3, 5, 4],
        [0, 2, 1, 4, 3, 5],
        [5, 4, 3, 2, 1, 0],
    ):
        n = len(order)
        observed = spearmanr(range(n), order).statistic
        p = min((exact[n] >= observed - 1e-9).mean(), (exact[n] <= observed + 1e-9).mean())
        low, high = rank_correlation_interval(range(n), order)
        assert low <= observed <= high
        assert abs(p - 0.025) > 0.003  # further than the simulation's error
        assert (low > 0 or high < 0) == (p < 0.025)


def test_the_interval_of_many_points() -> None:
    """Independent source: Bonett and Wright 2000, tanh(artanh r ± 1.96 √((1 + r²/2) / (n - 3))), of 40 points."""
    x, noise = np.random.default_rng(1).standard_normal((2, 40))
    for slope in (0.0, -0.9):
        y = slope * x + noise
        r = spearmanr(x, y).statistic
        reach = 1.96 * math.sqrt((1 + r**2 / 2) / 37)
        expected = [math.tanh(math.atanh(r) + side * reach) for side in (-1, 1)]
        assert rank_correlation_interval(x.tolist(), y.tolist()) == pytest.approx(expected, abs=0.05)


def test_few_points_say_little() -> None:
    """By hand: of one point nothing; for two and three in order nearly all; a reversed axis reverses the interval."""
    assert rank_correlation_interval([1.0], [2.0]) == (-1, 1)
    assert rank_correlation_interval([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == (-1, 1)
    for n, bound in ((2, -0.99), (3, -0.75)):
        low, high = rank_correlation_interval(range(n), range(n))
        assert low < bound
        assert high == 1
    low, high = rank_correlation_interval(range(5), [0, 1, 3, 2, 4])
    assert rank_correlation_interval(range(5), [0, -1, -3, -2, -4]) == pytest.approx((-high, -low), abs=0.1)


def test_the_gap_of_two_lines() -> None:
    """By hand: y = x against y = 3 on [1, 2], which is 1.5 on average; no gap where only a point is common."""

    def gap(lower: list[tuple[float, float]], upper: list[tuple[float, float]]) -> float | None:
        weights = weigh_gap_at_equal_x([x for x, _ in lower], [x for x, _ in upper])
        return (
            None if weights is None else float(weights[1] @ [y for _, y in upper] - weights[0] @ [y for _, y in lower])
        )

    assert gap([(2.0, 2.0), (0.0, 0.0)], [(1.0, 3.0), (4.0, 3.0)]) == pytest.approx(1.5)
    assert gap([(0.0, 0.0), (1.0, 5.0)], [(1.0, 3.0), (4.0, 3.0)]) is None


def test_the_gap_of_two_lines_is_that_of_a_fine_grid() -> None:
    """Made-up lines in any order: the mean gap over 20,001 places is that of the weights, which sum to 1."""
    rng = np.random.default_rng(0)
    for n, m in ((2, 3), (5, 5), (6, 2)):
        (x, y), (other_x, other_y) = rng.random((2, n)), rng.random((2, m)) + 0.1
        x[0], x[-1] = 0, 1.2
        weights = weigh_gap_at_equal_x(x.tolist(), other_x.tolist())
        assert weights is not None
        assert [float(of.sum()) for of in weights] == pytest.approx([1, 1])
        places = np.linspace(other_x.min(), other_x.max(), 20_001)
        lines = [np.interp(places, a[np.argsort(a)], b[np.argsort(a)]) for a, b in ((x, y), (other_x, other_y))]
        assert weights[1] @ other_y - weights[0] @ y == pytest.approx((lines[1] - lines[0]).mean(), abs=1e-4)
