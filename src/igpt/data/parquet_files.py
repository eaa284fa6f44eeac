"""Parquet files as shards of a stream, or as a table over an Arrow copy in the cache."""

import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igpt.data import cache as pixel_cache
from igpt.data.image_table import Cell, Columns, class_names, read_cell, split_cell
from igpt.data.listing import Listing
from igpt.data.parquet_pages import read_pages
from igpt.data.shards import BadShardError, FileShards, find_readable_files, format_reason, is_remote, open_shard
from igpt.utils import files

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

_MOST_ROWS = 64  # most rows per read
_MOST_BYTES = 256 << 20  # most bytes per read of several rows
_MOST_PAGE = 512 << 20  # most bytes that a page may unpack to
_MOST_EXPANSION = 100  # images may take this many times the size of their file, plus 64 MiB
_MOST_ROWS_PER_BYTE = 10  # of a file; images have far fewer, empty rows take next to nothing
_ENCODINGS = (0, 2, 3, 6, 8)  # parquet's numbers of encodings in which no value is longer than its page


@dataclass(frozen=True)
class ParquetShards(FileShards):
    """Parquet files of one split as `Shards`. Labels are mapped by class name to those of the first file."""

    columns: Columns
    image: str  # name of the image column
    label: str | None
    names: tuple[str, ...] | None
    where: str
    root: Path | None

    @staticmethod
    def open(paths: Sequence[str], columns: Columns, where: str, root: Path | None, *, skip: bool) -> "ParquetShards":
        """The shards of some files; the first one defines the columns.

        Raises:
            BadShardError: an invalid parquet file.
            ValueError: no image column.
        """
        good = find_readable_files(paths, where, check=_read_schema, skip=skip)
        first = _read_schema(good[0])
        image, label = columns.find(first, where)
        names = class_names(first[label]) if label else None
        if not is_remote(good[0]) and label is not None and names is not None:
            schemas = [class_names(_read_schema(file).get(label)) or () for file in good]
            more = sorted({name for of_file in schemas for name in of_file} - set(names))
            names = (*names, *more)
        return ParquetShards(tuple(good), columns, image, label, names, where, root)

    def read(self, number: int, start: int) -> Iterator[tuple[int, Cell, int | None]]:
        file, row = self.files[number], 0
        try:
            with open_shard(file) as opened:
                parquet = pq.ParquetFile(opened, buffer_size=1 << 20)
                translate = self._map_labels(parquet.schema_arrow, file)
                size = opened.seek(0, os.SEEK_END)
                left = _MOST_EXPANSION * size + (64 << 20)
                if parquet.metadata.num_rows > _MOST_ROWS_PER_BYTE * size:
                    raise BadShardError(
                        f"{file} says that it has {parquet.metadata.num_rows:,} rows, more than fit in it"
                    )
                for group in range(parquet.num_row_groups):
                    n = parquet.metadata.row_group(group).num_rows
                    if row + n <= start:
                        row += n
                        continue
                    wanted = [self.image, *([self.label] if self.label else [])]
                    n_read = self._rows_per_read(parquet, group, None if is_remote(file) else opened)
                    for batch in parquet.iter_batches(n_read, [group], wanted):
                        labels = batch.column(self.label).to_pylist() if self.label else [None] * len(batch)
                        for cell, label in zip(batch.column(self.image), labels, strict=True):
                            if label is not None and not -1 << 63 <= label < 1 << 63:
                                raise BadShardError(f"{file}: row {row} has the label {label}, which is no class")
                            if row >= start:
                                value = cell.as_py()
                                left -= len(split_cell(value)[0] or b"")
                                if left < 0:
                                    raise BadShardError(
                                        f"{file} unpacks to more than {_MOST_EXPANSION} times its size, as no images "
                                        "do: remove it"
                                    )
                                yield row, value, translate(label) if translate and label is not None else label
                            row += 1
        except BadShardError:
            raise
        except Exception as error:  # pyarrow, fsspec and network clients raise many types
            raise BadShardError(f"{file} cannot be read after {row} images: {format_reason(error)}") from error

    def _rows_per_read(self, parquet: pq.ParquetFile, group: int, local: IO[bytes] | None) -> int:
        """The number of rows per read of a row group that keeps the images below _MOST_BYTES; 1 for large images.

        No value is longer than the largest page, a dictionary's included. The pages of remote files are not looked at
        beforehand: their sizes are those that the footer says.

        Raises:
            ValueError: a page that unpacks to more than _MOST_PAGE, or an encoding that may unpack to any size.
        """
        row_group = parquet.metadata.row_group(group)
        chunks = [row_group.column(i) for i in range(row_group.num_columns)]
        largest = 1
        for chunk in chunks:
            column = chunk.path_in_schema.partition(".")[0]
            if column not in (self.image, self.label):
                continue
            if local is None:
                largest = max(largest, chunk.total_uncompressed_size)
                continue
            start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
            for page in read_pages(local, start, chunk.total_compressed_size, chunk.num_values):
                if page.unpacked > _MOST_PAGE:
                    raise ValueError(f"a page unpacks to {page.unpacked:,} bytes, at most {_MOST_PAGE:,} are read")
                if column == self.image and page.encoding not in (*_ENCODINGS, None):
                    raise ValueError(f"its images have parquet's encoding {page.encoding}: write them as plain values")
                largest = max(largest, page.unpacked)
        return max(1, min(_MOST_ROWS, _MOST_BYTES // largest))

    def _map_labels(self, schema: pa.Schema, file: str) -> Any:
        """A function from the labels of a file to those of the split; None if they are equal."""
        features = _read_features(schema)
        if self.label is None:
            return None
        self.columns.find(features, file)
        if self.image not in features or self.label not in features:
            raise BadShardError(f"{file} has no column {self.image!r} or {self.label!r}, which {self.files[0]} has")
        file_names = class_names(features[self.label])
        if (file_names is None) != (self.names is None):
            raise BadShardError(f"{file}: its labels are {'numbers' if file_names is None else 'names'}, those of "
                                f"{self.files[0]} are not: make them alike")  # fmt: skip
        if file_names is None or self.names is None or file_names == self.names[: len(file_names)]:
            return None
        unknown = [name for name in file_names if name not in self.names]
        if unknown:
            raise BadShardError(f"{file} has the class {unknown[0]!r}, which {self.files[0]} does not know")
        to = [self.names.index(name) for name in file_names]
        return lambda label: to[label] if 0 <= label < len(to) else label


def _read_schema(file: str) -> "datasets.Features":
    """The columns of a parquet file. Raises BadShardError if it is invalid or unreadable."""
    try:
        with open_shard(file) as opened:
            return _read_features(pq.read_schema(opened))
    except pa.ArrowInvalid as error:
        raise BadShardError(f"{file} is no parquet file, or is cut short ({format_reason(error)})") from error
    except Exception as error:  # a schema unknown to `datasets`, or a network error
        raise BadShardError(f"{file} cannot be read ({format_reason(error)})") from error


def _read_features(schema: pa.Schema) -> "datasets.Features":
    from datasets import Features  # takes a second, which local image files do not need

    return Features.from_arrow_schema(schema)


def has_images(file: Path, columns: Columns) -> bool:
    """Whether a parquet file is readable and has an image column."""
    try:
        columns.find(_read_schema(str(file)), str(file))
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class ParquetTable:
    """The images of parquet files as a `Table`, read from a memory-mapped Arrow copy."""

    copy: Path
    names: tuple[str, ...] | None
    where: str
    root: Path | None
    fingerprint: str

    @staticmethod
    def from_shards(shards: ParquetShards, listing: Listing, cache: Path, *, skip: bool) -> "ParquetTable":
        """The table of all rows; writes the Arrow copy if it is missing.

        `listing`: the files and the image files that cells may name. With `skip`, unreadable rows are left out; such a
        copy is rewritten each time, since the file may have been repaired.

        Raises:
            BadShardError: a damaged file.
            ValueError: the disk is full or not writable.
        """
        made_of = {"files": [*shards.files], "image": shards.image, "label": shards.label, "names": shards.names}
        digest = pixel_cache.hash_cache_key({"listing": listing.fingerprint, **made_of})
        copy = cache / "parquet" / f"{digest}.arrow"
        if (problem := files.find_damage(copy)) is not None:
            with pixel_cache.file_lock(copy, problem=problem):
                if (problem := files.find_damage(copy)) is not None:
                    pixel_cache.warn_of_damage(copy, problem)
                    files.remove_parts(copy.parent)
                    copy, digest = _copy_rows(shards, copy, digest, skip=skip)
        return ParquetTable(copy, shards.names, shards.where, shards.root, digest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """The fields without the memory map, which another process opens itself."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    @cached_property
    def _reader(self) -> Any:
        return pa.ipc.open_file(pa.memory_map(str(self.copy)))

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of every record batch, then the total number of rows."""
        sizes = [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)]
        return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]

    @cached_property
    def labels(self) -> np.ndarray:
        parts = [self._reader.get_batch(i).column("label").to_numpy() for i in range(len(self._starts) - 1)]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def read_encoded(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            number = bisect_right(self._starts, row) - 1
            batch, within = self._reader.get_batch(number), row - self._starts[number]
            cell = {name: batch.column(name)[within].as_py() for name in ("bytes", "path")}
            yield read_cell(cell, f"row {row} of {self.where}", self.root)


_SCHEMA = pa.schema([("bytes", pa.large_binary()), ("path", pa.string()), ("label", pa.int64())])


def _copy_rows(shards: ParquetShards, to: Path, digest: str, *, skip: bool) -> tuple[Path, str]:
    """Writes the Arrow copy. Returns its path and digest, which differ from `to` and `digest` if rows were left out."""
    log.info("data: copying the images of %s to %s", shards.where, to)
    try:
        with files.temporary_path(to) as temporary:
            with temporary.open("wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
                broken = _write_batches(shards, writer, skip=skip)
            if broken:
                to = to.with_suffix(".partial.arrow")
                digest = pixel_cache.hash_cache_key({"of": digest, "without": broken})
            files.move_with_checksum(temporary, to)
    except OSError as error:
        why = "the images of parquet files are copied there to be read by row; data.streaming=true keeps no copy; "
        raise pixel_cache.unwritable(to, error, why=why) from error
    return to, digest


def _write_batches(shards: ParquetShards, writer: Any, *, skip: bool) -> list[str]:
    """Writes all rows to an Arrow file. Returns what is wrong with the files whose rows were left out."""
    broken = []
    for number in range(len(shards)):
        try:
            for rows in _read_batches(shards, number):
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
        except BadShardError as error:
            if not skip:
                raise BadShardError(f"{error}; data.on_corrupt=skip leaves out what cannot be read") from error
            log.warning("data: %s; what is left of it is left out", error)
            broken.append(str(error))
    return broken


def _read_batches(shards: ParquetShards, number: int) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of rows of one file as records of the copy."""
    rows: list[dict[str, Any]] = []
    n_byte, damage = 0, None
    try:
        for _, cell, label in shards.read(number, 0):
            data, path = split_cell(cell)
            rows.append({"bytes": data, "path": path, "label": -1 if label is None else label})
            n_byte += len(data or b"")
            if len(rows) == _MOST_ROWS or n_byte > _MOST_BYTES:
                yield rows
                rows, n_byte = [], 0
    except BadShardError as error:
        damage = error
    if rows:
        yield rows
    if damage is not None:
        raise damage
