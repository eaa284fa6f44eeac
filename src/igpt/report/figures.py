"""Numbers → PNG files: curves, bars, lines, points."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from igpt.metric.result import Bars, Curve, MarkedLines
from igpt.report.display_names import axis_name, is_share, name_lines
from igpt.report.style import BAND, HEIGHT, LOG_UNITS, REFERENCE, SMALL, WIDTH, save_figure, show_percent, styled

NARROW = 6.2  # inches of a plot with long names: legible also on a phone
MARGIN = 0.03  # beyond 0 and 100 %, along an axis of shares


def group_by_unit(curves: Mapping[str, Curve], *, least: int = 1) -> dict[tuple[str, str], dict[str, Curve]]:
    """Curves grouped by units, (x unit, y unit) → name → curve; those of fewer than `least` points are left out."""
    groups: dict[tuple[str, str], dict[str, Curve]] = {}
    for name, curve in curves.items():
        if len(curve.x) >= least:
            groups.setdefault((curve.x_unit, curve.y_unit), {})[name] = curve
    return groups


def is_level(curve: Curve) -> bool:
    """Whether a curve is a level that others are compared with, as chance or a baseline of pixels."""
    return len(curve.x) == 2 and curve.y[0] == curve.y[1]


def has_log_x(x_unit: str, curves: Iterable[Curve]) -> bool:
    """Whether x is shown on a logarithmic axis: units of `LOG_UNITS`, and no x that has no logarithm."""
    return x_unit in LOG_UNITS and all(x > 0 for curve in curves for x in curve.x)


def find_y_range(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """The range to show: all points and intervals, and the levels that are not far from them.

    Far: so that less than half of the height would be left to the others.
    """
    levels = [curve.y[0] for curve in curves.values() if is_level(curve)]
    others = [curve for curve in curves.values() if not is_level(curve)]
    values = [end for curve in others for pair in (curve.y_intervals or ()) for end in pair]
    values += [y + side * of for curve in others if curve.y_deviations
               for y, of in zip(curve.y, curve.y_deviations, strict=True) for side in (-1, 1)]  # fmt: skip
    values = [*values, *(y for curve in others for y in curve.y)] or levels
    low, high = min(values), max(values)
    near = [level for level in levels if max(level - high, low - level) <= (high - low) / 2]
    return min([low, *near]), max([high, *near])


@styled
def curves_figure(path: Path, curves: Mapping[str, Curve]) -> None:
    """Writes one plot for each pair of units, stacked, more than four in two columns; no curve of a single point."""
    groups = group_by_unit(curves, least=2)
    columns = 1 if len(groups) <= 4 else 2
    rows = -(-len(groups) // columns) or 1
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    for place, ((x_unit, y_unit), lines) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        names = name_lines(lines)
        for key, curve in lines.items():
            if not is_level(curve):
                _draw_curve(axes, curve, label=names[key], x_unit=x_unit)
        _draw_levels(axes, {names[key]: curve for key, curve in lines.items()}, in_percent=is_share(y_unit))
        has_deviations = any(curve.y_deviations is not None for curve in lines.values())
        spread = ", ± standard deviation" if has_deviations else ""
        axes.set(xlabel=axis_name(x_unit), ylabel=axis_name(y_unit, lines) + spread)
        if has_log_x(x_unit, lines.values()):
            places = sorted({x for curve in lines.values() for x in curve.x})
            axes.set_xscale("log")
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.minorticks_off()
        elif all(float(x).is_integer() for curve in lines.values() for x in curve.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if is_share(y_unit):
            show_percent(axes.yaxis)
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -MARGIN), min(high, 1 + MARGIN))
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    save_figure(path, figure)


def _draw_curve(axes: Axes, curve: Curve, *, label: str, x_unit: str) -> None:
    """A line with its intervals as a band, or as bars where x has some, too, or its deviations; a star at its best."""
    (line,) = axes.plot(curve.x, curve.y, label=label, marker="o" if len(curve.x) <= 65 else None)
    ink = line.get_color()
    if curve.x_intervals is None and curve.y_intervals is not None:
        axes.fill_between(curve.x, *np.transpose(curve.y_intervals), color=ink, **BAND)
    elif curve.y_deviations is not None:
        axes.errorbar(curve.x, curve.y, curve.y_deviations, fmt="none", lw=1.2, capsize=4, color=ink)
    elif curve.x_intervals is not None:
        y_reach = None if curve.y_intervals is None else _reach(curve.y, curve.y_intervals)
        x_reach = _reach(curve.x, curve.x_intervals)
        axes.errorbar(curve.x, curve.y, y_reach, x_reach, fmt="none", lw=0.9, capsize=2, color=ink)
    if curve.best is not None:
        top = int(np.argmax(curve.y))
        reach = _reach([curve.x[top]], [curve.best])
        best = f"best {x_unit}: {curve.x[top]:g}, 95 % interval {curve.best[0]:g} to {curve.best[1]:g}"
        axes.errorbar(curve.x[top], curve.y[top], xerr=reach, fmt="*", ms=12, lw=1.4, capsize=4, color=ink, label=best)


def _draw_levels(axes: Axes, lines: Mapping[str, Curve], *, in_percent: bool) -> None:
    """Dashed lines with their names at the right; one that is far from the others is only named in the legend."""
    if not (levels := {name: curve.y[0] for name, curve in lines.items() if is_level(curve)}):
        return
    low, high = find_y_range(lines)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    for name, y in levels.items():
        text = f"{name} {100 * y:.1f} %" if in_percent else f"{name} {y:.4g}"
        if low <= y <= high:
            axes.axhline(y, **REFERENCE)
            axes.annotate(
                text, (1, y), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                fontsize=SMALL, color=REFERENCE["color"],
            )  # fmt: skip
        else:
            axes.plot([], [], label=f"{text}, {'below' if y < low else 'above'}", **REFERENCE)


@styled
def bars_figure(path: Path, bars: Bars) -> None:
    """Writes a bar chart: groups of bars with 95 % intervals, each height printed; inside a bar, its part is pale."""
    series = list(dict.fromkeys(name for group in bars.heights.values() for name in group))
    part_label = f"pale: {bars.part_name}"
    of_legend = 0.08 * max(map(len, [*series, *([part_label] if bars.parts else [])]))  # inches
    figure = Figure(figsize=(max(4.5, 2.2 * len(bars.heights)) + max(0.0, of_legend - 0.5), 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    tallest = max(number.value for group in bars.heights.values() for number in group.values())
    for place, name in enumerate(series):
        numbers = {i: group[name] for i, group in enumerate(bars.heights.values()) if name in group}
        x = [i + (place - (len(series) - 1) / 2) * width for i in numbers]
        heights = [number.value for number in numbers.values()]
        reach = _reach(heights, [number.confidence_interval for number in numbers.values()])
        lines = {"lw": 1, "capsize": 3}
        axes.bar(x, heights, 0.92 * width, yerr=reach, color=f"C{place}", label=name, error_kw=lines)
        parts = [bars.parts.get(group, {}).get(name) for group in bars.heights if name in bars.heights[group]]
        inside = [0.0 if part is None else part.value for part in parts]
        axes.bar(x, inside, 0.92 * width, color="white", alpha=0.4, ec="black", lw=[0.8 * (h > 0) for h in inside])
        for middle, height, part in zip(x, heights, inside, strict=True):
            ink = "white" if height > 0.1 * tallest and not part else "black"
            text = f"{100 * height:.1f} %" if is_share(bars.y_unit) else f"{height:.3f}"
            axes.text(middle, 0, text, ha="center", va="bottom", color=ink, fontsize=9)
    axes.set_xticks(range(len(bars.heights)), [textwrap.fill(group, 20) for group in bars.heights])
    has_intervals = any(of.confidence_interval for group in bars.heights.values() for of in group.values())
    axes.set_ylabel(axis_name(bars.y_unit) + (", with 95 % intervals" if has_intervals else ""))
    axes.grid(False, axis="x")
    if is_share(bars.y_unit):
        show_percent(axes.yaxis)
    if bars.parts:
        axes.bar([0], [0], color="C0", alpha=0.6, ec="black", lw=0.8, label=part_label)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(path, figure)


@styled
def lines_figure(path: Path, lines: MarkedLines) -> None:
    """Writes the lines with their markers and intervals, the title above."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.points.items():
        values = [number.value for _, number in points]
        reach = _reach(values, [number.confidence_interval for _, number in points])
        axes.errorbar([x for x, _ in points], values, reach, marker="o", ms=5, elinewidth=0.8, capsize=2, label=name)
    axes.set(xlabel=lines.x_unit, ylabel=lines.y_unit)
    if is_share(lines.y_unit):
        show_percent(axes.yaxis)
    axes.set_title("\n".join(textwrap.wrap(lines.title, 84)), fontsize=10)
    if lines.x_falls:
        axes.invert_xaxis()
    axes.legend()
    save_figure(path, figure)


@dataclass(frozen=True)
class Point:
    """One line of `points_figure`."""

    name: str
    value: float
    single: tuple[float, ...]  # the values it is the mean of
    interval: tuple[float, float] | None
    kind: str  # description of the interval, for the legend; one colour each


@styled
def points_figure(path: Path, points: Sequence[Point], *, label: str, in_percent: bool = False) -> None:
    """Writes a dot plot, the first point on top: values, intervals, and the single values behind each mean."""
    names = [textwrap.fill(point.name, 40) for point in points]
    height = 1.4 + 0.32 * len(points) + 0.15 * sum(name.count("\n") for name in names)
    label = "\n".join(textwrap.fill(line, 72) for line in label.splitlines())
    figure = Figure(figsize=(NARROW, height + 0.2 * label.count("\n")), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(point.kind for point in points))
    for kind in kinds:
        rows = [row for row, point in enumerate(points) if point.kind == kind]
        values = [points[row].value for row in rows]
        reach = _reach(values, [points[row].interval for row in rows])
        axes.errorbar(values, rows, xerr=reach, fmt="o", ms=6, capsize=4, lw=1.6, label=kind)
    for row, point in enumerate(points):
        if len(point.single) > 1:
            axes.plot(point.single, [row] * len(point.single), "|", ms=9, color="black", lw=1)
    axes.set_yticks(range(len(points)), names, fontsize=SMALL)
    axes.set(ylim=(len(points) - 0.4, -0.6))
    figure.supxlabel(label, fontsize=10)  # below the whole figure: the axes are narrower than a long line
    axes.grid(False, axis="y")
    if in_percent:
        show_percent(axes.xaxis)
    figure.legend(loc="outside upper right", fontsize=SMALL, ncols=len(kinds))
    save_figure(path, figure)


@dataclass(frozen=True)
class PlanePoint:
    """One point of `plane_figure`, with its 95 % intervals, if known."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None
    y_interval: tuple[float, float] | None


@styled
def plane_figure(
    path: Path,
    points: Sequence[PlanePoint],
    *,
    x_label: str,
    y_label: str,
    in_percent: tuple[bool, bool] = (False, False),  # x, y
) -> None:
    """Writes points in a plane with their intervals; each is named at the right, in its order from the top."""
    points = sorted(points, key=lambda point: -point.y)
    figure = Figure(figsize=(WIDTH, max(HEIGHT, 1.5 + 0.4 * len(points))), layout="constrained")
    axes = figure.add_subplot()
    low, high = (f([end for p in points for end in (p.y_interval or (p.y, p.y))]) for f in (min, max))
    margin = 0.04 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    heights = np.linspace(0.96, 0.04, len(points)) if len(points) > 1 else [0.5]
    for i, (point, height) in enumerate(zip(points, heights, strict=True)):
        x_reach, y_reach = _reach([point.x], [point.x_interval]), _reach([point.y], [point.y_interval])
        ink = f"C{i % 10}"
        axes.errorbar(point.x, point.y, y_reach, x_reach, fmt="o", ms=5, capsize=3, lw=0.9, color=ink)
        axes.annotate(
            textwrap.fill(textwrap.shorten(point.name, 72, placeholder="…"), 34, break_long_words=False),
            (point.x, point.y), (1.04, height),
            textcoords="axes fraction", va="center", fontsize=SMALL, color=ink,
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": ink, "alpha": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip
    axes.set(xlabel=x_label, ylabel=y_label)
    for axis, are_shares in zip((axes.xaxis, axes.yaxis), in_percent, strict=True):
        if are_shares:
            show_percent(axis)
    save_figure(path, figure)


def _reach(values: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> np.ndarray:
    """Distances from each value to the ends of its interval, (2, n), for matplotlib; 0 without an interval."""
    ends = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    return np.transpose(np.abs(np.array(ends) - np.array(values)[:, None]))
