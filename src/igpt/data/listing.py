"""The files below a folder, listed once: splits, classes, counts and the hash of the data all come from this."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt.data.image_decoding import ENDINGS
from igpt.utils import files

SHARD_ENDINGS = (".parquet", ".tar")
METADATA = ("metadata.csv", "metadata.jsonl")  # labels of the images beside them
ARRAYS = (".arrow", ".npy")  # saved by `datasets`; OpenAI's tokens
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # of `datasets.save_to_disk`, beside .arrow files
SYSTEM_FOLDERS = ("__MACOSX", "__pycache__")  # that programs leave behind, and that hold no data
MOST_VISITS = 64  # of one folder, by as many links: folders that link to one another would never end
NOT_REGULAR = -1  # stands for the size of a link to nothing, a pipe, a device


@dataclass(frozen=True)
class Listing:
    """The data files below `root`: images, shards, their metadata; sorted by name, each once.

    A link counts as what it points to. Hidden files and folders, and what programs leave behind, are left out.
    """

    root: Path
    names: list[str]  # relative to `root`, with "/" between folders
    sizes: np.ndarray  # (N,) int64 bytes, or NOT_REGULAR
    mtimes: np.ndarray  # (N,) int64 nanoseconds
    unread: Counter[str]  # ending → how many other files there are
    dangling: tuple[str, ...] = ()  # links to nothing that do not say what they would be, a folder or a file

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: Sequence[int]) -> "Listing":
        """Some of the files, in the order of `index`."""
        rows = np.asarray(index, dtype=np.int64)
        names = [self.names[i] for i in rows.tolist()]
        return Listing(self.root, names, self.sizes[rows], self.mtimes[rows], Counter())

    def with_ending(self, *endings: str) -> list[int]:
        """The indices of the files with one of these endings, in lower or upper case."""
        return [i for i, name in enumerate(self.names) if file_extension(name) in endings]

    @property
    def sha256(self) -> str:
        """A hash of names and sizes: it decides whether two runs have the same data."""
        every = list(zip(self.names, self.sizes.tolist(), strict=True))
        images = [each for each in every if file_extension(each[0]) not in ARRAYS]  # arrays beside images are not read
        return files.hash_json(images or every)

    @property
    def fingerprint(self) -> str:
        """A hash of place, names, sizes and times of change: what was made of these files is kept under it."""
        digest = hashlib.sha256(os.fsencode(self.root.resolve()))
        for array in (self.sizes, self.mtimes):
            digest.update(array.astype("<i8").tobytes())
        digest.update(b"\0".join(map(os.fsencode, self.names)))
        return digest.hexdigest()

    def describe_unread(self) -> str:
        """The files that are not read, counted by ending: `3 .heic, 1 without an ending`; empty when there are none."""
        return ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in self.unread.most_common())


ListFiles = Callable[[Path], Listing]


def hash_files(path: Path, list_files: ListFiles) -> str:
    """A hash of the names and sizes of the data files of a folder; of a file, of its size, for it may be renamed."""
    return files.hash_json(path.stat().st_size) if path.is_file() else list_files(path).sha256


def file_extension(name: str) -> str:
    """The ending of a file's name in lower case, `.jpg`; empty where it has none."""
    return os.path.splitext(name.rpartition("/")[2])[1].lower()


def list_files(path: Path) -> Listing:
    """Lists the data files below a folder, at any depth; of a file, that file alone.

    Links are followed; one that leads back to a folder it lies in is not.

    Raises:
        ValueError: a folder that cannot be listed.
    """
    if path.is_file():
        found = path.stat()
        found_files: Iterable[tuple[str, int, int]] = [(path.name, found.st_size, found.st_mtime_ns)]
        path = path.parent
    else:
        found_files = _walk(path)
    unread: Counter[str] = Counter()
    rows, dangling = [], []
    for name, size, mtime in found_files:
        if _is_data(name, size):
            rows.append((name, size, mtime))
        elif size == NOT_REGULAR and not file_extension(name)[1:].isalpha() and os.path.islink(path / name):
            dangling.append(name)
        else:
            unread[file_extension(name)] += 1
    rows.sort()
    names = [name for name, _, _ in rows]
    sizes = np.fromiter((size for _, size, _ in rows), np.int64, len(rows))
    mtimes = np.fromiter((mtime for _, _, mtime in rows), np.int64, len(rows))
    return Listing(path, names, sizes, mtimes, unread, tuple(sorted(dangling)))


def _is_data(name: str, size: int) -> bool:
    last = name.rpartition("/")[2]
    ending = file_extension(last)
    if ending in ENDINGS or ending in SHARD_ENDINGS:  # read or refused by name
        return True
    return size != NOT_REGULAR and (ending in ARRAYS or last in METADATA or last in SAVED)


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """Every file that is not hidden, as (relative name, size, time of change)."""
    top = os.fspath(root)
    found = os.stat(top)
    # path, relative, the identity of it and those around it
    folders: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(top, "", ((found.st_dev, found.st_ino),))]
    visits: Counter[tuple[int, int]] = Counter()
    while folders:
        folder, prefix, around = folders.pop()
        try:
            entries = os.scandir(folder)
        except OSError as error:
            raise ValueError(f"{folder} cannot be listed ({error.strerror}): make it readable, or move it") from error
        with entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name in SYSTEM_FOLDERS:
                    continue
                try:
                    found = entry.stat()
                except OSError:  # a link to nothing, or in a circle
                    yield prefix + name, NOT_REGULAR, 0
                    continue
                if stat.S_ISDIR(found.st_mode):
                    identity = (found.st_dev, found.st_ino)
                    if identity not in around:
                        visits[identity] += 1
                        if visits[identity] > MOST_VISITS:
                            raise ValueError(
                                f"{entry.path}: links lead to this folder by more than {MOST_VISITS} ways: its files "
                                "would be read as often, remove the links"
                            )
                        folders.append((entry.path, f"{prefix}{name}/", (*around, identity)))
                elif stat.S_ISREG(found.st_mode):
                    yield prefix + name, found.st_size, found.st_mtime_ns
                else:
                    yield prefix + name, NOT_REGULAR, 0
