"""Curves → coordinates of lines and ticks in a page's SVG plots."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.ticker import MaxNLocator

from igpt.metric.result import Curve
from igpt.report.display_names import axis_name, is_share, name_lines
from igpt.report.figures import MARGIN, find_y_range, group_by_unit, has_log_x, is_level

SIDE = 1000  # width and height of the drawing, in units that the page scales
MOST_POINTS = 2000  # maximal points of a line
MOST_TOGETHER = 40_000  # maximal points of all lines of a page

ASKED = ("nats", "bits", "dB")  # beginnings of y units of the first plots

Ends = tuple[float, float]
Tick = tuple[float, str]  # position in percent of the axis, text


@dataclass(frozen=True)
class PlotLine:
    """One curve of a plot: its points in the drawing, and its values as text."""

    key: str  # in result.json
    name: str
    points: list[tuple[float, float]]  # (x, y) from the top left; none of a level that is far from the others
    x: list[str]
    y: list[str]
    n_point: int  # points of the curve before thinning
    best: tuple[float, float, float] | None = None  # of the highest point: the ends of its interval in x, and y
    best_at: str = ""  # its x and the interval of that, as text
    band: tuple[tuple[float, float], ...] = ()  # outline of its 95 % intervals
    bars: tuple[tuple[float, float, float], ...] = ()  # (x, low, high) of its points ± their standard deviations
    level: str = ""  # of a level: its name and value
    place: float = 0.0  # of a level: percent from the top; below 0 and above 100 if it is outside


@dataclass(frozen=True)
class Plot:
    """The curves of one pair of units in one plot."""

    x_unit: str
    y_unit: str
    y_name: str  # title of the axis
    in_percent: bool  # y are shares
    x_is_log: bool
    x_range: Ends  # of log₁₀ x, where that is shown
    y_range: Ends
    x_ticks: list[Tick]
    y_ticks: list[Tick]  # from the top
    lines: list[PlotLine]

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """A table of the points: (x, y of each line), "" where a line has no point."""
        values = [dict(zip(line.x, line.y, strict=True)) for line in self.lines]
        return [(x, [of.get(x, "") for of in values]) for x in sorted(set().union(*values), key=float)]


def build_plots(curves: Mapping[str, Curve]) -> list[Plot]:
    """A plot for each pair of units, losses and shares before others, then most lines first.

    Units without a line of two points are left out.
    """
    most = max(2, min(MOST_POINTS, MOST_TOGETHER // max(1, len(curves))))
    groups = [
        (units, of) for units, of in group_by_unit(curves).items() if any(len(curve.x) > 1 for curve in of.values())
    ]
    return [_build_plot(*units, of, most) for units, of in sorted(groups, key=_rank)]


def _rank(group: tuple[tuple[str, str], dict[str, Curve]]) -> tuple[bool, int]:
    (_, y_unit), curves = group
    return not (is_share(y_unit) or y_unit.startswith(ASKED)), -len(curves)


def _build_plot(x_unit: str, y_unit: str, curves: Mapping[str, Curve], most: int) -> Plot:
    in_percent, names, x_is_log = is_share(y_unit), name_lines(curves), has_log_x(x_unit, curves.values())
    scale = np.log10 if x_is_log else np.asarray
    values = np.concatenate([curve.x for curve in curves.values()])
    xs: np.ndarray = scale(values)
    x_range, y_range = _range(xs, margin=0.02), _range(np.array(find_y_range(curves)), margin=0.06)
    if in_percent:
        y_range = max(y_range[0], -MARGIN), min(y_range[1], 1 + MARGIN)
    lines = []
    for key, curve in curves.items():
        if is_level(curve):
            lines.append(_build_level(key, names[key], curve, y_range, in_percent=in_percent))
            continue
        kept = thin(curve.y, most)
        x, y = np.array(curve.x)[kept], np.array(curve.y)[kept]
        along = _along(scale(x), x_range, (0, SIDE), 1)
        points = zip(along, _along(y, y_range, (SIDE, 0), 1), strict=True)
        best, best_at, band, bars = None, "", list[tuple[float, float]](), list[tuple[float, float, float]]()
        if curve.best is not None:
            left, right = _along(scale(np.array(curve.best)), x_range, (0, SIDE), 1)
            best = left, right, _along(np.array([max(curve.y)]), y_range, (SIDE, 0), 1)[0]
            best_at = f"{curve.x[int(np.argmax(curve.y))]:g}, 95 % interval {curve.best[0]:g} to {curve.best[1]:g}"
        if curve.y_intervals is not None and curve.x_intervals is None:
            low, high = (_along(ends[kept], y_range, (SIDE, 0), 1) for ends in np.array(curve.y_intervals).T)
            band = [*zip(along, low, strict=True), *zip(along[::-1], high[::-1], strict=True)]
        if curve.y_deviations is not None:
            spread = np.array(curve.y_deviations)[kept]
            low, high = (_along(ends, y_range, (SIDE, 0), 1) for ends in (y - spread, y + spread))
            bars = [*zip(along, low, high, strict=True)]
        x_text, y_text = [f"{a:.10g}" for a in x], [f"{b:.6g}" for b in y]
        about = best, best_at, tuple(band), tuple(bars)
        lines.append(PlotLine(key, names[key], list(points), x_text, y_text, len(curve.x), *about))
    if x_is_log:
        places = np.unique(values)
        x_ticks = list(zip(_along(scale(places), x_range, (0, 100), 2), [f"{x:g}" for x in places], strict=True))
    else:
        x_ticks = _ticks(x_range, (0, 100), n=6, integer=bool((xs % 1 == 0).all()))
    y_ticks = _ticks(y_range, (100, 0), n=5, in_percent=in_percent)
    y_name = axis_name(y_unit, curves)
    return Plot(axis_name(x_unit), y_unit, y_name, in_percent, x_is_log, x_range, y_range, x_ticks, y_ticks, lines)


def _build_level(key: str, name: str, curve: Curve, y_range: Ends, *, in_percent: bool) -> PlotLine:
    y = curve.y[0]
    place = 100 * (y_range[1] - y) / (y_range[1] - y_range[0])
    points = [(0.0, round(SIDE / 100 * place, 1)), (float(SIDE), round(SIDE / 100 * place, 1))]
    level = f"{name} {100 * y:.1f} %" if in_percent else f"{name} {y:.4g}"
    if not 0 <= place <= 100:
        points, level = [], f"{level}, {'below' if place > 100 else 'above'}"
    x, values = [f"{a:.10g}" for a in curve.x], [f"{y:.6g}"] * 2
    return PlotLine(key, name, points, x, values, 2, level=level, place=round(place, 2))


def thin(y: list[float], most: int) -> list[int]:
    """Indices of at most `most` + 2 values: all, or the first, the last, and the extremes of equal parts."""
    n = len(y)
    if n <= most:
        return list(range(n))
    kept = {0, n - 1}
    for low, high in pairwise(n * part // (most // 2) for part in range(most // 2 + 1)):
        kept |= {min(range(low, high), key=y.__getitem__), max(range(low, high), key=y.__getitem__)}
    return sorted(kept)


def _range(values: np.ndarray, *, margin: float) -> Ends:
    low, high = float(values.min()), float(values.max())
    padding = margin * (high - low) or 0.1 * abs(high) or 1.0
    return low - padding, high + padding


def _along(values: np.ndarray, within: Ends, sides: Ends, digits: int) -> list[float]:
    """Coordinates of values: `within` is mapped linearly to `sides`, rounded to `digits`."""
    places: list[float] = np.interp(values, within, sides).round(digits).tolist()
    return places


def _ticks(within: Ends, sides: Ends, *, n: int, integer: bool = False, in_percent: bool = False) -> list[Tick]:
    values = np.array(MaxNLocator(nbins=n, integer=integer, steps=[1, 2, 2.5, 5, 10]).tick_values(*within))
    values = values[(values >= within[0]) & (values <= within[1])]
    thousands = abs(values).max(initial=0) >= 10_000
    if in_percent:
        return list(zip(_along(values, within, sides, 2), [f"{100 * value:.6g} %" for value in values], strict=True))
    text = [f"{value / 1000:,.10g}k" if thousands and value else f"{value:.6g}" for value in values]
    return list(zip(_along(values, within, sides, 2), text, strict=True))
