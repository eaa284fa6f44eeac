"""Arrays → pictures: grids of images, palettes, curves."""

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from igpt import files
from igpt.data.classes import format_class_name
from igpt.metric.result import Bars, Curve, Grid

CELL = 96  # pixels a side that an image is shown at, at least
GAP = 6
BACKGROUND = (255, 255, 255)
INK = (60, 60, 60)
AROUND_COLOURS = (200, 215, 235)
DPI = 130
COUNTED, NAMED = 30, 100  # classes of a confusion matrix at most whose cells are counted, and whose rows are named
LONGEST_LABEL = 24  # characters
CELLS = "cells"  # in a picture of a matrix: left, top, width and height of its cells, as shares of the picture


def draw_grid(grid: Grid) -> Image.Image:
    """The images of a grid with white between them and titles above, each pixel enlarged to a whole square."""
    rows, columns, side = grid.images.shape[:3]
    scale = 2 * -(-CELL // (2 * side))  # even: at half the size each pixel is a whole square still
    cell = side * scale
    head = 22 if grid.titles else 0
    size = (columns * (cell + GAP) + GAP, rows * (cell + GAP) + GAP + head)
    picture = Image.new("RGB", size, BACKGROUND)
    for row in range(rows):
        for column in range(columns):
            tile = Image.fromarray(grid.images[row, column]).resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(tile, (GAP + column * (cell + GAP), GAP + head + row * (cell + GAP)))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for column, title in enumerate(grid.titles):
        middle = GAP + column * (cell + GAP) + cell // 2
        pen.text((middle, 5), title, fill=INK, font=font, anchor="ma")
    return picture


def grid_picture(path: Path, grid: Grid) -> None:
    """Writes `draw_grid` as PNG."""
    _save(path, draw_grid(grid))


def palette_picture(path: Path, colours: np.ndarray) -> None:
    """Writes every colour of a palette, (k, 3) uint8, as a square, in token order from the top left.

    Lines between the squares, and no square where there is no colour, tell a white one from none.
    """
    columns = int(np.ceil(np.sqrt(len(colours))))
    rows = -(-len(colours) // columns)
    scale = max(6, 384 // columns)
    picture = Image.new("RGB", (columns * scale, rows * scale), AROUND_COLOURS)
    pen = ImageDraw.Draw(picture)
    for token, colour in enumerate(colours.tolist()):
        top, left = token // columns * scale, token % columns * scale
        pen.rectangle((left + 1, top + 1, left + scale - 2, top + scale - 2), fill=tuple(colour))
    _save(path, picture)


def curves_figure(path: Path, curves: dict[str, Curve]) -> None:
    """Writes a plot for each pair of units, below each other; curves of one point are left to the numbers."""
    plots: dict[tuple[str, str], dict[str, Curve]] = {}
    for name, curve in curves.items():
        if len(curve.x) > 1:
            plots.setdefault((curve.x_unit, curve.y_unit), {})[name] = curve
    figure = Figure(figsize=(7, 4 * max(1, len(plots))), layout="constrained")
    for place, ((x_unit, y_unit), lines) in enumerate(plots.items(), start=1):
        axes = figure.add_subplot(len(plots), 1, place)
        for name, curve in lines.items():
            axes.plot(curve.x, curve.y, label=name, linewidth=1.4, marker="o" if len(curve.x) <= 65 else None, ms=3)
        axes.set_xlabel(x_unit)
        axes.set_ylabel(y_unit)
        if all(float(x).is_integer() for curve in lines.values() for x in curve.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_path(path) as temporary, matplotlib.rc_context({"font.size": 10}):
        figure.savefig(temporary, format="png", dpi=DPI)


def bars_figure(path: Path, bars: Bars) -> None:
    """Writes groups of bars with their 95 % intervals and their heights in figures."""
    series = list(dict.fromkeys(name for group in bars.heights.values() for name in group))
    figure = Figure(figsize=(max(4.5, 2.2 * len(bars.heights)), 4), layout="constrained")
    axes = figure.add_subplot()
    width, named = 0.8 / len(series), set[str]()
    for place, name in enumerate(series):
        for column, group in enumerate(bars.heights.values()):
            if name not in group:
                continue
            number, x = group[name], column + (place - (len(series) - 1) / 2) * width
            axes.bar(x, number.value, 0.92 * width, color=f"C{place}", label=None if name in named else name)
            named.add(name)
            low, high = number.interval or (number.value, number.value)
            axes.errorbar(
                x, number.value, [[number.value - low], [high - number.value]], color="black", capsize=3, lw=1
            )
            axes.text(x, 0, f"{number.value:.3f}", ha="center", va="bottom", color="white", fontsize=9)
    axes.set_xticks(range(len(bars.heights)), list(bars.heights))
    axes.set_ylabel(bars.y_unit)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_path(path) as temporary, matplotlib.rc_context({"font.size": 10}):
        figure.savefig(temporary, format="png", dpi=DPI)


@dataclass(frozen=True)
class Point:
    """One line of `points_figure`."""

    name: str
    value: float
    single: tuple[float, ...]  # what it is the mean of
    interval: tuple[float, float] | None
    kind: str  # what the interval is; one colour each


def points_figure(path: Path, points: Sequence[Point], *, label: str) -> None:
    """Writes values below one another, the first on top, with their intervals and what they are the means of."""
    names = [textwrap.fill(point.name, 44) for point in points]
    height = 1.4 + 0.3 * len(points) + 0.14 * sum(name.count("\n") for name in names)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(point.kind for point in points))
    for row, point in enumerate(points):
        colour = f"C{kinds.index(point.kind)}"
        low, high = point.interval or (point.value, point.value)
        axes.errorbar(
            point.value, row, xerr=[[point.value - low], [high - point.value]], fmt="o", ms=6, capsize=4, lw=1.6,
            color=colour, label=point.kind if point.kind not in [p.kind for p in points[:row]] else None,
        )  # fmt: skip
        if len(point.single) > 1:
            axes.plot(point.single, [row] * len(point.single), "|", ms=9, color="black", lw=1)
    axes.set_yticks(range(len(points)), names, fontsize=8)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, ncols=len(kinds))
    with files.atomic_path(path) as temporary, matplotlib.rc_context({"font.size": 10}):
        figure.savefig(temporary, format="png", dpi=DPI)


def matrix_figure(path: Path, matrix: np.ndarray, class_names: Sequence[str] | None = None) -> None:
    """Writes counts (K, K), row: the true class, column: what it was taken for, as shares of each row.

    Classes are named where there is room for names, else numbered. The file says where in it the cells lie.
    """
    k = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    labels = None if class_names is None else [drawn_name(name, i) for i, name in enumerate(class_names)]
    each = k <= COUNTED or (labels is not None and k <= NAMED)  # whether every row has its tick
    labels = [str(i) for i in range(k)] if labels is None else labels
    size = 10 if k <= COUNTED else 6  # of the labels, in points
    longest = max(map(len, labels), default=0) if each else 3
    room = 0.6 * size / 72 * longest  # inches
    side = min(14.0, max(4.0, 0.45 * k + 1.5)) + max(0.0, room - 0.2)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=DPI)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if each:
        upright = room > 0.8 * max(3.0, 0.45 * k) / k  # too wide for a column
        axes.set_xticks(range(k), labels, fontsize=size, rotation=90 if upright else 0, parse_math=False)
        axes.set_yticks(range(k), labels, fontsize=size, parse_math=False)
    if k <= COUNTED:
        for (row, column), share in np.ndenumerate(shares):
            if matrix[row, column]:
                ink = "white" if share > 0.5 else "black"
                axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=ink)
    axes.set_xlabel("taken for class")
    axes.set_ylabel("class")
    axes.spines[:].set_visible(False)
    with files.atomic_path(path) as temporary, matplotlib.rc_context({"font.size": 10}):
        figure.draw_without_rendering()  # lays it out, from here on the cells stay where they are
        figure.set_layout_engine("none")
        box = axes.get_position()
        cells = f"{box.x0:.6f} {1 - box.y1:.6f} {box.width:.6f} {box.height:.6f}"
        figure.savefig(temporary, format="png", metadata={CELLS: cells})


def drawn_name(name: str, number: int) -> str:
    """A class's name as the figures' font can write it, a square for what it cannot; of nothing else, its number."""
    shown = format_class_name(name, most=LONGEST_LABEL)
    known = _characters()
    drawn = "".join(c if ord(c) in known and unicodedata.bidirectional(c) not in ("R", "AL") else "□" for c in shown)
    return drawn if any(c not in "□ …" for c in drawn) else str(number)


@cache
def _characters() -> frozenset[int]:
    """What the font of the figures can write."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _save(path: Path, image: Image.Image) -> None:
    with files.atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
