"""Picture files → what a page carries of them: checked, within a size, or a word on why not."""

import base64
import io
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from igpt.data.classes import format_class_name
from igpt.report.figures import CELLS

log = logging.getLogger(__name__)

SMALLEST = 160  # pixels of the shorter side: no picture is shrunk below
WIDE, HIGH = 460, 560  # pixels: what is larger is shown at half its size, so that one sees all of it at once
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MOST_CLASSES = 2000  # of a confusion matrix, whose cells are told apart
MOST_COUNTS = 100_000  # cells that are not empty: more would make the page heavy


@dataclass(frozen=True)
class MatrixCells:
    """The cells of a picture of counts (K, K): `box` is left, top, width and height, in percent of the picture."""

    box: list[float]
    k: int
    counts: str  # rows by ";", in each the cells that are not empty as column:count; "" where there are too many
    names: list[str]  # of the classes, where they are known


@dataclass(frozen=True)
class Picture:
    """A picture file and what it shows. `png` is the file, empty where it cannot be shown: `said` is why."""

    title: str
    caption: str
    path: Path
    shown_path: str  # as the page names it
    cells: MatrixCells | None = None
    png: bytes = b""
    width: int = 0
    height: int = 0
    pixels: bool = True  # images pixel by pixel, not a diagram
    said: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page: the picture's, or exactly half, so that its pixels stay squares.

        Never half where there are words in it: of completions, and of images beside their palette's.
        """
        whole = not self.pixels or self.path.stem.endswith(("completions", "images"))
        by = 1 if whole or (self.width <= WIDE and self.height <= HIGH) else 2
        return self.width // by, self.height // by


def data_uri(picture: bytes | np.ndarray) -> str:
    """An address that holds a picture whole: of a PNG file's content, or of pixels (R, R, 3) uint8."""
    png = picture if isinstance(picture, bytes) else encode_png(Image.fromarray(picture))
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def encode_png(image: Image.Image, **how: bool) -> bytes:
    """A picture as a PNG file's content."""
    file = io.BytesIO()
    image.save(file, format="PNG", **how)
    return file.getvalue()


def embedded(pictures: Sequence[Picture], *, budget: int) -> list[Picture]:
    """The pictures with their data, together at most `budget` bytes: the largest are halved, or left out last."""
    read = [_read(picture) for picture in pictures]
    while sum(len(picture.png) for picture in read) > budget:
        place = max(range(len(read)), key=lambda i: len(read[i].png))
        read[place] = _halved(read[place])
    return read


def _read(picture: Picture) -> Picture:
    if not picture.path.is_file():
        return replace(picture, said="is not there any more")
    try:
        with Image.open(picture.path, formats=("PNG",)) as image:
            image.load()  # a file cut short is met here
            diagram = str(image.info.get("Software", "")).startswith("Matplotlib")
            width, height = image.size
        return replace(picture, png=picture.path.read_bytes(), width=width, height=height, pixels=not diagram)
    except DAMAGED as error:
        return replace(picture, said=f"cannot be read ({type(error).__name__}): it is damaged")


def _halved(picture: Picture) -> Picture:
    """At half its size each way, and once more if it was that before; without data where it would be too small."""
    width, height = picture.width // 2, picture.height // 2
    if min(width, height) < SMALLEST:
        return replace(picture, png=b"", said="is left out, so that this page stays small")
    with Image.open(io.BytesIO(picture.png)) as image:
        plain = image.convert("RGB" if image.mode in ("P", "PA") else image.mode)
    how = Image.Resampling.NEAREST if picture.pixels else Image.Resampling.LANCZOS
    png = encode_png(plain.resize((width, height), how), optimize=True)
    said = "is shown smaller than it is, so that this page stays small"
    return replace(picture, png=png, width=width, height=height, said=said)


def read_cells(picture: Path, counts: Path, names: Sequence[str] | None) -> MatrixCells | None:
    """The cells of a picture that `matrix_figure` drew, and the counts beside it.

    None where the picture does not say where they lie (an older one), or one of the two files is no such file.
    """
    try:
        with Image.open(picture, formats=("PNG",)) as image:
            left, top, width, height = map(float, image.info[CELLS].split())
        matrix = np.load(counts, mmap_mode="r", allow_pickle=False)
        k = len(matrix)
        if not isinstance(matrix, np.memmap) or matrix.dtype.kind not in "iu" or matrix.shape != (k, k):
            raise ValueError(f"{counts} holds no counts")
        if not 1 <= k <= MOST_CLASSES:
            raise ValueError(f"{k:,} classes are too many to be told apart")
    except (*DAMAGED, KeyError, AttributeError, TypeError, OverflowError, BadZipFile) as error:
        log.debug("%s is shown without what is under the pointer: %r", picture, error)
        return None
    counted = matrix if np.count_nonzero(matrix) <= MOST_COUNTS else ()
    rows = [",".join(f"{column}:{row[column]}" for column in np.flatnonzero(row)) for row in counted]
    known = [format_class_name(name) for name in names or ()]
    box = [100 * left, 100 * top, 100 * width, 100 * height]
    return MatrixCells(box, k, ";".join(rows), known if len(known) == k else [])
