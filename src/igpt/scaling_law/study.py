"""A scaling study: for each target the IsoFLOP minima and the surface, as numbers, text and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igpt.metric.result import Number
from igpt.scaling_law.parabola import Interval, Minima, PowerLaw, Samples, fit_curves, fit_minima
from igpt.scaling_law.study_points import TARGETS, StudyPoint, build_samples, list_targets
from igpt.scaling_law.surface import SurfaceFit, fit_surface

Row = tuple[str, ...]


@dataclass(frozen=True)
class TargetFit:
    """All that is fitted to one target."""

    name: str  # of TARGETS
    samples: Samples
    minima: Minima
    surface: SurfaceFit | None  # None: too few runs

    @property
    def label(self) -> str:
        return TARGETS[self.name].label

    @property
    def exponents(self) -> dict[str, tuple[float, Interval | None]]:
        """a and b by the parabolas, and α, β, E, a, b by the surface, each with its 95 % interval, where known."""
        laws: dict[str, PowerLaw | None] = {"a": self.minima.of_weights, "b": self.minima.of_tokens}
        known = {name: (law.exponent, law.interval) for name, law in laws.items() if law is not None}
        if self.surface is None or not self.surface.is_determined:
            return known
        return known | {f"surface_{name}": value for name, value in self.surface.exponents.items()}

    @property
    def remarks(self) -> list[str]:
        """What keeps a number from being told, or limits it."""
        n = len(self.minima.curves)
        remarks = []
        if not self.minima.inside:
            remarks.append("every minimum lies at the edge of its grid: no exponents by parabolas, widen the grid")
        elif len(self.minima.inside) < n:
            remarks.append(f"{len(self.minima.inside)} of {n} budgets have their minimum inside the grid")
        if self.minima.inside and self.minima.of_weights is None:
            remarks.append("an exponent needs the minima of two budgets")
        if (law := self.minima.of_weights) is not None and law.interval is None:
            remarks.append(
                "no interval of a: three runs a budget leave no residual, or with other noise a minimum is gone"
            )
        if self.surface is None:
            remarks.append("too few runs for a surface")
        elif not self.surface.is_determined:
            remarks.append(
                "these runs do not determine a surface: with other noise a term is zero, or an exponent without bounds"
            )
        return remarks

    @property
    def agreement(self) -> str:
        """Whether the intervals of a by both methods overlap; "" where one is missing."""
        intervals = [self.exponents.get(key, (0.0, None))[1] for key in ("a", "surface_a")]
        if intervals[0] is None or intervals[1] is None:
            return ""
        overlap = max(of[0] for of in intervals if of) <= min(of[1] for of in intervals if of)
        return f"the intervals of a by both methods {'overlap' if overlap else 'do not overlap: they differ'}"


def fit_study(
    points: Sequence[StudyPoint], targets: Sequence[str], *, weights: str, width: float | None, huber: float | None,
    bootstrap: int, seed: int,
) -> list[TargetFit]:  # fmt: skip
    """The fits of the targets; of all that some run has where none is named.

    `weights`: what N counts, all or non_embedding. `width`: as of `fit_curves`. `huber`: as of `fit_surface`.

    Raises:
        ValueError: a budget of fewer than three sizes, a target that no run has, values that are not finite.
    """
    fits = []
    for name in targets or list_targets(points):
        samples = build_samples(points, name, weights=weights)
        try:
            curves = fit_curves(samples, width=width)
        except ValueError as error:
            raise ValueError(f"{error} ({name})") from error
        minima = fit_minima(curves, bootstrap=bootstrap, seed=seed)
        fits.append(TargetFit(name, samples, minima, fit_surface(samples, huber=huber, bootstrap=bootstrap, seed=seed)))
    return fits


def list_numbers(fits: Sequence[TargetFit]) -> dict[str, Number]:
    """`loss/a`, `loss/surface_alpha` …, and of each budget `loss/1e+12/weights`, `tokens_per_weight`."""
    numbers: dict[str, Number] = {}
    for fit in fits:
        n = len(fit.samples.values)
        for name, (value, interval) in fit.exponents.items():
            unit = TARGETS[fit.name].label if name == "surface_E" else "exponent"
            numbers[f"{fit.name}/{name}"] = Number(value, unit, n, interval=interval)
        for place, i in enumerate(fit.minima.inside):
            curve = fit.minima.curves[i]
            key, of = f"{fit.name}/{curve.operations:.3g}", int(curve.is_used.sum())
            optimum, tokens = 10 ** fit.minima.log_weights[place], 10 ** fit.minima.log_tokens[place]
            interval = fit.minima.weights_interval(place)
            numbers[f"{key}/weights"] = Number(float(optimum), "weights", of, interval=interval)
            numbers[f"{key}/tokens_per_weight"] = Number(float(tokens / optimum), "tokens a weight", of)
    return numbers


def list_minima(fit: TargetFit) -> list[Row]:
    """Rows of text, the heading first: each budget, its sizes, lowest value and minimum."""
    rows: list[Row] = [("budget, FLOP", "sizes", "lowest measured", "N* [95 %]", "D*, tokens", "D* / N*", "parabola's")]
    for i, curve in enumerate(fit.minima.curves):
        sizes = f"{int(curve.is_used.sum())} of {len(curve.values)}"
        lowest = f"{curve.values.min():.4f} at {format_count(10 ** curve.log_weights[curve.values.argmin()])}"
        cells = f"{curve.operations:.3g}", sizes, lowest
        if i not in fit.minima.inside:
            rows.append((*cells, "–", "–", "–", curve.edge))
            continue
        place = fit.minima.inside.index(i)
        n, d = 10 ** fit.minima.log_weights[place], 10 ** fit.minima.log_tokens[place]
        between = format_interval(fit.minima.weights_interval(place))
        value = np.polyval(curve.parabola, fit.minima.log_weights[place])
        rows.append((*cells, f"{format_count(n)}{between}", format_count(d), f"{d / n:.0f}", f"{value:.4f}"))
    return rows


def list_exponents(fits: Sequence[TargetFit]) -> list[Row]:
    """Rows of text, the heading first: the exponents of each target by both methods."""
    rows: list[Row] = [
        ("target", "a (N* ∝ C^a), parabolas", "b (D* ∝ C^b), parabolas", "a, surface", "b, surface", "α", "β", "E")
    ]
    for fit in fits:
        known = fit.exponents
        names = ("a", "b", "surface_a", "surface_b", "surface_alpha", "surface_beta", "surface_E")
        rows.append((fit.name, *(_format_exponent(*known[name]) if name in known else "–" for name in names)))
    return rows


def _format_exponent(value: float, interval: Interval | None) -> str:
    return f"{value:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


def format_interval(interval: Interval | None) -> str:
    """` [low, high]` of counts; "" without one."""
    return "" if interval is None else f" [{format_count(interval[0])}, {format_count(interval[1])}]"


def format_count(n: float) -> str:
    """A count of three digits: 12.3k, 4.56M, 7.89B, 1.23e+13."""
    for limit, divisor, unit in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "B")):
        if abs(n) < limit * 0.9995:
            return f"{n / divisor:.3g}{unit}"
    return f"{n:.3g}"
