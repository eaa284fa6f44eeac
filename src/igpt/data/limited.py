"""A part of a source's images, for trials: `limit_*_batches` and `overfit_batches` of Lightning's Trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from igpt.data.source import JoinedSplit, Pixels, Source, Split, Stream


@dataclass(frozen=True)
class PartOfSplit:
    """The images at `rows` of a split."""

    full: Split
    rows: np.ndarray  # (N,) int64, ascending

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        labels: np.ndarray = self.full.labels[self.rows]
        return labels

    @property
    def pixel_changes(self) -> str:
        return self.full.pixel_changes

    def prepare(self) -> None:
        self.full.prepare()

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        return self.full.read(self.rows[np.asarray(index, dtype=np.int64)].tolist(), rng_keys)


class LimitedSource:
    """A source of which some splits are limited: to a number of batches of `batch_size` images, or to a share (float).

    The images of a part are spread evenly over the split, so that they are of all classes where it is sorted by them.
    `augment` false: training images come as in evaluation.
    """

    def __init__(self, full: Source, limits: Mapping[str, float], *, batch_size: int, augment: bool = True) -> None:
        self.full, self.limits, self.batch_size, self.augment = full, limits, batch_size, augment
        self.name, self.resolution, self.labels_per_class = full.name, full.resolution, full.labels_per_class
        self.n_class, self.class_names = full.n_class, full.class_names

    def split(self, name: str) -> Split:
        """The limited split `name`. Raises ValueError as the full source does."""
        split = self.full.split(name)
        return PartOfSplit(split, self._rows(name, len(split))) if name in self.limits else split

    def training(self, *, with_val: bool = False) -> Split | Stream:
        """The limited training images; `with_val`: followed by those of val.

        Raises:
            ValueError: a limit of a stream, whose images are not counted.
        """
        images = self.full.training(with_val=True) if with_val else self.full.training()
        if isinstance(images, Stream):
            if "train" in self.limits:
                raise ValueError(
                    f"data={self.name} is a stream, which has no number of images to limit (trainer.lightning): "
                    "lower task.steps"
                )
            return images
        n_val = len(self.full.split("val")) if with_val else 0
        n_train = len(images) - n_val
        rows = np.concatenate([self._rows("train", n_train), n_train + self._rows("val", n_val)])
        return PartOfSplit(images, rows) if self.augment else self._plain(with_val)

    def _plain(self, with_val: bool) -> Split:
        train = self.split("train")
        return JoinedSplit(train, self.split("val")) if with_val else train

    def _rows(self, name: str, n: int) -> np.ndarray:
        """The rows of a split of `n` images that are read."""
        limit = self.limits.get(name, 1.0)
        wanted = round(limit * n) if isinstance(limit, float) else limit * self.batch_size
        count = min(n, max(1, wanted))
        return np.arange(count, dtype=np.int64) * n // max(1, count)
