"""A stream of images from local or remote shards: sequential reads, no local copy."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from igpt.data.classes import Classes
from igpt.data.crop import CropPlan, padded_crop
from igpt.data.image_decoding import BadImageError, decode_rgb, open_image
from igpt.data.image_table import Cell, read_cell
from igpt.data.pixel_changes import LOOKED_AT, describe_changes
from igpt.data.shard_reader import ReaderState, ShardAssignment, ShardReader
from igpt.data.shards import BadShardError, Shards
from igpt.data.source import ArraySplit, Pixels
from igpt.settings.data import MixtureStreamSettings, StreamSettings

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """One encoded image of a stream, with its label and the name of its part."""

    place: str  # file or row, for messages
    data: bytes
    label: int
    digest: int  # 63-bit hash of the content, the key of all randomness: independent of reader and time
    part: str


@dataclass(frozen=True)
class ImagePart:
    """A `StreamPart`: the images of some shards whose content hash lies in `share`."""

    name: str
    weight: float
    shards: Shards
    classes: Classes
    cut: CropPlan
    skip: bool  # leave out corrupt images and shards
    split_seed: int
    share: tuple[float, float]  # interval [low, high) of content hashes in [0, 1)

    @property
    def n_shard(self) -> int:
        return len(self.shards)

    def records(self, share: ShardAssignment, shard: int, row: int) -> Iterator[tuple[Record, int, int]]:
        """Yields (record, shard index in the share, next row) of a share, from (shard, row) on.

        With `skip`, every image is decoded here to leave out corrupt ones; the numbers of images and shards left out
        are logged at the end.

        Raises:
            DataError: a label outside the classes.
            BadImageError, BadShardError: an unreadable image or shard, without `skip`.
        """
        bad = broken = 0
        for index in range(shard, len(share.shards)):
            number = share.shards[index]
            name = self.shards.name(number)
            try:
                for i, cell, label in self.shards.read(number, row if index == shard else 0):
                    if i % share.sharers != share.turn:
                        continue
                    try:
                        record = self._record(cell, label, f"image {i} of {name}")
                    except BadImageError:
                        if not self.skip:
                            raise
                        bad += 1
                        continue
                    if record is not None:
                        yield record, index, i + 1
            except BadShardError as error:
                if not self.skip:
                    raise BadShardError(f"{error}; data.on_corrupt=skip leaves such shards out") from error
                broken += 1
                log.warning("data: %s; what is left of it is left out", error)
        if bad or broken:
            log.warning(
                "data: %d images and %d shards of %s could not be read and were left out in this pass of one reader",
                bad, broken, self.shards.where,
            )  # fmt: skip

    def _record(self, cell: Cell, label: int | None, where: str) -> Record | None:
        where, data = read_cell(cell, where, self.shards.root)
        low, high = self.share
        if (low, high) != (0.0, 1.0) and not low <= hash_to_unit_interval(data, self.split_seed) < high:
            return None
        if self.skip:
            decode_rgb(open_image(data))
        mapped = np.array([-1 if label is None else label], dtype=np.int64)
        number = int(self.classes(mapped, self.shards.names, where)[0])
        return Record(where, data, number, _hash_content(data, 0) >> 1, self.name)


class ImageStream:
    """A `Stream` over parts, sampled by weight until each is exhausted."""

    def __init__(self, parts: Sequence[ImagePart], settings: MixtureStreamSettings) -> None:
        self.parts = {part.name: part for part in parts}
        self.buffer, self.num_readers = settings.buffer, settings.num_readers

    @property
    def contents(self) -> dict[str, int]:
        """Number of shards by part."""
        return {part.name: part.n_shard for part in self.parts.values()}

    def make_reader(self, index: int, count: int, seed: int) -> ShardReader:
        parts = list(self.parts.values())
        return ShardReader(parts, index, count, seed, block=max(1, self.buffer // count))

    def initial_state(self) -> ReaderState:
        return ReaderState.initial(len(self.parts))

    def read(self, records: Sequence[Record], rng_keys: Sequence[int]) -> Pixels:
        """Decodes and crops records for training. Raises BadImageError, naming the image."""
        crops = [self.parts[record.part].cut.training for record in records]
        images = zip(crops, records, rng_keys, strict=True)
        pixels = np.stack([crop.crop_named(record.data, key, record.place) for crop, record, key in images])
        for part in self.parts.values():
            mine = [i for i, record in enumerate(records) if record.part == part.name]
            if mine and (part.cut.pad or part.cut.flip):
                part_keys = [rng_keys[i] for i in mine]
                pixels[mine] = padded_crop(pixels[mine], part_keys, pad=part.cut.pad, flip=part.cut.flip)
        return Pixels(pixels, np.array([record.label for record in records], dtype=np.int64))

    def take(self, n: int, seed: int) -> tuple[list[tuple[np.ndarray, int]], str]:
        """The first n images in the order of a single reader, in the evaluation crop, with labels, and their changes.

        The changes are those that `describe_changes` finds in the first of them.
        """
        records = islice(self.make_reader(0, 1, seed).iterate_epoch(self.initial_state()), n)
        of = [(self.parts[record.part].cut.evaluation, record) for record, _ in records]
        images = [(crop.crop_named(record.data, 0, record.place), record.label) for crop, record in of]
        return images, describe_changes((record.data, crop) for crop, record in of[:LOOKED_AT])


class StreamedImages:
    """The splits of a stream.

    Without a validation split, training images with a content hash below `val_fraction` are the validation images, so
    that copies of an image fall on the same side. `split` keeps the first `held_in_memory` images of a split in
    memory, since a stream has no random access.
    """

    def __init__(
        self,
        splits: Mapping[str, Shards],
        *,
        name: str,
        classes: Classes,
        cut: CropPlan,
        val_fraction: float,
        split_seed: int,
        skip: bool,
        settings: StreamSettings,
    ) -> None:
        self.side, self.held_in_memory, self.split_seed = cut.evaluation.resolution, settings.held_in_memory, split_seed
        drawn = 0.0 if "val" in splits else val_fraction
        parts = {
            split: ImagePart(
                name=name, weight=1.0, shards=shards, classes=classes, cut=cut, skip=skip, split_seed=split_seed,
                share=(drawn, 1.0) if split == "train" else (0.0, 1.0),
            )
            for split, shards in splits.items()
        }  # fmt: skip
        if drawn:
            parts["val"] = replace(parts["train"], share=(0.0, drawn))
        self._streams = {split: ImageStream([part], settings) for split, part in parts.items()}
        self._kept: dict[str, ArraySplit] = {}

    def split(self, name: str) -> ArraySplit:
        if name not in self._kept:
            stream = self._streams.get(name)
            images, changes = stream.take(self.held_in_memory, self.split_seed) if stream else ([], "")
            pixels = np.array([pixels for pixels, _ in images], np.uint8).reshape(-1, self.side, self.side, 3)
            self._kept[name] = ArraySplit(pixels, np.array([label for _, label in images], dtype=np.int64), changes)
            log.info("data: keeping %d images of the stream as %s", len(images), name)
        return self._kept[name]

    def training(self, *, with_val: bool = False) -> ImageStream:
        refuse_val(with_val)
        return self._streams["train"]


def refuse_val(with_val: bool) -> None:
    """Raises ValueError if the images of val are to be trained on, too: a stream has no rows to put them after."""
    if with_val:
        raise ValueError(
            "a stream is read in turn, val cannot be added to it: data.streaming=false, or task.refit=false"
        )


def hash_to_unit_interval(data: bytes, seed: int) -> float:
    """A hash of content and seed, uniform in [0, 1)."""
    return _hash_content(data, seed) / 2**64


def _hash_content(data: bytes, seed: int) -> int:
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")
