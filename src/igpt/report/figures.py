"""Arrays → PNG files: grids of images, palettes, curves, bars, points, matrices."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from igpt.data.classes import format_class_name
from igpt.metric.result import Bars, Curve, Grid, MarkedLines
from igpt.report.captions import LINE, caption_metadata, draw_captions, replace_unknown
from igpt.utils import files

CELL = 96  # pixels a side that an image is shown at, at least
GAP = 6
WHITE = 255  # of every channel
INK = (60, 60, 60)
AROUND_COLOURS = (200, 215, 235)
DPI = 130
COUNTED, NAMED = 30, 100  # maximal classes of a confusion matrix with counts in its cells, with names at its rows
LONGEST_LABEL = 24  # characters
LITERAL = matplotlib.rc_context({"text.parse_math": False})  # decorator: a $ in a name is a dollar sign
CELLS = "cells"  # PNG metadata of a matrix: left, top, width, height of its cells, as shares of the picture


def draw_grid(grid: Grid) -> Image.Image:
    """The images of a grid on white, titles above, captions below; each pixel enlarged by an integer factor."""
    side, columns = grid.images.shape[2], grid.images.shape[1]
    captions = [caption.split("\n") for caption in grid.captions]
    below = LINE * max(map(len, captions), default=0)  # pixels
    scale = 2 * -(-CELL // (2 * side))  # even, so that pixels stay squares at half size
    cell, head = side * scale, 22 if grid.titles else 0
    cells = grid.images.repeat(scale, axis=2).repeat(scale, axis=3)
    pixels = _mosaic(np.pad(cells, ((0, 0), (0, 0), (GAP, below), (GAP, 0), (0, 0)), constant_values=WHITE))
    picture = Image.fromarray(np.pad(pixels, ((head, GAP), (0, GAP), (0, 0)), constant_values=WHITE))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for column, title in enumerate(grid.titles):
        pen.text((GAP + column * (cell + GAP) + cell // 2, 5), title, fill=INK, font=font, anchor="ma")
    draw_captions(pen, captions, columns, cell, GAP, head)
    return picture


def grid_picture(path: Path, grid: Grid) -> None:
    """Writes `draw_grid` as PNG, with the captions in its metadata."""
    with files.atomic_path(path) as temporary:
        draw_grid(grid).save(temporary, format="PNG", pnginfo=caption_metadata(grid))


def palette_picture(path: Path, colours: np.ndarray) -> None:
    """Writes every colour of a palette, (k, 3) uint8, as a square, in token order from the top left.

    Separated by lines, and with no squares after the last, so that a white colour is visible.
    """
    columns = int(np.ceil(np.sqrt(len(colours))))
    rows, side = -(-len(colours) // columns), max(6, 384 // columns)
    squares = np.full((rows * columns, side, side, 3), AROUND_COLOURS, dtype=np.uint8)
    squares[: len(colours), 1:-1, 1:-1] = colours[:, None, None]
    with files.atomic_path(path) as temporary:
        Image.fromarray(_mosaic(squares.reshape(rows, columns, side, side, 3))).save(temporary, format="PNG")


def _mosaic(tiles: np.ndarray) -> np.ndarray:
    """One picture of tiles (rows, columns, height, width, 3)."""
    rows, columns, height, width, _ = tiles.shape
    return tiles.swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def group_by_unit(curves: Mapping[str, Curve], *, least: int = 1) -> dict[tuple[str, str], dict[str, Curve]]:
    """Curves grouped by units, (x unit, y unit) → name → curve; those of fewer than `least` points are left out."""
    groups: dict[tuple[str, str], dict[str, Curve]] = {}
    for name, curve in curves.items():
        if len(curve.x) >= least:
            groups.setdefault((curve.x_unit, curve.y_unit), {})[name] = curve
    return groups


@LITERAL
def curves_figure(path: Path, curves: Mapping[str, Curve]) -> None:
    """Writes one plot for each pair of units, stacked, more than four in two columns; no curve of a single point."""
    groups = group_by_unit(curves, least=2)
    columns = 1 if len(groups) <= 4 else 2
    rows = -(-len(groups) // columns) or 1
    figure = Figure(figsize=(7 * columns, 4 * rows), layout="constrained")
    for place, ((x_unit, y_unit), lines) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for name, curve in lines.items():
            (line,) = axes.plot(curve.x, curve.y, label=name, lw=1.4, marker="o" if len(curve.x) <= 65 else None, ms=3)
            ink = line.get_color()
            if curve.x_intervals is not None or curve.y_intervals is not None:
                x_reach, y_reach = (
                    None if ends is None else _reach(values, ends)
                    for values, ends in ((curve.x, curve.x_intervals), (curve.y, curve.y_intervals))
                )
                axes.errorbar(curve.x, curve.y, y_reach, x_reach, fmt="none", lw=0.9, capsize=2, color=ink)
            if curve.best is not None:
                top = int(np.argmax(curve.y))
                reach = _reach([curve.x[top]], [curve.best])
                axes.errorbar(curve.x[top], curve.y[top], xerr=reach, fmt="*", ms=11, lw=1.4, capsize=4, color=ink)
        if any(curve.best is not None for curve in lines.values()):
            axes.plot([], [], "*-", ms=9, lw=1.4, color="black", label=f"best {x_unit}, with its 95 % interval")
        axes.set(xlabel=x_unit, ylabel=y_unit)
        if all(float(x).is_integer() for curve in lines.values() for x in curve.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    _save(path, figure)


@LITERAL
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
            axes.text(middle, 0, f"{height:.3f}", ha="center", va="bottom", color=ink, fontsize=9)
    axes.set_xticks(range(len(bars.heights)), [textwrap.fill(group, 20) for group in bars.heights])
    has_intervals = any(of.confidence_interval for group in bars.heights.values() for of in group.values())
    axes.set_ylabel(bars.y_unit + (", with 95 % intervals" if has_intervals else ""))
    if bars.parts:
        axes.bar([0], [0], color="C0", alpha=0.6, ec="black", lw=0.8, label=part_label)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    _save(path, figure)


@LITERAL
def lines_figure(path: Path, lines: MarkedLines) -> None:
    """Writes the lines with their markers and intervals, the title above."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.points.items():
        values = [number.value for _, number in points]
        reach = _reach(values, [number.confidence_interval for _, number in points])
        axes.errorbar(
            [x for x, _ in points], values, reach, marker="o", ms=5, lw=1.4, elinewidth=0.8, capsize=2, label=name
        )
    axes.set(xlabel=lines.x_unit, ylabel=lines.y_unit)
    axes.set_title("\n".join(textwrap.wrap(lines.title, 84)), fontsize=10)
    if lines.x_falls:
        axes.invert_xaxis()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(path, figure)


@dataclass(frozen=True)
class Point:
    """One line of `points_figure`."""

    name: str
    value: float
    single: tuple[float, ...]  # the values it is the mean of
    interval: tuple[float, float] | None
    kind: str  # description of the interval, for the legend; one colour each


@LITERAL
def points_figure(path: Path, points: Sequence[Point], *, label: str) -> None:
    """Writes a dot plot, the first point on top: values, intervals, and the single values behind each mean."""
    names = [textwrap.fill(point.name, 44) for point in points]
    height = 1.4 + 0.3 * len(points) + 0.14 * sum(name.count("\n") for name in names)
    label = "\n".join(textwrap.fill(line, 92) for line in label.splitlines())
    figure = Figure(figsize=(8, height + 0.2 * label.count("\n")), layout="constrained")
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
    axes.set_yticks(range(len(points)), names, fontsize=8)
    axes.set(ylim=(len(points) - 0.4, -0.6))
    figure.supxlabel(label, fontsize=10)  # below the whole figure: the axes are narrower than a long line
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, ncols=len(kinds))
    _save(path, figure)


@dataclass(frozen=True)
class PlanePoint:
    """One point of `plane_figure`, with its 95 % intervals, if known."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None
    y_interval: tuple[float, float] | None


@LITERAL
def plane_figure(path: Path, points: Sequence[PlanePoint], *, x_label: str, y_label: str) -> None:
    """Writes points in a plane with their intervals; each is named at the right, in its order from the top."""
    points = sorted(points, key=lambda point: -point.y)
    figure = Figure(figsize=(9, max(4.5, 1.5 + 0.24 * len(points))), layout="constrained")
    axes = figure.add_subplot()
    low, high = (f([end for p in points for end in (p.y_interval or (p.y, p.y))]) for f in (min, max))
    margin = 0.04 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    heights = np.linspace(0.98, 0.02, len(points)) if len(points) > 1 else [0.5]
    for i, (point, height) in enumerate(zip(points, heights, strict=True)):
        x_reach, y_reach = _reach([point.x], [point.x_interval]), _reach([point.y], [point.y_interval])
        ink = f"C{i % 10}"
        axes.errorbar(point.x, point.y, y_reach, x_reach, fmt="o", ms=5, capsize=3, lw=0.9, color=ink)
        axes.annotate(
            textwrap.shorten(point.name, 44, placeholder="…"), (point.x, point.y), (1.04, height),
            textcoords="axes fraction", va="center", fontsize=8.5, color=ink,
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": ink, "alpha": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _save(path, figure)


def _reach(values: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> np.ndarray:
    """Distances from each value to the ends of its interval, (2, n), for matplotlib; 0 without an interval."""
    ends = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    return np.transpose(np.abs(np.array(ends) - np.array(values)[:, None]))


@LITERAL
def matrix_figure(path: Path, matrix: np.ndarray, class_names: Sequence[str] | None = None) -> None:
    """Writes a confusion matrix (K, K) of counts, row: true class, column: predicted; coloured by share of the row.

    Classes have names where there is room, else numbers. The position of the cells is in the PNG's metadata.
    """
    k = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    labels = None if class_names is None else [fit_name(name, i) for i, name in enumerate(class_names)]
    each = k <= COUNTED or (labels is not None and k <= NAMED)  # whether every row has its tick
    labels = [str(i) for i in range(k)] if labels is None else labels
    size = 10 if k <= COUNTED else 6  # of the labels, in points
    longest = max(map(len, labels), default=0) if each else 3
    label_inches = 0.6 * size / 72 * longest  # inches
    side = min(14.0, max(4.0, 0.45 * k + 1.5)) + max(0.0, label_inches - 0.2)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=DPI)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if each:
        upright = label_inches > 0.8 * max(3.0, 0.45 * k) / k  # labels wider than a column
        axes.set_xticks(range(k), labels, fontsize=size, rotation=90 if upright else 0)
        axes.set_yticks(range(k), labels, fontsize=size)
    if k <= COUNTED:
        for (row, column), share in np.ndenumerate(shares):
            if matrix[row, column]:
                ink = "white" if share > 0.5 else "black"
                axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlabel="taken for class", ylabel="class")
    axes.spines[:].set_visible(False)
    _save(path, figure, cells=axes)


def fit_name(name: str, number: int) -> str:
    """A class's name with □ for characters that the font lacks; its number if only these are left."""
    drawn = replace_unknown(format_class_name(name, most=LONGEST_LABEL))
    return drawn if any(c not in "□ …" for c in drawn) else str(number)


def _save(path: Path, figure: Figure, *, cells: Axes | None = None) -> None:
    """Writes a figure as PNG; the position of the axes `cells` goes into its metadata."""
    with files.atomic_path(path) as temporary, matplotlib.rc_context({"font.size": 10}):
        metadata = {}
        if cells is not None:
            figure.draw_without_rendering()  # computes the layout, which is then fixed
            figure.set_layout_engine("none")
            box = cells.get_position()
            metadata = {CELLS: f"{box.x0:.6f} {1 - box.y1:.6f} {box.width:.6f} {box.height:.6f}"}
        figure.savefig(temporary, format="png", dpi=DPI, metadata=metadata)
