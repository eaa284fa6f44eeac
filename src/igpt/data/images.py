"""Image datasets as a `Source`: local files, remote shards or the Hub; cropped, resized and split as in the paper."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import PIL

from igpt.data import cache as pixel_cache
from igpt.data.classes import Classes, describe_classes
from igpt.data.crop import Crop, CropPlan, padded_crop
from igpt.data.image_decoding import BadImageError, decode_rgb, open_image
from igpt.data.image_splits import CachedSplit, DecodedSplit
from igpt.data.image_table import Columns, Table
from igpt.data.listing import ListFiles, list_files
from igpt.data.local import Open, OpenOptions, open_listing, open_shard_files
from igpt.data.shards import expand_shard_path
from igpt.data.source import JoinedSplit, Split, Stream, VariedSplit, check_split_name
from igpt.data.split import balanced_subset, split_indices
from igpt.data.stream import StreamedImages
from igpt.settings.data import (
    AugmentSettings,
    CropSettings,
    Fraction,
    LabelsPerClass,
    Layout,
    Resolution,
    SplitNames,
    StreamSettings,
)
from igpt.settings.fields import Count, Seed
from igpt.utils import files

log = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Images:
    """A dataset of images as a `Source`. `conf/data/_images.yaml` explains every setting.

    Raises:
        ValueError: contradictory settings, no images, or labels outside the classes.
    """

    def __init__(
        self,
        *,
        cache: Path,
        list_files: ListFiles = list_files,
        name: str,
        path: str | None,
        resolution: Resolution,
        n_class: Count | None,
        classes: Literal["imagenet"] | None,
        splits: SplitNames,
        layout: Layout,
        image_column: list[str],
        label_column: list[str],
        val_fraction: Fraction,
        test_fraction: Fraction,
        split_seed: Seed,
        labels_per_class: LabelsPerClass,
        subset_seed: Seed,
        crop: CropSettings,
        augment: AugmentSettings,
        on_corrupt: Literal["raise", "skip"],
        streaming: bool,
        stream: StreamSettings,
    ) -> None:
        check_path(path, name)
        assert path is not None, "checked"
        names = splits.model_dump()
        if streaming and (labels_per_class is not None or test_fraction):
            raise ValueError(
                "data.labels_per_class and data.test_fraction count images, which a stream cannot: "
                "data.streaming=false, or leave them null and 0"
            )
        self.name, self.resolution, self.n_class = name, resolution, n_class
        self.labels_per_class = labels_per_class
        cut = CropPlan.from_settings(resolution, crop, augment)
        how = OpenOptions(
            path=path,
            columns=Columns(image_column, label_column),
            n_class=n_class,
            named=[split for listed in names.values() for split in listed],
            layout=layout,
            streaming=streaming,
            skip=on_corrupt == "skip",
            cache=cache,
        )
        openers = _find_splits(how, name, list_files)
        of = {split: _match_split(split, accepted, openers, path) for split, accepted in names.items()}
        trained_on = of["train"]
        assert trained_on is not None
        read = sorted({stored_as for stored_as in of.values() if stored_as})
        dataset = {stored_as: openers[stored_as]() for stored_as in read}
        others = [dataset[stored_as].names for stored_as in read if stored_as != trained_on]
        read_as = Classes.from_split_names(classes, n_class, [dataset[trained_on].names, *others])
        self.class_names = read_as.names
        if self.class_names is not None:
            self.n_class = len(self.class_names)  # also where data.n_class=null
            log.info("data: %s", describe_classes(self.class_names))
        elif read_as.by_label is not None:
            log.warning("data.n_class=%s, but there are %s", n_class, describe_classes(read_as.by_label))
        self._parts: StreamedImages | _Tables
        if streaming:
            shards = {split: dataset[stored_as] for split, stored_as in of.items() if stored_as}
            self._parts = StreamedImages(
                shards, name=name, classes=read_as, cut=cut, val_fraction=val_fraction, split_seed=split_seed,
                skip=how.skip, settings=stream,
            )  # fmt: skip
            return
        pixel_caches = _PixelCacheDir(cache / "pixels", f"{name}{resolution}", how.skip)
        tables: dict[str, Table] = dataset
        drawn = split_indices(
            len(tables[trained_on]),
            val_fraction=0 if of["val"] else val_fraction,
            test_fraction=0 if of["test"] else test_fraction,
            seed=split_seed,
        )
        good = {stored_as: pixel_caches.readable_rows(table) for stored_as, table in tables.items()}
        parts = {}
        for split, stored_as in of.items():
            read_from = stored_as or trained_on
            table = tables[read_from]
            rows = np.arange(len(table)) if stored_as and split != "train" else drawn[split]
            labels = np.full(len(table), -1)
            labels[rows] = read_as(table.labels[rows], table.names, table.where)
            rows = np.intersect1d(rows, good[read_from])
            if split == "train" and labels_per_class is not None:
                if (labels[rows] < 0).any():
                    raise ValueError(f"{table.where}: some images have no label, data.labels_per_class needs them all")
                among = balanced_subset(labels[rows], per_class=labels_per_class, seed=subset_seed, where=table.where)
                rows = rows[among]
            parts[split] = (DecodedSplit(table, labels, rows, cut.evaluation), good[read_from])
        self._parts = _Tables(parts, cut, pixel_caches)

    def split(self, name: str) -> Split:
        check_split_name(name)
        return self._parts.split(name)

    def training(self, *, with_val: bool = False) -> Split | Stream:
        return self._parts.training(with_val=with_val)


def check_path(path: str | None, name: str, where: str = "data") -> None:
    """Raises ValueError if `data.path` names nothing: no file or folder, shards, or Hub dataset. `where`: its group."""
    if path is None:
        raise ValueError(f"{where}={name} needs to know where the images are: {where}.path=FOLDER")
    is_local = Path(path).exists() or expand_shard_path(path) is not None
    if not is_local and (not HUB_NAME.fullmatch(path) or path.startswith(".")):
        raise ValueError(f"{where}.path={path}: there is no such file or folder, and it is no Hub name either")


def _find_splits(how: OpenOptions, name: str, list_files: ListFiles) -> Mapping[str, Open]:
    """Split name → function that opens it, for `data.path`: a local path, remote shards or a Hub dataset.

    Raises:
        ValueError: `data.path` does not exist or holds no image.
    """
    folder = Path(how.path)
    if folder.exists():
        return open_listing(list_files(folder), how)
    shards = expand_shard_path(how.path)
    if shards is not None:
        if not how.streaming:
            raise ValueError(f"data.path={how.path} names shards, which are read in turn: data.streaming=true")
        if not shards:
            raise ValueError(f"data.path={how.path}: there is no such file")
        return open_shard_files(shards, how)
    from igpt.data.hub_datasets import open_hub  # imports `datasets`, which takes a second

    return open_hub(how.path, name=name, columns=how.columns, streaming=how.streaming)


def _match_split(split: str, names: Sequence[str], splits: Mapping[str, Open], path: str) -> str | None:
    """The first of `names` that exists, or None. Raises ValueError if the training split is missing."""
    for name in names:
        if name in splits:
            return name
    if split == "train":
        raise ValueError(
            f"data.path={path} has the splits {', '.join(splits)}, none called {' or '.join(names)}: "
            f"say which to train on, data.splits.train=[{next(iter(splits))}]"
        )
    return None


@dataclass(frozen=True)
class _PixelCacheDir:
    """The folder of decoded pixels. File name = hash of (table, rows, crop, Pillow version)."""

    folder: Path
    name: str
    skip: bool  # leave out corrupt images

    def path(self, table: Table, rows: np.ndarray, crop: Crop) -> Path:
        cache_key = {
            "table": table.fingerprint,
            "rows": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
            "crop": asdict(crop),
            "pillow": PIL.__version__,
        }
        return self.folder / f"{self.name}-{pixel_cache.hash_cache_key(cache_key)}.npy"

    def readable_rows(self, table: Table) -> np.ndarray:
        """Rows with a readable image, ascending; without `skip`, all. Checked once, then read from the cache."""
        rows = np.arange(len(table))
        if not self.skip:
            return rows
        digest = pixel_cache.hash_cache_key({"table": table.fingerprint, "pillow": PIL.__version__})
        path = self.folder / f"{self.name}-{digest}.corrupt.json"

        def check(file: IO[bytes]) -> None:
            checked = pixel_cache.map_chunks(partial(_find_corrupt, table), rows, "checking images")
            file.write(json.dumps([corrupt for chunk in checked for corrupt in chunk], indent=2).encode())

        corrupt = pixel_cache.read_or_make(path, partial(files.read_json, path), check)
        if corrupt:
            log.warning(
                "data: %d of %d images of %s cannot be read and are left out, as %s (all: %s)",
                len(corrupt), len(table), table.where, corrupt[0]["reason"], path,
            )  # fmt: skip
        return np.setdiff1d(rows, [image["row"] for image in corrupt])


def _find_corrupt(table: Table, rows: Sequence[int]) -> list[dict[str, Any]]:
    corrupt = []
    for row in rows:
        where = f"row {row} of {table.where}"
        try:
            ((where, data),) = table.read_encoded([row])
            decode_rgb(open_image(data))
        except BadImageError as error:
            corrupt.append({"row": row, "reason": f"{where}: {error}"})
    return corrupt


@dataclass(frozen=True)
class _Tables:
    """The splits of a dataset with random access."""

    parts: dict[str, tuple[DecodedSplit, np.ndarray]]  # evaluation crops, and the readable rows of the table
    cut: CropPlan
    pixel_caches: _PixelCacheDir

    def split(self, name: str) -> Split:
        decoded, good = self.parts[name]
        if not self.cut.training.is_random:  # all splits of a table share one cache file
            return self._cached(decoded, good)
        if name == "train":  # training crops are random, and few images are read in the evaluation crop: no cache
            return decoded
        return self._cached(decoded, decoded.rows)

    def training(self, *, with_val: bool = False) -> Split:
        cut = self.cut
        plain = self._plain_training("train")
        if with_val:
            plain = JoinedSplit(plain, self._plain_training("val"))
        if not (cut.pad or cut.flip):
            return plain
        return VariedSplit(plain, partial(padded_crop, pad=cut.pad, flip=cut.flip))

    def _plain_training(self, name: str) -> Split:
        """A split in the training crop."""
        decoded, good = self.parts[name]
        decoded = replace(decoded, crop=self.cut.training)
        return decoded if self.cut.training.is_random else self._cached(decoded, good)

    def _cached(self, decoded: DecodedSplit, rows: np.ndarray) -> CachedSplit:
        return CachedSplit(decoded, self.pixel_caches.path(decoded.table, rows, decoded.crop), rows)
