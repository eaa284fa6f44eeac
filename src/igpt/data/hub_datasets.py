"""Hugging Face datasets as tables or shards: from the Hub, or written by `save_to_disk`."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetNotFoundError

from igpt.data.image_table import Columns, class_names, read_cell
from igpt.data.listing import Listing
from igpt.data.shards import BadShardError, format_reason
from igpt.utils import files

log = logging.getLogger(__name__)

_MOST = 4096  # most shards of a stream; with more files, several form one shard


@dataclass(frozen=True)
class HubTable:
    """A `datasets.Dataset` as a `Table`."""

    rows: datasets.Dataset
    image: str  # name of the image column
    labels: np.ndarray
    names: tuple[str, ...] | None
    where: str
    fingerprint: str  # hash of the source files
    root: Path | None = None  # relative paths in cells must lie below it
    unpacked: tuple[Path, ...] = ()  # absolute paths must lie below one of these, which `datasets` wrote

    @staticmethod
    def from_hub(rows: datasets.Dataset, columns: Columns, where: str, **more: Any) -> "HubTable":
        """The table of a dataset. Raises ValueError without an image column, or if the label column holds no labels."""
        more = {"fingerprint": str(rows._fingerprint), **more}
        image, label = columns.find(rows.features, where)
        rows = rows.with_format(None).select_columns([name for name in (image, label) if name])
        rows = rows.cast_column(image, datasets.Image(decode=False))
        if label is None:
            return HubTable(rows, image, np.full(len(rows), -1, dtype=np.int64), None, where, **more)
        column = rows.data.column(label)
        if rows._indices is not None:
            column = column.take(rows._indices.column(0))
        labels = pc.fill_null(column, -1).to_numpy().astype(np.int64)
        return HubTable(rows, image, labels, class_names(rows.features[label]), where, **more)

    def __len__(self) -> int:
        return len(self.rows)

    def read_encoded(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for row, cell in zip(rows, self.rows[list(rows)][self.image], strict=True):
            yield read_cell(cell, f"row {row} of {self.where}", self.root, unpacked=self.unpacked)


@dataclass(frozen=True)
class HubShards:
    """A `datasets.IterableDataset` as `Shards`."""

    rows: datasets.IterableDataset
    image: str  # name of the image column
    label: str | None
    names: tuple[str, ...] | None
    where: str
    root: Path | None = None

    @staticmethod
    def from_hub(rows: datasets.IterableDataset, columns: Columns, where: str) -> "HubShards":
        """The shards of a streamed dataset. Raises ValueError without an image column."""
        rows = rows if rows.features is not None else rows._resolve_features()
        image, label = columns.find(rows.features, where)
        return HubShards(rows, image, label, class_names(rows.features[label]) if label else None, where)

    def __len__(self) -> int:
        return min(int(self.rows.num_shards), _MOST)

    def name(self, number: int) -> str:
        kwargs = getattr(self.rows.shard(len(self), number)._ex_iterable, "kwargs", {})
        for value in kwargs.values():
            if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
                return str(value[0])
        return f"shard {number} of {self.where}"

    def read(self, number: int, start: int) -> Iterator[tuple[int, Any, int | None]]:
        shard = self.rows.shard(len(self), number).cast_column(self.image, datasets.Image(decode=False))
        row = -1
        try:
            # `iter(1)`, since `__iter__` in a DataLoader worker skips the rows of other workers. One row at a time
            # keeps the rows before the damage in a damaged shard
            for row, one in enumerate(shard.iter(1)):
                if row >= start:
                    yield row, one[self.image][0], one[self.label][0] if self.label else None
        except Exception as error:  # pyarrow, fsspec and network clients raise many types
            raise BadShardError(
                f"{self.name(number)} cannot be read after {row + 1} images: {format_reason(error)}"
            ) from error


def open_hub(path: str, *, name: str, columns: Columns, streaming: bool) -> dict[str, Callable[[], Any]]:
    """Split name → function that opens the split, for a dataset on the Hugging Face Hub.

    Raises:
        ValueError: no such dataset, no network or no access; the message gives a way out.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    log.info("data: looking for %s on the Hugging Face Hub", path)
    try:
        splits = dict(datasets.load_dataset(path, streaming=streaming))
    except Exception as error:  # network errors of many types; the advice is the same
        is_missing = isinstance(error, DatasetNotFoundError)
        if is_missing and "gated" in str(error):
            raise ValueError(
                f"data.path={path} is gated: accept its terms at https://huggingface.co/datasets/{path}, then "
                f"`hf auth login` or set HF_TOKEN; or give a copy with data.path=FOLDER"
            ) from error
        reason = str(error if is_missing else error.__cause__ or error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"data.path={path} cannot be had from the Hugging Face Hub: {reason}. Give a copy on this machine: "
            f"data.path=FOLDER, with the parquet files of {name} or with its images as train/<class>/, val/<class>/, "
            "test/<class>/ (data.image_column and data.label_column name other columns); or data=digits"
        ) from error
    repository = Path(datasets.config.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
    unpacked = (repository, Path(datasets.config.HF_DATASETS_CACHE) / "downloads")  # image files of `datasets`
    from_hub: Any = HubShards.from_hub if streaming else partial(HubTable.from_hub, unpacked=unpacked)
    return {split: partial(from_hub, rows, columns, f"{path} ({split})") for split, rows in splits.items()}


def open_saved(listing: Listing, *, columns: Columns, path: str) -> dict[str, Callable[[], Any]]:
    """Split name → function that opens the split, for a dataset written by `save_to_disk`.

    Raises:
        ValueError: its JSON records are damaged or name files that are not in the folder.
    """
    there = set(listing.names)
    splits = {"": "train"}
    if "dataset_dict.json" in there:
        record = files.read_json(listing.root / "dataset_dict.json")
        named = record.get("splits") if isinstance(record, dict) else None
        if not isinstance(named, list) or not all(isinstance(split, str) for split in named):
            raise ValueError(f"data.path={path}: dataset_dict.json names no splits: copy it again")
        splits = {f"{split}/": split for split in named}
    for folder in splits:
        _check_saved(listing.root, folder, there, path)
    saved = datasets.load_from_disk(str(listing.root))
    dataset = saved if isinstance(saved, Mapping) else {"train": saved}
    return {
        split: partial(
            HubTable.from_hub, rows, columns, f"{path} ({split})",
            fingerprint=f"{listing.fingerprint} {split}", root=listing.root,
        )
        for split, rows in dataset.items()
    }  # fmt: skip


def _check_saved(root: Path, folder: str, there: set[str], path: str) -> None:
    """Raises ValueError unless every file named in a split's state.json lies beside it."""
    state = files.read_json(root / f"{folder}state.json") if f"{folder}state.json" in there else None
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list) or f"{folder}dataset_info.json" not in there:
        raise ValueError(f"data.path={path}: {folder}state.json or dataset_info.json is not there or damaged")
    for entry in listed:
        file = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(file, str) or "/" in file or f"{folder}{file}" not in there:
            raise ValueError(f"data.path={path}: {folder}state.json names {file!r}, which is not a file beside it")
