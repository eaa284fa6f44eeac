"""A stream of images: read in turn, from wherever it is, without a copy on this machine."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import datasets
import numpy as np

from igpt import keyed
from igpt.data.classes import Classes
from igpt.data.crop import Crop, Cut, padded_crop
from igpt.data.decode import BadImageError, opened, rgb
from igpt.data.source import ArraySplit, Pixels
from igpt.data.tables import Columns, class_names, unpacked

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """One image as it comes: where it was read, its encoded bytes, its label."""

    place: str
    data: bytes
    label: int


class Streamed:
    """The splits of a stream.

    When it has no validation split, validation images are those of the training stream whose content's hash falls in
    `val_fraction` (copies of an image fall on one side). Of val and test, and of train as the palette reads it, the
    first `held` images are kept in memory, since a stream can be read only in turn.

    Raises:
        ValueError: a buffer or a number of held images below 1.
    """

    def __init__(
        self,
        streams: Mapping[str, datasets.IterableDataset],
        *,
        columns: Columns,
        classes: Classes,
        cut: Cut,
        val_fraction: float,
        split_seed: int,
        skip: bool,
        where: str,
        buffer: int,
        held: int,
    ) -> None:
        if not all(isinstance(number, int) and number >= 1 for number in (buffer, held)):
            raise ValueError(f"data.stream.buffer and data.stream.held are 1 or more, got {buffer!r} and {held!r}")
        self.cut, self.held = cut, held
        drawn = 0.0 if "val" in streams else val_fraction
        self._passes = {
            name: ImageStream(
                stream, columns=columns, classes=classes, cut=cut, skip=skip, buffer=buffer, split_seed=split_seed,
                share=(drawn, 1.0) if name == "train" else (0.0, 1.0), where=f"{where} ({name})",
            )
            for name, stream in streams.items()
        }  # fmt: skip
        if drawn:
            self._passes["val"] = replace(self._passes["train"], share=(0.0, drawn))
        self._kept: dict[str, ArraySplit] = {}

    def split(self, name: str) -> ArraySplit:
        if name not in self._kept:
            side = self.cut.evaluation.resolution
            images = self._passes[name].first(self.held) if name in self._passes else []
            pixels = np.stack([pixels for pixels, _ in images]) if images else np.empty((0, side, side, 3), np.uint8)
            self._kept[name] = ArraySplit(pixels, np.array([label for _, label in images], dtype=np.int64))
            log.info("data: keeping %d images of the stream as %s", len(images), name)
        return self._kept[name]

    def training(self) -> "ImageStream":
        return self._passes["train"]


@dataclass(frozen=True)
class ImageStream:
    """A `Stream` over one split, or over the part of it whose content hashes into `share`."""

    rows: datasets.IterableDataset
    columns: Columns
    classes: Classes
    cut: Cut
    skip: bool  # leave corrupt images out
    buffer: int  # images among which each next one is drawn
    split_seed: int
    share: tuple[float, float]  # from, up to: of [0, 1)
    where: str

    def records(self, seed: int, epoch: int) -> Iterator[Record]:
        """One pass, shuffled by `seed` and `epoch` within a buffer.

        Corrupt images that are to be left out are found here, by decoding every one, so that what comes out does not
        depend on who decodes it; how many they were is logged at the end of the pass.

        Raises:
            ValueError: a label that is no class.
            BadImageError: no image where one should be.
        """
        rows = self.rows.shuffle(seed=keyed.key(seed, "order", epoch), buffer_size=self.buffer)
        rows = rows if rows.features is not None else rows._resolve_features()
        image, label = self.columns.find(rows.features, self.where)
        names = class_names(rows.features[label]) if label else None
        low, high = self.share
        encoded = rows.cast_column(image, datasets.Image(decode=False))
        bad = 0
        # in batches: in a worker of a loader, iterating itself would skip what other workers are to read
        for count, row in enumerate(row for batch in encoded.iter(_AT_ONCE) for row in _rows(batch)):
            try:
                place, data = unpacked(row[image], f"image {count} of {self.where}, as shuffled by seed {seed}")
                if not low <= hashed(data, self.split_seed) < high:
                    continue
                if self.skip:
                    rgb(opened(data))
            except BadImageError:
                if not self.skip:
                    raise
                bad += 1
                continue
            given = np.array([row[label] if label and row[label] is not None else -1], dtype=np.int64)
            yield Record(place, data, int(self.classes(given, names, place)[0]))
        if bad:
            log.warning("data: %d images of %s cannot be read and were left out in this pass", bad, self.where)

    def read(self, records: Sequence[Record], keys: Sequence[int]) -> Pixels:
        """The images of some records, cut for training. Raises BadImageError, naming the image."""
        pixels = np.stack([self._cut(self.cut.training, *pair) for pair in zip(records, keys, strict=True)])
        if self.cut.pad or self.cut.flip:
            pixels = padded_crop(pixels, keys, pad=self.cut.pad, flip=self.cut.flip)
        return Pixels(pixels, np.array([record.label for record in records], dtype=np.int64))

    def first(self, n: int) -> list[tuple[np.ndarray, int]]:
        """The first n images in the stream's own shuffled order, as for evaluation, with their labels."""
        records = islice(self.records(self.split_seed, 0), n)
        return [(self._cut(self.cut.evaluation, record, 0), record.label) for record in records]

    def _cut(self, crop: Crop, record: Record, key: int) -> np.ndarray:
        try:
            return crop(record.data, key)
        except BadImageError as error:
            raise BadImageError(f"{record.place}: {error}; data.on_corrupt=skip leaves such images out") from error


_AT_ONCE = 16  # rows read from the stream at a time


def _rows(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def hashed(data: bytes, seed: int) -> float:
    """A number in [0, 1) that content and seed decide."""
    digest = hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") / 2**64
