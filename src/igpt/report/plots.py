"""Curves → where their lines, marks and ticks lie in a page's plot, as shares of its width and height."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

from igpt.metric.result import Curve

SIDE = 1000  # units of the drawing, each way: the page stretches it to the room there is
MOST_POINTS = 2000  # of a line: more is not to be seen, and makes the page heavy
MOST_TOGETHER = 40_000  # of all lines of a page
MOST_ROWS = 60  # of the table of values
MARKED = 30  # points at most that get a mark each
DEPTH = "layer"  # the x of accuracy over depth


@dataclass(frozen=True)
class Line:
    """One curve of a plot: its points in the drawing, and its values as text."""

    name: str
    points: list[tuple[float, float]]  # from the top left
    x: list[str]
    y: list[str]
    marked: bool
    thinned_from: int | None  # points there were, where not all are drawn

    @property
    def path(self) -> str:
        """The line as SVG draws it."""
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in self.points)

    @property
    def marks(self) -> str:
        """A dot of no length at every point: round, however the drawing is stretched."""
        return "".join(f"M{x:g} {y:g}h0" for x, y in self.points)


@dataclass(frozen=True)
class Plot:
    """The curves of one pair of units in one plot. Ticks are (percent of the way, text)."""

    title: str
    x_unit: str
    y_unit: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]  # from the top
    lines: list[Line]

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """x and each line's y there, of at most MOST_ROWS + 1 places."""
        at = [dict(zip(line.x, line.y, strict=True)) for line in self.lines]
        places = sorted({x for values in at for x in values}, key=float)
        step = -(-len(places) // MOST_ROWS)
        kept = [x for i, x in enumerate(places) if i % step == 0 or i == len(places) - 1]
        return [(x, [values.get(x, "") for values in at]) for x in kept]

    @property
    def rows_of(self) -> int:
        """Places in x that there are."""
        return len({x for line in self.lines for x in line.x})


def plots(curves: Mapping[str, Curve]) -> list[Plot]:
    """A plot for each pair of units, that with most lines first; where no line has two points, the numbers say it."""
    groups: dict[tuple[str, str], dict[str, Curve]] = {}
    for name, curve in curves.items():
        if len(curve.x) > 0:
            groups.setdefault((curve.x_unit, curve.y_unit), {})[name] = curve
    drawn = {units: lines for units, lines in groups.items() if any(len(curve.x) > 1 for curve in lines.values())}
    most = max(2, min(MOST_POINTS, MOST_TOGETHER // max(1, len(curves))))
    return [_plot(*units, lines, most) for units, lines in sorted(drawn.items(), key=lambda of: -len(of[1]))]


def _plot(x_unit: str, y_unit: str, curves: Mapping[str, Curve], most: int) -> Plot:
    whole = all(float(x).is_integer() for curve in curves.values() for x in curve.x)
    x_range = _range([x for curve in curves.values() for x in curve.x], margin=0.02)
    y_range = _range([y for curve in curves.values() for y in curve.y], margin=0.06)
    lines = []
    for name, curve in curves.items():
        kept = thinned(curve.y, most)
        x, y = [curve.x[i] for i in kept], [curve.y[i] for i in kept]
        points = [
            (round(SIDE * _share(a, x_range), 1), round(SIDE * (1 - _share(b, y_range)), 1))
            for a, b in zip(x, y, strict=True)
        ]
        lines.append(
            Line(
                name=name,
                points=points,
                x=[f"{a:.10g}" for a in x],
                y=[f"{b:.6g}" for b in y],
                marked=len(x) <= MARKED,
                thinned_from=len(curve.x) if len(kept) < len(curve.x) else None,
            )
        )
    title = f"{y_unit[:1].upper()}{y_unit[1:]} over " + ("depth" if x_unit == DEPTH else x_unit)
    x_ticks = _ticks(x_range, n=6, integer=whole)
    y_ticks = [(round(100 - place, 2), text) for place, text in _ticks(y_range, n=5, integer=False)]
    return Plot(title, x_unit, y_unit, x_range, y_range, x_ticks, y_ticks, lines)


def thinned(y: list[float], most: int) -> list[int]:
    """The places of at most `most` + 2 values: all of them, or the first, the last, and every part's extremes."""
    n = len(y)
    if n <= most:
        return list(range(n))
    kept = {0, n - 1}
    edges = [n * part // (most // 2) for part in range(most // 2 + 1)]
    for low, high in pairwise(edges):
        part = range(low, high)
        kept |= {min(part, key=y.__getitem__), max(part, key=y.__getitem__)}
    return sorted(kept)


def _range(values: list[float], *, margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = margin * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _share(value: float, within: tuple[float, float]) -> float:
    return (value - within[0]) / (within[1] - within[0])


def _ticks(within: tuple[float, float], *, n: int, integer: bool) -> list[tuple[float, str]]:
    values = MaxNLocator(nbins=n, integer=integer, steps=[1, 2, 2.5, 5, 10]).tick_values(*within)
    inside = [float(value) for value in values if within[0] <= value <= within[1]]
    large = max((abs(value) for value in inside), default=0) >= 10_000
    text = [f"{value / 1000:,.10g}k" if large and value else f"{value:.6g}" for value in inside]
    return [(round(100 * _share(value, within), 2), words) for value, words in zip(inside, text, strict=True)]
