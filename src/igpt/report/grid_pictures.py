"""Grids of images and palettes → PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from igpt.metric.result import Grid
from igpt.report.captions import INK, LINE, caption_metadata, draw_captions
from igpt.report.style import image_font
from igpt.utils import files

CELL = 96  # pixels a side that an image is shown at, at least
GAP = 6
HEAD = 22  # pixels of a title
WHITE = 255  # of every channel
AROUND_COLOURS = (200, 215, 235)


def draw_grid(grid: Grid) -> Image.Image:
    """The images of a grid on white, titles above, captions below; each pixel enlarged by an integer factor."""
    if grid.row_titles:
        return _draw_titled_rows(grid)
    columns, side = grid.images.shape[1:3]
    captions = [caption.split("\n") for caption in grid.captions]
    below = LINE * max(map(len, captions), default=0)  # pixels
    scale = 2 * -(-CELL // (2 * side))  # even, so that pixels stay squares at half size
    cell, head = side * scale, HEAD if grid.titles else 0
    cells = grid.images.repeat(scale, axis=2).repeat(scale, axis=3)
    pixels = _mosaic(np.pad(cells, ((0, 0), (0, 0), (GAP, below), (GAP, 0), (0, 0)), constant_values=WHITE))
    picture = Image.fromarray(np.pad(pixels, ((head, GAP), (0, GAP), (0, 0)), constant_values=WHITE))
    pen, font = ImageDraw.Draw(picture), image_font()
    for column, title in enumerate(grid.titles):
        pen.text((GAP + column * (cell + GAP) + cell // 2, 5), title, fill=INK, font=font, anchor="ma")
    draw_captions(pen, captions, columns, cell, GAP, head)
    return picture


def _draw_titled_rows(grid: Grid) -> Image.Image:
    rows = [draw_grid(Grid(row[None])) for row in grid.images]
    step = rows[0].height + HEAD
    picture = Image.new("RGB", (rows[0].width, step * len(rows)), (WHITE,) * 3)
    pen, font = ImageDraw.Draw(picture), image_font()
    for i, (row, title) in enumerate(zip(rows, grid.row_titles, strict=True)):
        picture.paste(row, (0, i * step + HEAD))
        pen.text((GAP, i * step + 5), title, fill=INK, font=font)
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
