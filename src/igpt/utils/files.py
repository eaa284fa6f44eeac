"""Atomic writes (temporary file, then rename), JSON and hashes of files."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Context manager: a temporary path beside `path`, renamed to `path` if the block succeeds.

    A full disk or a kill leaves the old file unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Context manager: a temporary folder beside `path`, renamed to `path` if the block succeeds.

    Raises:
        ValueError: `path` exists; it is never overwritten.
    """
    if path.exists():
        raise ValueError(f"{path} is there already: remove it, or choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Context manager: a binary file to write, renamed to `path` as in `atomic_path`."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def reserve_space(file: IO[bytes], size: int) -> None:
    """Allocates disk space for `size` bytes at the file position, so that a full disk raises OSError now, not later.

    No effect on systems without `posix_fallocate` (macOS).
    """
    file.flush()
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), file.tell(), size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not supported by the file system: no early error then
            raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises ValueError on NaN and infinity."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def remove(path: Path) -> None:
    """Removes a file, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Removes the temporary files of killed writes, at any depth."""
    for part in list(folder.rglob(".*.part")):
        remove(part)


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises ValueError, naming the file, if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}): it is damaged, restore or remove it") from error


def hash_json(value: Any, **how: Any) -> str:
    """The SHA-256 of a value as JSON, in hexadecimal; `how`: options of `json.dumps`."""
    return hashlib.sha256(json.dumps(value, **how).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; of a folder: of its files' names and hashes."""
    if path.is_dir():
        sums = [f"{file.name} {sha256(file)}\n" for file in sorted(path.iterdir()) if file.is_file()]
        return hashlib.sha256("".join(sums).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
