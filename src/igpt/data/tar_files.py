"""WebDataset tar files as shards of a stream or as a table: image `0001.jpg`, label `0001.cls`.

Reads the member headers and the bytes of images and labels only.
"""

import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from igpt.data.image_decoding import EXTENSIONS, MOST_BYTES, BadImageError
from igpt.data.image_table import WHOLE_NUMBER, Cell, Columns
from igpt.data.listing import Listing
from igpt.data.packed_strings import pack_strings
from igpt.data.shards import BadShardError, FileShards, find_readable_files, format_reason, open_shard

log = logging.getLogger(__name__)

ANY_FORMAT = "image"  # as a name in `data.image_column`: accepts members of every image format
_MOST_LABEL_BYTES = 256


class Sample(NamedTuple):
    """One image of a tar file: the location of its bytes, and its label."""

    name: str  # of the member
    start: int  # offset in the file, bytes
    size: int  # bytes
    label: int | None
    problem: str | None  # reason for not reading it


class _BoundedReads:
    """A file that refuses reads above MOST_BYTES, since tarfile trusts the sizes in headers."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_BYTES:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._file.read(size)


def _read_samples(file: IO[bytes], columns: Columns, unread: Counter[str] | None = None) -> Iterator[Sample]:
    """Yields the samples of a tar file: groups of consecutive members with equal names up to the first dot.

    Hidden members and folders are ignored. `unread` counts other members by extension.

    Raises:
        tarfile.TarError, OSError: not a tar file, or damaged from here on.
    """
    members: dict[str, Any] = {}
    present = None
    with tarfile.open(fileobj=_BoundedReads(file), mode="r:") as tar:  # type: ignore[call-overload]  # has what it calls
        while True:
            member = tar.next()
            tar.members = []  # free the headers already read
            key, ending = _split_sample_name(member.name) if member is not None else (None, "")
            if member is not None and (not key or member.isdir()):
                continue
            if key != present:
                if (sample := _make_sample(members, file, columns, unread)) is not None:
                    yield sample
                members, present = {}, key
            if member is None:
                break
            members.setdefault(ending, member)
        file.seek(tar.offset)  # tarfile treats an unreadable header as the end of the archive
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("it is damaged, or ends in the middle of a header")


def _split_sample_name(name: str) -> tuple[str, str]:
    """The sample's key and the member's extension: `a/0001.seg.png` → `a/0001`, `seg.png`; hidden: two empty texts."""
    folder, slash, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    return (folder + slash + stem, ending.lower()) if stem and dot else ("", "")


def _make_sample(
    members: dict[str, tarfile.TarInfo], file: IO[bytes], columns: Columns, unread: Counter[str] | None
) -> Sample | None:
    endings = list(columns.image)
    if ANY_FORMAT in endings:  # any image format
        endings += sorted(ending for ending in members if f".{ending}" in EXTENSIONS)
    of_image = next((ending for ending in endings if ending in members), None)
    of_label = next((ending for ending in columns.label if ending in members), None)
    if unread is not None:
        unread.update(f".{ending}" for ending in members.keys() - {of_image, of_label})
    if of_image is None:
        return None
    image, problem = members[of_image], None
    if not image.isreg():
        problem = "it is a link or a device, which is not followed"
    elif image.issparse() or image.size > MOST_BYTES:
        problem = f"it unpacks to {image.size:,} bytes, of which at most {MOST_BYTES:,} are read"
    number = None if of_label is None else _read_label(members[of_label], file)
    return Sample(image.name, image.offset_data, image.size, number, problem)


def _read_label(label: tarfile.TarInfo, file: IO[bytes]) -> int:
    if not label.isreg() or label.issparse() or label.size > _MOST_LABEL_BYTES:
        raise tarfile.ReadError(f"{label.name} is no label: it is a link, or has {label.size:,} bytes")
    file.seek(label.offset_data)
    text = file.read(label.size).decode("ascii", "replace").strip()
    if not WHOLE_NUMBER.fullmatch(text):
        raise tarfile.ReadError(f"{label.name} holds {text[:40]!r}, expected a whole number")
    return int(text)


def _read_sample(file: IO[bytes], sample: Sample) -> bytes:
    file.seek(sample.start)
    data = file.read(sample.size)
    if len(data) < sample.size:
        raise tarfile.ReadError("it ends in the middle of an image")
    return data


@dataclass(frozen=True)
class TarShards(FileShards):
    """Tar files of one split as `Shards`."""

    columns: Columns
    where: str
    root: None = None  # tar files hold no paths to follow
    names: None = None

    @staticmethod
    def open(paths: Sequence[str], columns: Columns, where: str, *, skip: bool) -> "TarShards":
        """The shards of some files. Raises BadShardError on an invalid file, ValueError if the first has no image."""
        good = find_readable_files(paths, where, check=_check_tar, skip=skip)
        shards = TarShards(tuple(good), columns, where)
        _check_images(shards, good[0])
        return shards

    def read(self, number: int, start: int) -> Iterator[tuple[int, Cell, int | None]]:
        path, row = self.files[number], 0
        try:
            with open_shard(path) as file:
                for row, sample in enumerate(_read_samples(file, self.columns)):
                    if row >= start:
                        bad = BadImageError(f"{sample.name} in {path}: {sample.problem}") if sample.problem else None
                        yield row, bad or _read_sample(file, sample), sample.label
                    row += 1
        except Exception as error:  # tarfile, fsspec and network clients raise many types
            raise BadShardError(f"{path} cannot be read after {row} images: {format_reason(error)}") from error


def _check_tar(path: str) -> None:
    """Raises BadShardError unless a file begins with a tar header."""
    try:
        with open_shard(path) as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadShardError(f"{path} is no tar file, or is empty ({error})") from error
    except Exception as error:  # network errors of many types
        raise BadShardError(f"{path} cannot be read ({format_reason(error)})") from error


def _check_images(shards: TarShards, path: str) -> None:
    """Raises ValueError if a tar file is readable and has no image."""
    try:
        with open_shard(path) as file:
            if next(_read_samples(file, shards.columns), None) is None:
                raise ValueError(
                    f"{shards.where}: none of the endings {', '.join(shards.columns.image)} is there "
                    f"(data.image_column) in {path}"
                )
    except (tarfile.TarError, OSError):
        return  # reading reports it


@dataclass(frozen=True)
class TarTable:
    """The images of tar files as a `Table`, by an index of byte offsets that is built once."""

    files: tuple[str, ...]
    file_index: np.ndarray  # (N,) index into files
    starts: np.ndarray  # (N,)
    sizes: np.ndarray  # (N,) bytes; -1: not readable
    members: Any  # Arrow strings: member names
    labels: np.ndarray
    where: str
    fingerprint: str
    names: None = None

    @staticmethod
    def from_shards(shards: TarShards, listing: Listing, *, skip: bool) -> "TarTable":
        """Indexes the shards. Raises BadShardError on a damaged file; with `skip`, unreadable samples are left out."""
        of: list[int] = []
        samples: list[Sample] = []
        unread: Counter[str] = Counter()
        for number, path in enumerate(shards.files):
            before = len(samples)
            try:
                with open_shard(path) as file:
                    for sample in _read_samples(file, shards.columns, unread):
                        of.append(number)
                        samples.append(sample)
            except (tarfile.TarError, OSError) as error:
                read = len(samples) - before
                broken = BadShardError(f"{path} cannot be read after {read} images: {format_reason(error)}")
                if not skip:
                    raise BadShardError(f"{broken}; data.on_corrupt=skip leaves out what cannot be read") from error
                log.warning("data: %s; what is left of it is left out", broken)
        if unread:
            counted = ", ".join(f"{count:,} {ending}" for ending, count in unread.most_common())
            log.warning("data: not read in the tar files of %s: %s", shards.where, counted)
        return TarTable(
            shards.files, np.array(of, np.int32),
            np.array([sample.start for sample in samples], np.int64),
            np.array([-1 if sample.problem else sample.size for sample in samples], np.int64),
            pack_strings((sample.name.encode(errors="replace") for sample in samples), pa.large_string()),
            np.array([-1 if sample.label is None else sample.label for sample in samples], np.int64),
            shards.where, listing.fingerprint,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.file_index)

    def read_encoded(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            path = self.files[self.file_index[row]]
            where = f"{self.members[row]} in {path}"
            if self.sizes[row] < 0:
                raise BadImageError(f"{where}: it is a link, a device, or unpacks to more than {MOST_BYTES:,} bytes")
            try:
                with open_shard(path) as file:
                    yield where, _read_sample(file, Sample(where, self.starts[row], self.sizes[row], None, None))
            except (tarfile.TarError, OSError) as error:
                raise BadImageError(f"{where}: it cannot be read ({format_reason(error)})") from error
