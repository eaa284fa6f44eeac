"""scikit-learn's 1,797 handwritten digits, 8×8 in 17 grey levels: a dataset without a download."""

from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from igpt.data.crop import shift_images
from igpt.data.listing import ListFiles
from igpt.data.source import ArraySplit, JoinedSplit, Split, VariedSplit, check_split_name
from igpt.data.split import balanced_subset, split_indices
from igpt.settings.data import Fraction, LabelsPerClass
from igpt.settings.fields import Seed, Share

LEVELS = 16  # the largest grey level: 0 … 16
CHANGES = f"{LEVELS + 1} grey levels spread over 0 … 255, in three equal channels"


class Digits:
    """The digits as a `Source`: grey level g becomes the pixel rint(255 g / 16), in three equal channels.

    The test split is drawn first, then `val_fraction` of the rest, by `split_seed`; it is not the run's seed, so all
    runs hold out the same images. Training translates `shift_share` of the images by up to `shift` pixels, against
    overfitting on 1,347 images. `labels_per_class` keeps that many training images per digit, drawn by `subset_seed`.

    Raises:
        ValueError: a resolution other than 8.
    """

    n_class: int | None = 10
    class_names: tuple[str, ...] | None = tuple("0123456789")

    def __init__(
        self,
        *,
        cache: Path | None = None,  # unused: the digits are in memory
        list_files: ListFiles | None = None,  # unused: no files
        name: str,
        resolution: int,
        val_fraction: Fraction,
        test_fraction: Fraction,
        split_seed: Seed,
        shift: Annotated[int, Field(ge=0, le=7)],
        shift_share: Share,
        labels_per_class: LabelsPerClass = None,
        subset_seed: Seed = 0,
    ) -> None:
        if resolution != 8:
            raise ValueError(f"data.resolution={resolution}: the digits are 8×8 and come in no other size")
        self.name, self.resolution, self.labels_per_class = name, resolution, labels_per_class
        pixels, labels = read_digits()
        indices = split_indices(len(pixels), val_fraction=val_fraction, test_fraction=test_fraction, seed=split_seed)
        if labels_per_class is not None:
            of_train = labels[indices["train"]]
            rows = balanced_subset(of_train, per_class=labels_per_class, seed=subset_seed, where="digits")
            indices["train"] = indices["train"][rows]
        self._splits = {name: ArraySplit(pixels[rows], labels[rows], CHANGES) for name, rows in indices.items()}
        self._move = partial(shift_images, by=shift, share=shift_share)

    def split(self, name: str) -> ArraySplit:
        check_split_name(name)
        return self._splits[name]

    def training(self, *, with_val: bool = False) -> Split:
        train, val = self._splits["train"], self._splits["val"]
        return VariedSplit(JoinedSplit(train, val) if with_val else train, self._move)


@cache
def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """All pixels (1797, 8, 8, 3) uint8 and labels (1797,) int64, read once for all stages of a pipeline."""
    from sklearn.datasets import load_digits  # slow to import, for this data alone

    digits = load_digits()
    grey = np.rint(digits.images * (255 / LEVELS)).astype(np.uint8)  # (N, 8, 8)
    return np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64)
