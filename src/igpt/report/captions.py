"""Captions under the images of a grid: drawn, and kept in the PNG's metadata for the page."""

import json
import unicodedata
from collections.abc import Sequence
from functools import cache

from matplotlib.font_manager import get_font
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from igpt.data.classes import format_class_name
from igpt.metric.result import Grid
from igpt.report.style import find_font, image_font

LINE, SIZE = 14, 11  # pixels: height of a line, size of its characters
INK = (60, 60, 60)
KEY = "captions"  # in the PNG's metadata: a JSON list
MOST, LONGEST = 400, 100  # captions read back from a picture; characters of one


def draw_captions(
    pen: ImageDraw.ImageDraw, captions: Sequence[Sequence[str]], columns: int, cell: int, gap: int, head: int
) -> None:
    """Draws the lines of each caption under its cell, of `cell` pixels a side; `head`: pixels above the first row."""
    font = image_font(SIZE)
    below = LINE * max(map(len, captions), default=0)
    for i, lines in enumerate(captions):
        row, column = divmod(i, columns)
        left, top = gap + column * (cell + gap), head + row * (gap + cell + below) + gap + cell
        for number, line in enumerate(lines):
            pen.text((left, top + 1 + LINE * number), _fit_line(line, font, cell), fill=INK, font=font)


def _fit_line(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text in characters that the font has, cut to a width in pixels."""
    text = replace_unknown(text)
    while text and font.getlength(text) > width:
        text = f"{text.removesuffix('…')[:-1].rstrip()}…" if len(text) > 1 else ""
    return text


def replace_unknown(text: str) -> str:
    """The text with □ for characters that the figures' font lacks, or that are written from right to left."""
    known = _characters()
    return "".join(c if ord(c) in known and unicodedata.bidirectional(c) not in ("R", "AL") else "□" for c in text)


@cache
def _characters() -> frozenset[int]:
    """Code points of the figures' font."""
    return frozenset(get_font(find_font()).get_charmap())


def caption_metadata(grid: Grid) -> PngInfo:
    """The metadata of a grid's PNG."""
    metadata = PngInfo()
    if grid.captions:
        metadata.add_itxt(KEY, json.dumps(grid.captions))
    return metadata


def read_captions(image: Image.Image) -> tuple[str, ...]:
    """The captions in the metadata of an opened PNG, each as one line; none in other pictures."""
    try:
        captions = json.loads(image.info.get(KEY, "[]"))
        return tuple(format_class_name(caption, most=LONGEST) for caption in captions[:MOST])
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):  # a file may hold anything
        return ()
