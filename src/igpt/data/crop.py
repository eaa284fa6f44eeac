"""What is done to pixels on the way in: every random choice a function of the image's key."""

from collections.abc import Sequence

import numpy as np
import torch

from igpt import keyed


def shifted(pixels: np.ndarray, keys: Sequence[int], *, by: int, share: float) -> np.ndarray:
    """Images moved by up to `by` pixels each way, `share` of them, the rest as they were: (B, R, R, 3) → the same.

    All (2·by + 1)² moves are equally likely, staying put among them. What comes into view is 0.
    """
    u = keyed.uniform(keyed.fold(torch.tensor(keys, dtype=torch.int64), 1), 3).numpy()  # (B, 3)
    moves = np.floor(u[:, 1:] * (2 * by + 1)).astype(np.int64)  # (B, 2) in 0 … 2·by
    top, left = np.where(u[:, :1] < share, moves, by).T  # (B,)
    padded = np.pad(pixels, ((0, 0), (by, by), (by, by), (0, 0)))
    side = np.arange(pixels.shape[1])
    rows, columns = top[:, None] + side, left[:, None] + side  # (B, R)
    moved: np.ndarray = padded[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved
