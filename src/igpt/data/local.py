"""Local datasets: finds the images or shards of each split and returns functions that open them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from igpt.data.image_decoding import EXTENSIONS
from igpt.data.image_files import ImageShards, open_image_files
from igpt.data.image_table import Columns, Table
from igpt.data.layout import Splits, split_images, split_shards
from igpt.data.listing import METADATA, SAVED, Listing, file_extension
from igpt.data.parquet_files import ParquetShards, ParquetTable, has_images
from igpt.data.shards import Shards
from igpt.data.tar_files import TarShards, TarTable

log = logging.getLogger(__name__)

Open = Callable[[], Any]  # opens one split as a `Table` or `Shards`
EXPECTED = "expected a folder of images, of class folders, of parquet or of tar files, or one such file"


@dataclass(frozen=True)
class OpenOptions:
    """Options for opening the files of a dataset."""

    path: str  # data.path, for messages
    columns: Columns
    n_class: int | None  # None: images need no labels
    named: Sequence[str]  # split names in the settings
    layout: str
    streaming: bool
    skip: bool  # leave out unreadable shards
    cache: Path


def open_listing(listing: Listing, how: OpenOptions) -> Mapping[str, Open]:
    """Split name → function that opens it, as a table or as shards (`how.streaming`), for the files of a listing.

    A file belongs to at most one split. One kind of file is read: parquet files if one of them holds images, else
    image files, else tar files. A warning counts the files that are ignored.

    Raises:
        ValueError: no images, or file names with an ambiguous split or class.
    """
    if listing.dangling:
        message = f"{listing.root / listing.dangling[0]} is a link to nothing ({len(listing.dangling)} such links)"
        if not how.skip:
            raise ValueError(f"{message}: mend or remove it; data.on_corrupt=skip leaves such out")
        log.warning("data: %s: it is left out", message)
    if {"dataset_dict.json", "state.json"} & {*listing.names} and listing.find_by_extension(".arrow"):
        if how.streaming:
            raise ValueError(f"data.path={how.path} was saved by save_to_disk and is no stream: data.streaming=false")
        from igpt.data.hub_datasets import open_saved  # imports `datasets`, which takes a second

        return open_saved(listing, columns=how.columns, path=how.path)
    images = [i for i, name in enumerate(listing.names) if file_extension(name) in EXTENSIONS]
    parquet, tar = listing.find_by_extension(".parquet"), listing.find_by_extension(".tar")
    if images and parquet and not any(has_images(listing.root / listing.names[i], how.columns) for i in parquet):
        parquet = []
    if parquet and tar:
        raise ValueError(
            f"data.path={how.path} holds .tar and .parquet files: name one kind, data.path={how.path}/*.tar with "
            "data.streaming=true, or put them into folders of their own"
        )
    read = parquet or images or tar
    if not read:
        lies_there = f", but {unread}" if (unread := listing.describe_unread()) else ""
        raise ValueError(f"data.path={how.path} does not open: there is no image in it{lies_there}; {EXPECTED}")
    names = [listing.names[i] for i in read]
    split = split_images if read is images else split_shards
    splits = split(names, named=how.named, layout=how.layout, where=how.path)
    _warn_unread(listing, read, splits, how.path)
    index = {name: [read[i] for i in rows] for name, rows in splits.files.items() if rows}
    if read is images:
        return {name: partial(_open_images, listing, rows, name, splits.depth, how) for name, rows in index.items()}
    return {name: partial(_open_shards, listing, rows, name, how) for name, rows in index.items()}


def open_shard_files(files: Sequence[str], how: OpenOptions) -> Mapping[str, Open]:
    """The training split of a stream from an explicit list of shard files, local or remote."""
    return {"train": partial(_make_shards, files, "train", how, root=None)}


def _open_images(listing: Listing, rows: Sequence[int], name: str, depth: int, how: OpenOptions) -> Table | Shards:
    images = open_image_files(
        listing, rows, depth=depth, label_columns=how.columns.label, n_class=how.n_class, where=f"{how.path} ({name})"
    )
    return ImageShards(images) if how.streaming else images


def _open_shards(listing: Listing, rows: Sequence[int], name: str, how: OpenOptions) -> Table | Shards:
    of_split = listing.select(rows)
    shards = _make_shards([str(listing.root / file) for file in of_split.names], name, how, root=listing.root)
    if how.streaming:
        return shards
    if isinstance(shards, ParquetShards):
        named = listing if any(file_extension(file) in EXTENSIONS for file in listing.names) else of_split
        return ParquetTable.from_shards(shards, named, how.cache, skip=how.skip)
    return TarTable.from_shards(shards, of_split, skip=how.skip)


def _make_shards(files: Sequence[str], name: str, how: OpenOptions, *, root: Path | None) -> ParquetShards | TarShards:
    where = f"{how.path} ({name})"
    if file_extension(files[0]) == ".parquet":
        return ParquetShards.open(files, how.columns, where, root, skip=how.skip)
    return TarShards.open(files, how.columns, where, skip=how.skip)


def _warn_unread(listing: Listing, read: Sequence[int], splits: Splits, path: str) -> None:
    """Warns of ignored files: other kinds by extension, and the number of files in no split."""
    kinds = listing.unread.copy()
    taken = set(read)
    for i, name in enumerate(listing.names):
        if i not in taken and name.rpartition("/")[2] not in (*METADATA, *SAVED):
            kinds[file_extension(name)] += 1
    message = Listing(listing.root, [], listing.sizes, listing.mtimes, kinds).describe_unread()
    if message:
        named = " (images where a cell names them)" if file_extension(listing.names[read[0]]) == ".parquet" else ""
        log.warning("data: not read below %s: %s%s", path, message, named)
    if splits.unread:
        first = listing.names[read[splits.unread[0]]]
        log.warning("data: %d files below %s are of no split and are not read, as %s", len(splits.unread), path, first)
