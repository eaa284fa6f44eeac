"""The listing of data files below a folder, the single source of splits, classes, counts and the data hash."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt.data.image_decoding import EXTENSIONS
from igpt.utils import files

SHARD_EXTENSIONS = (".parquet", ".tar")
METADATA = ("metadata.csv", "metadata.jsonl")  # labels of the images beside them
ARRAYS = (".arrow", ".npy")  # saved by `datasets`; OpenAI's tokens
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # `datasets.save_to_disk`, beside .arrow files
SYSTEM_FOLDERS = ("__MACOSX", "__pycache__")  # created by other programs, without data
MOST_VISITS = 64  # most links to one folder: mutual links would multiply without end
NOT_REGULAR = -1  # as size: a broken link, a pipe or a device


@dataclass(frozen=True)
class Listing:
    """The data files below `root`: images, shards and metadata; sorted by name, without duplicates.

    Links are resolved. Hidden files and folders and SYSTEM_FOLDERS are left out.
    """

    root: Path
    names: list[str]  # relative to `root`, with "/" between folders
    sizes: np.ndarray  # (N,) int64 bytes, or NOT_REGULAR
    mtimes: np.ndarray  # (N,) int64 nanoseconds
    unread: Counter[str]  # extension → number of other files
    dangling: tuple[str, ...] = ()  # broken links without a file extension: possibly folders

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: Sequence[int]) -> "Listing":
        """The listing of the files at `index`, in that order."""
        rows = np.asarray(index, dtype=np.int64)
        names = [self.names[i] for i in rows.tolist()]
        return Listing(self.root, names, self.sizes[rows], self.mtimes[rows], Counter())

    def find_by_extension(self, *endings: str) -> list[int]:
        """Indices of the files with one of these extensions, in any case."""
        return [i for i, name in enumerate(self.names) if file_extension(name) in endings]

    @property
    def sha256(self) -> str:
        """The hash of names and sizes by which runs are compared: equal for the same data."""
        every = list(zip(self.names, self.sizes.tolist(), strict=True))
        images = [each for each in every if file_extension(each[0]) not in ARRAYS]  # arrays beside images are ignored
        return files.hash_json(images or every)

    @property
    def fingerprint(self) -> str:
        """The hash of root, names, sizes and modification times: the cache key of derived files."""
        digest = hashlib.sha256(os.fsencode(self.root.resolve()))
        for array in (self.sizes, self.mtimes):
            digest.update(array.astype("<i8").tobytes())
        digest.update(b"\0".join(map(os.fsencode, self.names)))
        return digest.hexdigest()

    def describe_unread(self) -> str:
        """Counts of ignored files by extension: `3 .heic, 1 without an ending`; empty if there are none."""
        return ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in self.unread.most_common())


ListFiles = Callable[[Path], Listing]


def hash_files(path: Path, list_files: ListFiles) -> str:
    """The hash of a folder's data files by name and size; of a single file by size alone, so that it may be renamed."""
    return files.hash_json(path.stat().st_size) if path.is_file() else list_files(path).sha256


def file_extension(name: str) -> str:
    """The extension of a file name in lower case, `.jpg`; empty without one."""
    return os.path.splitext(name.rpartition("/")[2])[1].lower()


def list_files(path: Path) -> Listing:
    """Lists the data files below a folder, at any depth; for a file, that file alone.

    Links are followed, except to a folder that contains them.

    Raises:
        ValueError: an unreadable folder, or more than MOST_VISITS links to one folder.
    """
    if path.is_file():
        status = path.stat()
        found_files: Iterable[tuple[str, int, int]] = [(path.name, status.st_size, status.st_mtime_ns)]
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
    if ending in EXTENSIONS or ending in SHARD_EXTENSIONS:  # kept even if not regular: reading reports the file by name
        return True
    return size != NOT_REGULAR and (ending in ARRAYS or last in METADATA or last in SAVED)


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """Yields every visible file as (relative name, size, modification time in ns)."""
    top = os.fspath(root)
    status = os.stat(top)
    # path, relative prefix, (device, inode) of the folder and its parents
    folders: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(top, "", ((status.st_dev, status.st_ino),))]
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
                    status = entry.stat()
                except OSError:  # a broken or circular link
                    yield prefix + name, NOT_REGULAR, 0
                    continue
                if stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    if identity not in around:
                        visits[identity] += 1
                        if visits[identity] > MOST_VISITS:
                            raise ValueError(
                                f"{entry.path}: links lead to this folder by more than {MOST_VISITS} ways: its files "
                                "would be read as often, remove the links"
                            )
                        folders.append((entry.path, f"{prefix}{name}/", (*around, identity)))
                elif stat.S_ISREG(status.st_mode):
                    yield prefix + name, status.st_size, status.st_mtime_ns
                else:
                    yield prefix + name, NOT_REGULAR, 0
