"""The cache of decoded pixels: memory-mapped uint8 files, written once by all cores and atomically."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from igpt.data.workers import startable_workers
from igpt.distributed.cores import count_cores
from igpt.utils import files

log = logging.getLogger(__name__)

FORMAT = 2  # version of the cache; raise it when the same settings decode to other pixels
_CHUNK = 64  # rows per DataLoader item
_SERIAL_BELOW = 512  # up to this many rows, starting worker processes costs more than it saves

T = TypeVar("T")


def map_chunks(make: Callable[[Sequence[int]], T], rows: np.ndarray, what: str) -> Iterator[T]:
    """Yields `make(chunk)` for consecutive chunks of `rows`, computed by one worker per core, with a progress bar.

    Raises:
        DataError: the first error of `make`.
    """
    n_process = startable_workers(count_cores()) if len(rows) > _SERIAL_BELOW else 0
    chunks: Any = [rows[start : start + _CHUNK].tolist() for start in range(0, len(rows), _CHUNK)]
    generator = torch.Generator()  # the DataLoader draws a seed: not from the global generator
    loader = DataLoader(chunks, batch_size=None, num_workers=n_process, collate_fn=make, generator=generator)
    with tqdm(total=len(rows), desc=what, unit="image", disable=None, leave=False) as bar:
        with torch.device("cpu"):  # the caller may have the meta device as default
            parts = iter(loader)
        try:
            for chunk in parts:
                yield chunk
                bar.update(min(_CHUNK, len(rows) - bar.n))
        finally:
            del parts  # shuts the workers down now, even if a traceback keeps this frame alive


def hash_cache_key(cache_key: Mapping[str, Any]) -> str:
    """The 16 hexadecimal digits of the cache key: a hash of `cache_key` and the cache format."""
    return files.hash_json({"format": FORMAT, **cache_key}, sort_keys=True)[:16]


@contextmanager
def file_lock(path: Path, *, problem: str | None = None) -> Iterator[None]:
    """Holds the lock file `<path>.lock` during the block: one process of this machine at a time.

    Raises:
        ValueError: the folder of `path` is not writable; with the `problem` of a file that is there.
    """
    why = f"{problem}; " if problem is not None and path.exists() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.info("data: waiting for another process, which makes %s", path)
            lock.acquire()
    except OSError as error:
        raise unwritable(path, error, why=why) from error
    try:
        yield
    finally:
        lock.release()


def unwritable(path: Path, error: OSError, what: str = "the cache", *, why: str = "") -> ValueError:
    """The error for a file below the cache that cannot be written. `what`: its name; `why`: a reason, placed first."""
    reason = error.strerror or str(error)
    return ValueError(
        f"{path} cannot be written ({reason}): {why}make room, or keep {what} elsewhere, paths.cache=FOLDER"
    )


def read_or_make(path: Path, read: Callable[[], T | None], write: Callable[[IO[bytes]], object]) -> T:
    """`read()`, if the content of `path` has its checksum; else the same after `write` has written it to a file.

    `read` returns None where the file holds something else than is wanted. A lock keeps other processes from making
    the same file; a cache that is complete needs none, so it may be read-only. What killed processes left is deleted.

    Raises:
        ValueError: the disk is full or not writable; no partial file is left.
    """
    value, problem = _read_intact(path, read)
    if value is not None:
        return value
    with file_lock(path, problem=problem):
        value, problem = _read_intact(path, read)
        if value is not None:
            return value
        warn_of_damage(path, problem)
        files.remove_parts(path.parent)
        try:
            with files.checksummed_path(path) as temporary, temporary.open("wb") as file:
                write(file)
        except OSError as error:
            raise unwritable(path, error) from error
        value, problem = _read_intact(path, read)
    assert value is not None, problem
    return value


def _read_intact(path: Path, read: Callable[[], T | None]) -> tuple[T | None, str]:
    """(value, ""), or (None, why there is none)."""
    problem = files.find_damage(path)
    value = read() if problem is None else None
    return value, "" if value is not None else problem or "it holds something else than is wanted"


def warn_of_damage(path: Path, problem: str | None) -> None:
    """Says that a file that is there is made anew, and why."""
    if problem is not None and path.exists():
        log.warning("cache: %s is made anew: %s", path, problem)


def load_pixels(
    path: Path, rows: np.ndarray, resolution: int, make: Callable[[Sequence[int]], np.ndarray]
) -> np.ndarray:
    """The decoded pixels of `rows`, memory-mapped: (len(rows), R, R, 3) uint8. Writes `path` by `make` if missing.

    Raises:
        BadImageError: from `make`.
        ValueError: the disk is full or not writable; no partial file is left.
    """

    def write(file: IO[bytes]) -> None:
        for decoded in map_chunks(make, rows, f"decoding to {path.stem}"):
            file.write(decoded.tobytes())
        log.info("data: decoded %d images to %s", len(rows), path)

    return map_array(path, (len(rows), resolution, resolution, 3), np.uint8, write)


def map_array(
    path: Path, shape: tuple[int, ...], dtype: type[np.generic], write: Callable[[IO[bytes]], None]
) -> np.ndarray:
    """The memory-mapped array in the `.npy` file `path`; `write` writes its values if there is none of this shape.

    Raises:
        ValueError: as `read_or_make`.
    """

    def read() -> np.ndarray | None:
        mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped if mapped.shape == shape and mapped.dtype == dtype else None

    def write_array(file: IO[bytes]) -> None:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        files.reserve_space(file, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        write(file)

    return read_or_make(path, read, write_array)
