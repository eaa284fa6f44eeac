"""Intervals that few values do not make too narrow: of a mean, of a rank correlation; gaps of lines at equal x."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student

N_DRAW = 4000  # simulated samples for an interval


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, tuple[float, float]]:
    """(standard error, interval) of the mean of n independent values, by Student's t with n - 1 degrees of freedom.

    Of paired differences: the interval of the paired t-test. Needs n >= 2.
    """
    n = len(values)
    stderr = float(np.std(values, ddof=1)) / n**0.5
    mean, around = float(np.mean(values)), float(student.ppf((1 + confidence) / 2, n - 1)) * stderr
    return stderr, (mean - around, mean + around)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; ties have their mean rank. NaN where all x or all y are equal."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return float("nan")
    return float(np.corrcoef(rankdata(x) - 1, rankdata(y) - 1)[0, 1])


def rank_correlation_interval(
    x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The rank correlations of a population with which these points are compatible, by inverting the test of each.

    A population correlation is inside if, among `N_DRAW` samples of as many independent pairs, more than (1 -
    confidence) / 2 have a rank correlation at least as high as the points', and as many one at least as low. The pairs
    are normal, or normal after a monotone change of each axis, which no rank sees. Unlike Fisher's and the bootstrap's,
    the interval has a width also at ±1: for four points in perfect order it begins below 0, for two it is nearly all.

    Returns (-1, 1) for fewer than two points, or where all x or all y are equal.
    """
    observed, n = rank_correlation(x, y), len(x)
    if n < 2 or np.isnan(observed):
        return -1.0, 1.0
    draws = np.random.default_rng(seed).standard_normal((2, N_DRAW, n))
    ranks, tail, slack = draws[0].argsort(axis=1).argsort(axis=1), (1 - confidence) / 2, 1e-9  # slack: of rounding

    def shares(rho: float) -> tuple[float, float]:
        """Shares of the samples whose rank correlation is at least as high as observed, and at least as low."""
        others = (rho * draws[0] + np.sqrt(1 - rho**2) * draws[1]).argsort(axis=1).argsort(axis=1)
        values = 1 - 6 * ((ranks - others) ** 2).sum(axis=1) / (n * (n**2 - 1))
        return float((values >= observed - slack).mean()), float((values <= observed + slack).mean())

    low, high = -1.0, 1.0
    if shares(-1.0)[0] <= tail:
        low = _bisect(lambda rho: shares(rho)[0] > tail)
    if shares(1.0)[1] <= tail:
        high = -_bisect(lambda rho: shares(-rho)[1] > tail)
    return _spearman_of_normal(low), _spearman_of_normal(high)


def _bisect(is_inside: Callable[[float], bool]) -> float:
    """The lower end of a range of correlations that ends at 1."""
    outside, inside = -1.0, 1.0
    while inside - outside > 2e-3:
        middle = (outside + inside) / 2
        outside, inside = (outside, middle) if is_inside(middle) else (middle, inside)
    return outside


def _spearman_of_normal(rho: float) -> float:
    """The rank correlation of normal pairs of correlation `rho` (Pearson 1907)."""
    return float(6 / np.pi * np.arcsin(rho / 2))


def weigh_gap_at_equal_x(lower: Sequence[float], upper: Sequence[float]) -> tuple[np.ndarray, np.ndarray] | None:
    """Weights of each point's y in the gap of two lines at equal x. `lower`, `upper`: their x, n and m of them.

    Returns w (n,) and v (m,): v · y_upper - w · y_lower is the mean over the common range of x of the upper line minus
    the lower one, each linear between its points. None where the ranges have no more than a point in common.
    """
    orders = [np.argsort(line) for line in (lower, upper)]
    xs = [np.asarray(line, dtype=float)[order] for line, order in zip((lower, upper), orders, strict=True)]
    start, end = max(x[0] for x in xs), min(x[-1] for x in xs)
    if end <= start:
        return None
    bends = np.unique(np.clip(np.concatenate(xs), start, end))
    weights = []
    for x, order in zip(xs, orders, strict=True):
        of_point = np.empty(len(x))
        of_point[order] = [np.trapezoid(np.interp(bends, x, unit), bends) / (end - start) for unit in np.eye(len(x))]
        weights.append(of_point)
    return weights[0], weights[1]
