"""Splits of a table: decoded on every read, or read from the pixel cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from igpt.data import cache as pixel_cache
from igpt.data.crop import Crop
from igpt.data.image_table import Table
from igpt.data.limited import PartOfSplit
from igpt.data.pixel_changes import LOOKED_AT, describe_changes
from igpt.data.source import Pixels, Split


@dataclass(frozen=True)
class DecodedSplit:
    """Rows of a table as a split; every read decodes and crops."""

    table: Table
    of_table: np.ndarray  # labels of all rows of the table, (len(table),) int64
    rows: np.ndarray  # (N,) int64
    crop: Crop

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        labels: np.ndarray = self.of_table[self.rows]
        return labels

    @cached_property
    def pixel_changes(self) -> str:
        """Of images evenly spaced over the split."""
        some = self.rows[:: max(1, -(-len(self.rows) // LOOKED_AT))].tolist()
        return describe_changes((data, self.crop) for _, data in self.table.read_encoded(some))

    def prepare(self) -> None: ...

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        rows = self.rows[np.asarray(index, dtype=np.int64)]
        return Pixels(read_pixels(self.table, self.crop, rows.tolist(), rng_keys), self.of_table[rows])


def read_pixels(table: Table, crop: Crop, rows: Sequence[int], rng_keys: Sequence[int] | None = None) -> np.ndarray:
    """Decodes and crops rows of a table, at random by `rng_keys` (default 0): → (len(rows), R, R, 3) uint8.

    Raises:
        BadImageError: an unreadable image; the message names the row or the file.
    """
    out = np.empty((len(rows), crop.resolution, crop.resolution, 3), dtype=np.uint8)
    for i, (where, data) in enumerate(table.read_encoded(rows)):
        out[i] = crop.crop_named(data, rng_keys[i] if rng_keys else 0, where)
    return out


@dataclass
class CachedSplit:
    """A `DecodedSplit` without randomness, read from the pixel cache after `prepare`."""

    decoded: DecodedSplit
    path: Path  # the cache file
    cached: np.ndarray  # table rows in the cache file, ascending
    _pixels: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.decoded)

    @property
    def labels(self) -> np.ndarray:
        return self.decoded.labels

    @property
    def pixel_changes(self) -> str:
        return self.decoded.pixel_changes

    def prepare(self) -> None:
        if self._pixels is None and len(self):
            make = partial(read_pixels, self.decoded.table, self.decoded.crop)
            self._pixels = pixel_cache.load_pixels(self.path, self.cached, self.decoded.crop.resolution, make)

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        if self._pixels is None:
            return self.decoded.read(index, rng_keys)
        rows = self.decoded.rows[np.asarray(index, dtype=np.int64)]
        return Pixels(self._pixels[np.searchsorted(self.cached, rows)], self.decoded.of_table[rows])


def find_table(split: Split) -> tuple[Table | None, np.ndarray | None]:
    """The table that a split is of, and its rows there; of images in memory (None, rows of the whole split or None)."""
    if isinstance(split, PartOfSplit):
        table, rows = find_table(split.full)
        return table, split.rows if rows is None else rows[split.rows]
    decoded = split.decoded if isinstance(split, CachedSplit) else split
    return (decoded.table, decoded.rows) if isinstance(decoded, DecodedSplit) else (None, None)
