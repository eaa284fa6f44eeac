"""Images decoded once, by all cores: a memory-mapped uint8 file, whole or not there."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from igpt.data.workers import identity_collate, startable_workers
from igpt.distributed.cores import count_cores
from igpt.utils import files

log = logging.getLogger(__name__)

FORMAT = 2  # goes up when the same settings make other pixels
_CHUNK = 64  # images a worker makes at a time
_ALONE = 512  # so few images are made in this process: starting others would take longer

T = TypeVar("T")


class _Chunks(Dataset[Any]):
    """Something made of rows, a chunk at a time."""

    def __init__(self, make: Callable[[Sequence[int]], Any], rows: np.ndarray) -> None:
        self.make, self.rows = make, rows

    def __len__(self) -> int:
        return -(-len(self.rows) // _CHUNK)

    def __getitem__(self, chunk: int) -> Any:
        return self.make(self.rows[chunk * _CHUNK : (chunk + 1) * _CHUNK].tolist())


def in_chunks(make: Callable[[Sequence[int]], T], rows: np.ndarray, what: str) -> Iterator[T]:
    """`make` of all rows in order, in chunks, by as many processes as there are cores, with a progress bar.

    Raises:
        DataError: the first that `make` raised.
    """
    n_process = startable_workers(count_cores()) if len(rows) > _ALONE else 0
    chunks: DataLoader[Any] = DataLoader(
        _Chunks(make, rows), batch_size=None, num_workers=n_process, collate_fn=identity_collate,
        generator=torch.Generator(),  # not the process's own, of which a draw would be taken
    )  # fmt: skip
    with tqdm(total=len(rows), desc=what, unit="image", disable=None) as bar:
        with torch.device("cpu"):  # also where a network is being laid out on the meta device
            parts = iter(chunks)
        try:
            for made in parts:
                yield made
                bar.update(min(_CHUNK, len(rows) - bar.n))
        finally:
            del parts  # ends the other processes now, also where an error keeps this frame


def digest(made_by: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of everything that decides a file's content, the format of the file included."""
    return files.hash_json({"format": FORMAT, **made_by}, sort_keys=True)[:16]


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """While the block lasts, no other process of this machine is in such a block for `path`.

    Raises:
        ValueError: `path`'s folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.info("data: waiting for another process, which makes %s", path)
            lock.acquire()
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def unwritable(path: Path, error: OSError, what: str = "the cache", *, why: str = "") -> ValueError:
    """What to say where a file below the cache cannot be written; `what` it is, and `why` it is needed."""
    reason = error.strerror or str(error)
    return ValueError(
        f"{path} cannot be written ({reason}): {why}make room, or keep {what} elsewhere, paths.cache=FOLDER"
    )


def pixels(path: Path, rows: np.ndarray, resolution: int, make: Callable[[Sequence[int]], np.ndarray]) -> np.ndarray:
    """The pixels of `rows`, memory-mapped: (len(rows), R, R, 3) uint8; made by `make(rows)` when `path` is not there.

    Another process that wants the same file waits for it. What a kill left half built is thrown away.

    Raises:
        BadImageError: as `make` does.
        ValueError: no room for the file, or no right to write it; nothing of it is left.
    """
    shape = (len(rows), resolution, resolution, 3)
    known = _mapped(path, shape)
    if known is not None:  # also where nothing may be written
        return known
    with file_lock(path):
        known = _mapped(path, shape)
        if known is not None:
            return known
        for part in path.parent.glob(f".{path.name}.*.part"):  # nobody else writes it: we are alone
            part.unlink()
        try:
            with files.atomic_write(path) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                files.reserve(file, int(np.prod(shape)))
                for made in in_chunks(make, rows, f"decoding to {path.stem}"):
                    file.write(made.tobytes())
        except OSError as error:
            raise unwritable(path, error) from error
        log.info("data: decoded %d images to %s", len(rows), path)
        made_now = _mapped(path, shape)
    assert made_now is not None
    return made_now


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The file, when it is there and whole."""
    if not path.is_file():
        return None
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        log.warning("data: %s is damaged and is made anew", path)
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None
