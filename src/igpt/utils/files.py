"""Files that are either whole or not there: written under a temporary name, then renamed."""

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
    """A temporary path beside `path` to write to; it takes that name only when the block ends well.

    A full disk or a kill in the middle leaves the old file as it was.
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
    """A temporary folder beside `path` to fill; it takes that name only when the block ends well.

    Raises:
        ValueError: there is something at `path`, which is never overwritten.
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
    """A binary file to write, which appears at `path` as `atomic_path` does."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def reserve(file: IO[bytes], size: int) -> None:
    """Claims the room for what is to come at once: a full disk is met now, not after an hour of work.

    Nothing on systems that cannot (macOS).
    """
    file.flush()
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), file.tell(), size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot: it is met when it is met
            raise


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, written atomically. Raises ValueError on NaN and infinity."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it; nothing when there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Removes what a kill left half written at any depth."""
    for part in list(folder.rglob(".*.part")):
        remove(part)


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises ValueError, naming the file, when it is none."""
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}): it is damaged, restore or remove it") from error


def hash_json(value: Any, **how: Any) -> str:
    """The SHA-256 of a value as JSON, in hexadecimal; `how`: as `json.dumps` has it."""
    return hashlib.sha256(json.dumps(value, **how).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; of a folder, that of the names and sums of its files."""
    if path.is_dir():
        sums = [f"{file.name} {sha256(file)}\n" for file in sorted(path.iterdir()) if file.is_file()]
        return hashlib.sha256("".join(sums).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
