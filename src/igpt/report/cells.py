"""A confusion matrix → what a page says of the cell under the pointer: where the cells lie, names, counts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from igpt.data.classes import format_class_name
from igpt.report.figures import CELLS
from igpt.report.pictures import DAMAGED

log = logging.getLogger(__name__)

MOST_CLASSES = 2000  # of which the cells are told apart
MOST_COUNTS = 100_000  # cells that are not empty: more would make the page heavy


@dataclass(frozen=True)
class Cells:
    """The cells of a picture of counts (K, K): `box` is left, top, width and height, in percent of the picture."""

    box: tuple[float, float, float, float]
    k: int
    counts: str  # rows by ";", in each the cells that are not empty as column:count; "" where there are too many
    names: list[str] | None  # of the classes


def read_cells(picture: Path, counts: Path, names: Sequence[str] | None) -> Cells | None:
    """The cells of a picture that `matrix_figure` drew, and the counts beside it.

    None where the picture does not say where they lie (an older one), or one of the two files is no such file.
    """
    try:
        with Image.open(picture, formats=("PNG",)) as image:
            said = image.info.get(CELLS)
        if said is None:
            return None
        left, top, width, height = (float(share) for share in str(said).split())
        if not (0 <= left < left + width <= 1.001 and 0 <= top < top + height <= 1.001):
            raise ValueError("the cells lie outside of the picture")
        matrix = np.load(counts, mmap_mode="r", allow_pickle=False)
        if not isinstance(matrix, np.memmap) or matrix.dtype.kind not in "iu" or matrix.shape != (len(matrix),) * 2:
            raise ValueError(f"{counts} holds no counts")
        if not 1 <= len(matrix) <= MOST_CLASSES:
            raise ValueError(f"{len(matrix):,} classes are too many to be told apart")
    except (*DAMAGED, TypeError, OverflowError, BadZipFile) as error:
        log.debug("%s is shown without what is under the pointer: %s", picture, error)
        return None
    k = len(matrix)
    known = None if names is None or len(names) != k else [format_class_name(name) for name in names]
    box = (100 * left, 100 * top, 100 * width, 100 * height)
    return Cells(box, k, _sparse(matrix) if np.count_nonzero(matrix) <= MOST_COUNTS else "", known)


def _sparse(matrix: np.ndarray) -> str:
    return ";".join(",".join(f"{column}:{row[column]}" for column in np.flatnonzero(row)) for row in matrix)
