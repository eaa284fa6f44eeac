"""A confusion matrix → PNG."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from igpt.data.classes import format_class_name, label_classes
from igpt.report.style import DPI, SHARES, SMALL, save_figure, styled

COUNTED, NAMED = 30, 100  # maximal classes of a confusion matrix with counts in its cells, with names at its rows
LONGEST_LABEL = 24  # characters


@styled
def matrix_figure(path: Path, matrix: np.ndarray, class_names: Sequence[str] | None = None) -> None:
    """Writes a confusion matrix (K, K) of counts, row: true class, column: predicted; coloured by share of the row.

    Up to NAMED classes have their names, `class 3` without one, more have numbers; counts are written where they fit.
    The position of the cells is in the PNG's metadata.
    """
    k = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    labels = [fit_name(name, i) for i, name in enumerate(label_classes(k, class_names))]
    each = k <= NAMED  # whether every row has its tick
    size = 10 if k <= COUNTED else 6  # of the labels, in points
    longest = max(map(len, labels), default=0) if each else 3
    label_inches = 0.6 * size / 72 * longest  # inches
    side = min(14.0, max(4.0, 0.45 * k + 1.5)) + max(0.0, label_inches - 0.2)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=DPI)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap=SHARES, vmin=0, vmax=1)
    if each:
        upright = label_inches > 0.8 * max(3.0, 0.45 * k) / k  # labels wider than a column
        axes.set_xticks(range(k), labels, fontsize=size, rotation=90 if upright else 0)
        axes.set_yticks(range(k), labels, fontsize=size)
    if k <= COUNTED:
        for (row, column), share in np.ndenumerate(shares):
            if matrix[row, column]:
                ink = "white" if share > 0.5 else "black"
                axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=SMALL, color=ink)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(path, figure, cells=axes)


def fit_name(name: str, number: int) -> str:
    """A class's name with □ for characters that the font lacks; `class 3` if only these are left."""
    shown = format_class_name(name, most=LONGEST_LABEL)
    known = _characters()
    drawn = "".join(c if ord(c) in known and unicodedata.bidirectional(c) not in ("R", "AL") else "□" for c in shown)
    return drawn if any(c not in "□ …" for c in drawn) else f"class {number}"


@cache
def _characters() -> frozenset[int]:
    """Code points of the figures' font."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
