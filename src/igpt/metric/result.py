"""Results of a task: numbers with units, curves, images, files."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Number:
    """A measured value with its unit, sample size n and, where known, its uncertainty."""

    value: float
    unit: str
    n: int
    stderr: float | None = None
    interval: tuple[float, float] | None = None  # 95 % confidence interval
    deviation: float | None = None  # standard deviation of the n values, if `value` is their mean
    features: str = ""  # features that classes were read from: "layer 3", "layers 2, 3, 4", "raw pixels"

    @property
    def confidence_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval: `interval`, else value ± 1.96 standard errors; None if neither is known."""
        if self.interval is not None or self.stderr is None:
            return self.interval
        return self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr


def find_key(keys: Iterable[str], name: str) -> str | None:
    """`name` if it is one of the keys; else the only key that ends with it, `stage/name` of a pipeline; else None."""
    keys = list(keys)
    longer = [key for key in keys if key.endswith(f"/{name}")]
    return name if name in keys else longer[0] if len(longer) == 1 else None


@dataclass(frozen=True)
class Curve:
    """One line of a plot: y over x."""

    x: list[float]
    y: list[float]
    x_unit: str
    y_unit: str
    x_intervals: list[tuple[float, float]] | None = None  # 95 % confidence intervals
    y_intervals: list[tuple[float, float]] | None = None
    y_deviations: list[float] | None = None  # standard deviations of the values whose means y are
    best: tuple[float, float] | None = None  # 95 % interval of the x where y is highest


@dataclass(frozen=True)
class Grid:
    """A grid of (R, R, 3) uint8 images, with a title over each column or row, and a caption under each image."""

    images: np.ndarray  # (rows, columns, R, R, 3)
    titles: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()  # one per image, row by row, of one or several lines; fewer leave the last without
    row_titles: tuple[str, ...] = ()

    @staticmethod
    def square(images: np.ndarray) -> "Grid":
        """Grid of images (N, R, R, 3) with as many rows as columns, or one fewer; gaps are white."""
        n = len(images)
        columns = int(np.ceil(np.sqrt(n)))
        rows = -(-n // columns)
        filled = np.full((rows * columns, *images.shape[1:]), 255, dtype=np.uint8)
        filled[:n] = images
        return Grid(filled.reshape(rows, columns, *images.shape[1:]))


@dataclass(frozen=True)
class Bars:
    """Grouped bars: for every group (a protocol) one bar per series (an objective)."""

    heights: dict[str, dict[str, Number]]  # group → series → height
    y_unit: str
    parts: dict[str, dict[str, Number]] = field(default_factory=dict)  # group → series → a height inside the bar
    part_name: str = ""  # of those, for the legend


@dataclass(frozen=True)
class MarkedLines:
    """Lines with a marker at each point, and its 95 % interval where known."""

    points: dict[str, list[tuple[float, Number]]]  # line → (x, y) of each point, in order
    x_unit: str
    y_unit: str
    title: str
    x_falls: bool = False  # the largest x is at the left


@dataclass(frozen=True)
class Scatter:
    """Points of a plane, each of a class or of none."""

    points: np.ndarray  # (N, 2)
    classes: np.ndarray  # (N,) int64; -1: none
    class_names: tuple[str, ...]  # by class
    x_label: str
    y_label: str
    title: str = ""


@dataclass
class Result:
    """Return value of a task; `report` writes it. Keys are `split/name`, as in `val/loss_gen`."""

    numbers: dict[str, Number] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    palettes: dict[str, np.ndarray] = field(default_factory=dict)  # name → (k, 3) uint8
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # name → tokens, saved as name_tokens.npy
    bars: dict[str, Bars] = field(default_factory=dict)
    lines: dict[str, MarkedLines] = field(default_factory=dict)
    charts: dict[str, dict[str, Curve]] = field(default_factory=dict)  # picture → its curves
    scatters: dict[str, Scatter] = field(default_factory=dict)
    matrices: dict[str, np.ndarray] = field(default_factory=dict)  # name → (K, K) counts: row true, column predicted
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # matrix name → its class names, if known
    files: dict[str, Path] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def early_stops(self) -> list[str]:
        """What the provenance says of trainings that ended before their last step; of a pipeline, with the stage."""
        return self._list_remarks("stopped_early")

    @property
    def warnings(self) -> list[str]:
        """What the provenance warns of; of a pipeline, with the stage."""
        return self._list_remarks("warning")

    def _list_remarks(self, key: str) -> list[str]:
        nested = {f"{stage}: ": of for stage, of in self.provenance.items() if isinstance(of, dict)}
        remarks = {who: of.get(key) for who, of in {"": self.provenance, **nested}.items()}
        return [f"{who}{remark}" for who, remark in remarks.items() if isinstance(remark, str)]

    def add_confusion(self, counts: np.ndarray, class_names: tuple[str, ...] | None) -> None:
        """Adds the confusion matrix (K, K) and, if known, its class names."""
        self.matrices["confusion"] = counts
        if class_names is not None:
            self.class_names["confusion"] = class_names
