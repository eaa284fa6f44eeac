"""What a run found out: numbers with units, curves, pictures, files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Number:
    """A measured value with its unit, how many it was measured on, and, where known, how sure it is."""

    value: float
    unit: str
    n: int
    stderr: float | None = None
    interval: tuple[float, float] | None = None  # that holds it with 95 %
    deviation: float | None = None  # standard deviation of the n values this is the mean of


@dataclass(frozen=True)
class Curve:
    """One line of a plot: y over x."""

    x: list[float]
    y: list[float]
    x_unit: str
    y_unit: str


@dataclass(frozen=True)
class Grid:
    """Images to look at side by side: rows × columns of (R, R, 3) uint8, with a word over each column."""

    images: np.ndarray  # (rows, columns, R, R, 3)
    titles: tuple[str, ...] = ()

    @staticmethod
    def square(images: np.ndarray) -> "Grid":
        """Images (N, R, R, 3) in as many rows as columns, or one row less; gaps are white."""
        n = len(images)
        columns = int(np.ceil(np.sqrt(n)))
        rows = -(-n // columns)
        filled = np.full((rows * columns, *images.shape[1:]), 255, dtype=np.uint8)
        filled[:n] = images
        return Grid(filled.reshape(rows, columns, *images.shape[1:]))


@dataclass(frozen=True)
class Bars:
    """Bars side by side: for every group (a protocol) one for each series (an objective)."""

    heights: dict[str, dict[str, Number]]  # group → series → height, with its interval where it has one
    y_unit: str


@dataclass
class Result:
    """What a task returns; `report` writes it. Keys are `split/name`, as in `val/loss_gen`."""

    numbers: dict[str, Number] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    palettes: dict[str, np.ndarray] = field(default_factory=dict)  # name → (k, 3) uint8
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # name → tokens, kept as name_tokens.npy
    bars: dict[str, Bars] = field(default_factory=dict)
    matrices: dict[str, np.ndarray] = field(default_factory=dict)  # name → (K, K) counts: row true, column taken for
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name of a matrix → of its classes, if known
    files: dict[str, Path] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def add_confusion(self, counts: np.ndarray, class_names: tuple[str, ...] | None) -> None:
        """The confusion matrix (K, K) of what was judged last, and what its classes are called."""
        self.matrices["confusion"] = counts
        if class_names is not None:
            self.class_names["confusion"] = class_names
