"""Picture files → data embedded in a page: checked, reduced to a size limit, or replaced by a message."""

import base64
import io
import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from igpt.data.classes import format_class_name
from igpt.report.class_table import read_counts
from igpt.report.style import CELLS

log = logging.getLogger(__name__)

SMALLEST = 160  # pixels of the shorter side: minimum after shrinking
WIDE, HIGH = 460, 560  # pixels: a larger picture is shown at half its size, to fit the screen
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MOST_PIXELS, MOST_BYTES = 40_000_000, 100_000_000  # of a picture that is opened: it takes 160 MB of memory
MOST_COUNTS = 100_000  # maximal non-empty cells, to limit the page's size


@dataclass(frozen=True)
class MatrixCells:
    """The cells of a picture of counts (K, K): `box` is left, top, width and height, in percent of the picture."""

    box: list[float]
    k: int
    counts: str  # rows separated by ";", each the non-empty cells as column:count; "" if there are too many
    names: list[str]  # class names; empty if not known


@dataclass(frozen=True)
class Picture:
    """A picture file with title and caption. `png` is the file's content, empty if it cannot be shown (see `note`)."""

    title: str
    caption: str
    path: Path
    shown_path: str  # path shown on the page
    cells: MatrixCells | None = None
    png: bytes = b""
    width: int = 0
    height: int = 0
    pixels: bool = True  # images, as opposed to a diagram
    note: str = ""  # message if it is missing, damaged or shrunk

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) on the page: the picture's, or exactly half if it is large, so that pixels stay squares.

        Never half for diagrams and pictures with text: completions, images beside their palette version.
        """
        is_complete = not self.pixels or self.path.stem.endswith(("completions", "images"))
        by = 1 if is_complete or (self.width <= WIDE and self.height <= HIGH) else 2
        return self.width // by, self.height // by


def data_uri(picture: bytes | np.ndarray) -> str:
    """A data: URI of a PNG file's content, or of pixels (R, R, 3) uint8."""
    png = picture if isinstance(picture, bytes) else encode_png(Image.fromarray(picture))
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def encode_png(image: Image.Image, **how: bool) -> bytes:
    """A picture encoded as PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG", **how)
    return file.getvalue()


def embed(pictures: Sequence[Picture], *, budget: int) -> list[Picture]:
    """The pictures with their data, at most `budget` bytes in total: the largest is halved, and in the end dropped."""
    read = [_read(picture) for picture in pictures]
    while sum(len(picture.png) for picture in read) > budget:
        place = max(range(len(read)), key=lambda i: len(read[i].png))
        read[place] = _halve(read[place])
    return read


def _read(picture: Picture) -> Picture:
    if not picture.path.is_file():
        return replace(picture, note="is not there any more")
    try:
        with Image.open(picture.path, formats=("PNG",)) as image:
            if math.prod(image.size) > MOST_PIXELS or picture.path.stat().st_size > MOST_BYTES:
                return replace(picture, note="is too large to be shown here")
            image.load()  # raises on a truncated file
            diagram = str(image.info.get("Software", "")).startswith("Matplotlib")
            width, height = image.size
        return replace(picture, png=picture.path.read_bytes(), width=width, height=height, pixels=not diagram)
    except (*DAMAGED, Image.DecompressionBombWarning) as error:
        return replace(picture, note=f"cannot be read ({type(error).__name__}): it is damaged")


def _halve(picture: Picture) -> Picture:
    """The picture at half its width and height; without data if that is below SMALLEST."""
    width, height = picture.width // 2, picture.height // 2
    if min(width, height) < SMALLEST:
        return replace(picture, png=b"", note="is left out, so that this page stays small")
    with Image.open(io.BytesIO(picture.png)) as image:
        plain = image.convert("RGB" if image.mode in ("P", "PA") else image.mode)
    how = Image.Resampling.NEAREST if picture.pixels else Image.Resampling.LANCZOS
    png = encode_png(plain.resize((width, height), how), optimize=True)
    message = "is shown smaller than it is, so that this page stays small"
    return replace(picture, png=png, width=width, height=height, note=message)


def read_cells(picture: Path, counts: Path, names: Sequence[str] | None) -> MatrixCells | None:
    """The cells of a picture of `matrix_figure`, with the counts of the .npy file beside it.

    None for an older picture without cell positions, and if one of the files cannot be read.
    """
    try:
        if not (picture.is_file() and counts.is_file()):
            raise FileNotFoundError("one of the files is gone, or is no file")
        with Image.open(picture, formats=("PNG",)) as image:
            left, top, width, height = map(float, image.info[CELLS].split())
        matrix = read_counts(counts)
    except (*DAMAGED, KeyError, AttributeError, TypeError, OverflowError) as error:
        log.debug("%s is shown without what is under the pointer: %r", picture, error)
        return None
    counted = matrix if np.count_nonzero(matrix) <= MOST_COUNTS else ()
    rows = [",".join(f"{column}:{row[column]}" for column in np.flatnonzero(row)) for row in counted]
    known = [format_class_name(name) for name in names or ()]
    k = len(matrix)
    box = [100 * left, 100 * top, 100 * width, 100 * height]
    return MatrixCells(box, k, ";".join(rows), known if len(known) == k else [])
