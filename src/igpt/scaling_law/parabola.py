"""IsoFLOP curves: a parabola over log10 N for each budget, power laws of the minima (Hoffmann et al. 2022, §3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from igpt.utils import keyed

SAME_BUDGET = 1.1  # operations up to this factor apart are one budget: steps are whole numbers
LEAST = 3  # sizes of a budget
FARTHEST = 3  # decades of N from a budget's sizes; a minimum beyond is none: the parabola is a line
MOST_LOST = 0.05  # share of the bootstrap's draws that may have no minimum; more: no interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class Samples:
    """The runs of a study, an entry each: weights N, tokens D, operations C, the target's values (lower: better)."""

    weights: np.ndarray
    tokens: np.ndarray
    operations: np.ndarray
    values: np.ndarray

    @cached_property
    def budgets(self) -> list[np.ndarray]:
        """The positions of each budget's runs, cheapest budget first, its runs by size.

        Raises:
            ValueError: a budget of fewer than three sizes, or values that are not finite.
        """
        for name, values in vars(self).items():
            if name != "budgets" and not np.isfinite(values).all():
                raise ValueError(f"task.runs: {name} must be finite numbers, got {values[~np.isfinite(values)][0]}")
        order = np.argsort(self.operations, kind="stable")
        starts = np.flatnonzero(np.diff(np.log(self.operations[order])) > np.log(SAME_BUDGET)) + 1
        budgets = [group[np.argsort(self.weights[group], kind="stable")] for group in np.split(order, starts)]
        for group in budgets:
            if (n := len(np.unique(self.weights[group]))) < LEAST:
                raise ValueError(
                    f"task.runs: a budget needs {LEAST} sizes for its parabola, that of "
                    f"{self.operations[group[0]]:.3g} operations has {n}: add sizes, or leave its runs out"
                )
        return budgets


@dataclass(frozen=True)
class IsoflopCurve:
    """The runs of one budget, and the parabola through those that enter it."""

    operations: float  # geometric mean
    log_weights: np.ndarray  # log10, of all its runs
    values: np.ndarray
    is_used: np.ndarray  # whether a run enters the parabola
    log_tokens: np.ndarray  # coefficients of log10 D over log10 N, a parabola as well, highest power first
    parabola: np.ndarray  # coefficients of the values over log10 N

    @property
    def ends(self) -> Interval:
        """log10 N of the smallest and the largest size that enter the parabola."""
        used = self.log_weights[self.is_used]
        return float(used.min()), float(used.max())

    @property
    def edge(self) -> str:
        """Where the lowest value lies if the parabola has no minimum inside the sizes; "" if it has."""
        low, high = self.ends
        if self.parabola[0] <= 0:
            return "no minimum: the parabola opens downwards"
        vertex = find_vertices(self.parabola)
        return (
            "" if low <= vertex <= high else f"at the edge of the grid: {'smaller' if vertex < low else 'larger'} sizes"
        )

    @property
    def minimum(self) -> float | None:
        """log10 N* of the minimum; None if it is at the edge of the grid."""
        return None if self.edge else float(find_vertices(self.parabola))


def find_vertices(parabolas: np.ndarray) -> np.ndarray:
    """Position of the lowest point of parabolas (3, …), highest power first; NaN where they open downwards."""
    with np.errstate(divide="ignore", invalid="ignore"):
        vertices: np.ndarray = np.where(parabolas[0] > 0, -parabolas[1] / (2 * parabolas[0]), np.nan)
    return vertices


def fit_curves(samples: Samples, *, width: float | None) -> list[IsoflopCurve]:
    """The IsoFLOP curve of each budget. `width`: only sizes up to this factor from that of the lowest value enter a
    parabola, three at least; None: all.

    Raises:
        ValueError: as `Samples.budgets`.
    """
    curves = []
    for group in samples.budgets:
        x, values = np.log10(samples.weights[group]), samples.values[group]
        lowest = x[values.argmin()]
        nearest = np.sort(np.abs(np.unique(x) - lowest))
        reach = np.inf if width is None else max(nearest[LEAST - 1], np.log10(width))
        is_used = np.abs(x - lowest) <= reach + 1e-9
        log_tokens = np.polyfit(x, np.log10(samples.tokens[group]), 2)
        operations = float(np.exp(np.log(samples.operations[group]).mean()))
        parabola = np.polyfit(x[is_used], values[is_used], 2)
        curves.append(IsoflopCurve(operations, x, values, is_used, log_tokens, parabola))
    return curves


@dataclass(frozen=True)
class PowerLaw:
    """y = k C^exponent, a line in log10; `draws`: (log10 k, exponent) of each bootstrap draw, (n, 2), or none."""

    log_factor: float
    exponent: float
    draws: np.ndarray

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the exponent."""
        return percentile_interval(self.draws[:, 1])

    def predict(self, operations: float) -> float:
        """y at a budget."""
        return float(10 ** (self.log_factor + self.exponent * np.log10(operations)))

    def predict_interval(self, operations: float) -> Interval | None:
        """95 % interval of y at a budget."""
        return percentile_interval(10 ** (self.draws[:, 0] + self.draws[:, 1] * np.log10(operations)))


@dataclass(frozen=True)
class Minima:
    """The budgets whose minimum lies inside the grid, and the power laws through them; None for fewer than two."""

    curves: list[IsoflopCurve]  # all budgets
    inside: list[int]  # positions of those with a minimum
    log_weights: np.ndarray  # log10 N* of each of them
    log_tokens: np.ndarray
    draws: np.ndarray  # (2, n_draw, n_inside): log10 N* and log10 D* of the bootstrap
    of_weights: PowerLaw | None
    of_tokens: PowerLaw | None

    def weights_interval(self, position: int) -> Interval | None:
        """95 % interval of N* at one of `inside`, by its place there."""
        return percentile_interval(10 ** self.draws[0, :, position])


def fit_minima(curves: Sequence[IsoflopCurve], *, bootstrap: int, seed: int) -> Minima:
    """Minima of the IsoFLOP curves and N* ∝ C^a, D* ∝ C^b by least squares in log10.

    Intervals: residual bootstrap. Each draw adds to every parabola residuals of all budgets, divided by the square root
    of one minus their leverage, and times the root of ν / χ²(ν), ν the degrees of freedom that the parabolas leave: as
    few runs do not tell how large the noise is. Without any (three sizes in each budget) there are no intervals, nor
    where more than MOST_LOST of the draws have no minimum.
    """
    inside = [i for i, curve in enumerate(curves) if curve.minimum is not None]
    log_weights = np.array([curves[i].minimum for i in inside], dtype=float)
    log_tokens = np.array([np.polyval(curves[i].log_tokens, x) for i, x in zip(inside, log_weights, strict=True)])
    drawn = _draw_vertices(curves, bootstrap=bootstrap, seed=seed)[:, inside]
    tokens = [np.polyval(curves[i].log_tokens, drawn[:, column]) for column, i in enumerate(inside)]
    draws = np.stack([drawn, np.transpose(tokens).reshape(drawn.shape)])
    laws: list[PowerLaw | None] = [None, None]
    if len(inside) > 1:
        x = np.log10([curves[i].operations for i in inside])
        laws = [_fit_power_law(x, y, of) for y, of in ((log_weights, draws[0]), (log_tokens, draws[1]))]
    return Minima(list(curves), inside, log_weights, log_tokens, draws, *laws)


def _draw_vertices(curves: Sequence[IsoflopCurve], *, bootstrap: int, seed: int) -> np.ndarray:
    """log10 N* of every budget in each draw, (n_draw, n_budget); NaN without a minimum; no draws without residuals."""
    fits, residuals = [], []
    freedom = 0
    for curve in curves:
        x, y = curve.log_weights[curve.is_used], curve.values[curve.is_used]
        design = np.vander(x - x.mean(), 3)
        solve = np.linalg.pinv(design)
        fitted = design @ (solve @ y)
        leverage = np.einsum("ij,ji->i", design, solve)
        is_free = leverage < 1 - 1e-9
        residuals.append((y - fitted)[is_free] / np.sqrt(1 - leverage[is_free]))
        fits.append((x.mean(), solve, fitted))
        freedom += len(x) - 3
    pooled = np.concatenate(residuals)
    if freedom < 1 or not len(pooled):
        return np.empty((0, len(curves)))
    rng = keyed.generator(seed, "bootstrap of the minima")
    scale = np.sqrt(freedom / rng.chisquare(freedom, bootstrap))
    vertices = []
    for middle, solve, fitted in fits:
        noise = rng.choice(pooled - pooled.mean(), (len(fitted), bootstrap)) * scale
        offset = find_vertices(solve @ (fitted[:, None] + noise))
        vertices.append(np.where(np.abs(offset) < FARTHEST, middle + offset, np.nan))
    return np.stack(vertices, axis=1)


def _fit_power_law(log_operations: np.ndarray, log_y: np.ndarray, draws: np.ndarray) -> PowerLaw:
    """The line through (n,) points, and through those of each draw, (n_draw, n)."""
    exponent, log_factor = np.polyfit(log_operations, log_y, 1)
    lines = np.full((len(draws), 2), np.nan)
    is_drawn = np.isfinite(draws).all(axis=1)
    if is_drawn.any():
        lines[is_drawn] = np.polyfit(log_operations, draws[is_drawn].T, 1)[::-1].T
    return PowerLaw(float(log_factor), float(exponent), lines)


def percentile_interval(draws: np.ndarray) -> Interval | None:
    """The middle 95 % of draws; None for none, or where more than MOST_LOST are NaN."""
    known = draws[np.isfinite(draws)]
    if not len(draws) or len(known) < (1 - MOST_LOST) * len(draws):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
