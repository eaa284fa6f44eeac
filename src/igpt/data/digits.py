"""scikit-learn's 1,797 handwritten digits, 8×8 in 17 grey levels: the dataset that needs no download."""

import numpy as np
from sklearn.datasets import load_digits

from igpt.data.source import ArraySplit, check_split_name
from igpt.data.split import split_indices

LEVELS = 16  # scikit-learn's digits count 0 … 16


class Digits:
    """The digits as a `Source`: grey level g becomes the pixel rint(255 g / 16), in three equal channels.

    They come without a test split, so one is drawn first, then `val_fraction` of the rest, by `split_seed`, which is
    not the seed of the run: what one run trained on, another must not call held out.

    Raises:
        ValueError: a resolution other than 8.
    """

    n_class = 10

    def __init__(
        self, *, name: str, resolution: int, val_fraction: float, test_fraction: float, split_seed: int
    ) -> None:
        if resolution != 8:
            raise ValueError(f"data.resolution={resolution}: the digits are 8×8 and come in no other size")
        self.name, self.resolution = name, resolution
        digits = load_digits()
        grey = np.rint(digits.images * (255 / LEVELS)).astype(np.uint8)  # (N, 8, 8)
        pixels = np.repeat(grey[..., None], 3, axis=3)  # (N, 8, 8, 3)
        labels = digits.target.astype(np.int64)
        indices = split_indices(
            len(pixels), val_fraction=val_fraction, test_fraction=test_fraction, seed=split_seed
        )
        self._splits = {name: ArraySplit(pixels[rows], labels[rows]) for name, rows in indices.items()}

    def split(self, name: str) -> ArraySplit:
        check_split_name(name)
        return self._splits[name]
