"""Values of tokens as heat over the image grid."""

import matplotlib
import numpy as np
import torch
from torch import Tensor

from igpt.tokens.tokenizer import Tokenizer

UNMEASURED = np.full(3, 128, dtype=np.uint8)  # of a pixel without a value
HIDDEN, SEEN = 0.25, 0.6  # brightness of what a query does not see, and of what it sees, under the heat
LUMA = np.array([0.299, 0.587, 0.114])  # BT.601
MARK = np.array([0, 230, 118], dtype=np.uint8)  # of the query's cell


def spread_over_pixels(values: Tensor, tokenizer: Tokenizer, *, add: bool = False) -> np.ndarray:
    """Values of tokens at the pixels that they stand for: (…, T) → (…, R, R) float64.

    Of several tokens in a cell the mean, so that the mean over pixels is that over tokens; with `add` their sum.
    """
    grid = tokenizer.grid
    cells = values.double().cpu().reshape(-1, grid.rows * grid.columns, grid.channels)
    pixels = tokenizer.order.unflatten(cells.sum(-1) if add else cells.mean(-1))  # (N, rows, columns)
    cell = tokenizer.side // grid.rows
    pixels = pixels.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    return pixels.reshape(*values.shape[:-1], tokenizer.side, tokenizer.side).numpy()


def draw_heat(values: np.ndarray, *, most: float) -> np.ndarray:
    """Colours from black (0) to pale yellow (`most` and more): (…, R, R) → (…, R, R, 3) uint8; NaN is grey."""
    colours = matplotlib.colormaps["inferno"](np.clip(values / max(most, 1e-30), 0, 1), bytes=True)[..., :3]
    return np.where(np.isnan(values)[..., None], UNMEASURED, colours)


def draw_attention(image: np.ndarray, weights: np.ndarray, seen: np.ndarray, query: np.ndarray) -> np.ndarray:
    """A head's weights as heat over an image in grey: images (R, R, 3) uint8, weights (R, R) → (R, R, 3) uint8.

    The largest weight is the brightest. `seen` (R, R) bool: pixels that the query sees, the others are dark; `query`
    (R, R) bool: its own, marked green.
    """
    share = weights / max(float(weights.max()), 1e-30)
    grey = (image @ LUMA)[..., None] * np.where(seen, SEEN, HIDDEN)[..., None]
    heat = matplotlib.colormaps["inferno"](0.35 + 0.65 * share)[..., :3] * 255
    blend = np.sqrt(share)[..., None]  # small weights are seen, too
    drawn = np.rint((1 - blend) * grey + blend * heat).astype(np.uint8)
    return mark_query(drawn, query)


def mark_query(image: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The image with the pixels of the query in green: (R, R, 3) uint8, (R, R) bool → the same."""
    return np.where(query[..., None], MARK, image)


def locate_pixel(tokenizer: Tokenizer, row: int, column: int) -> int:
    """The position in the sequence of the last token that stands for a pixel.

    Raises:
        ValueError: a pixel outside of the image.
    """
    side, grid = tokenizer.side, tokenizer.grid
    if not (0 <= row < side and 0 <= column < side):
        raise ValueError(f"task.queries: [{row}, {column}] lies outside of images of {side}×{side}: 0 … {side - 1}")
    cell = side // grid.rows
    index = row // cell * grid.columns + column // cell
    return tokenizer.order.permutation.index(index) * grid.channels + grid.channels - 1


def find_token_pixels(tokenizer: Tokenizer, position: int) -> np.ndarray:
    """The pixels of the cell of a token: (R, R) bool."""
    places = torch.zeros(tokenizer.grid.n_ctx)
    places[position] = 1
    return spread_over_pixels(places, tokenizer, add=True) > 0
