"""Atomic writes (temporary file, then rename), checksums, JSON and hashes of files."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 23  # bytes of a block in `hash_blocks`
MOST_JSON = 512 << 20  # bytes of memory for one file; the largest settings of a network take 320 MB


@contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Context manager: an empty file `.<name>.….part` beside `path`, removed at the end if it is still there.

    It is locked during the block, so that `remove_parts` of another process leaves it alone. An OSError of the block
    names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        _lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # else `remove_parts` was faster than the lock
            break
        os.close(descriptor)
    try:
        with _name_in_errors(path):
            yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Context manager: a folder `.<name>.….part` beside `path`, of this user alone; else as `temporary_path`.

    First removes those that killed processes left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, f".{glob.escape(path.name)}.*.part")
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        with _name_in_errors(path):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Context manager: an OSError of the block that names no file (of write, fsync, NumPy's fwrite) names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise OSError(f"{path} could not be written ({error})") from error
        if error.filename is None:
            error.filename = str(path)
        raise


def _lock(descriptor: int, *, wait: bool = True) -> bool:
    """Locks an open file until it is closed, here and in forked processes; False if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):  # a file system without locks
            raise
        return wait
    return True


def move_into_place(temporary: Path, path: Path) -> None:
    """Renames a complete file or folder to `path`, after its content is on the disk; then so is the name."""
    if temporary.is_dir():
        for inner in sorted(temporary.rglob("*"), reverse=True):
            sync(inner)
    sync(temporary)
    os.chmod(temporary, 0o755 if temporary.is_dir() else 0o644)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that does not sync folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Context manager: a temporary path beside `path`, renamed to `path` if the block succeeds.

    A full disk or a kill leaves the old file unchanged.
    """
    with temporary_path(path) as temporary:
        yield temporary
        move_into_place(temporary, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Context manager: a temporary folder beside `path`, renamed to `path` if the block succeeds.

    Raises:
        ValueError: `path` exists; it is never overwritten.
    """
    if path.exists():
        raise ValueError(f"{path} is there already: remove it, or choose another")
    with temporary_folder(path) as temporary:
        yield temporary
        move_into_place(temporary, path)


@contextmanager
def checksummed_path(path: Path) -> Iterator[Path]:
    """Context manager: as `atomic_path`, with a checksum beside `path` for `find_damage`."""
    with temporary_path(path) as temporary:
        yield temporary
        move_with_checksum(temporary, path)


def move_with_checksum(temporary: Path, path: Path) -> None:
    """As `move_into_place`, for a file. Its checksum is written before it, so that a complete file has one."""
    checksum = hash_blocks(temporary)
    with atomic_write(_checksum_path(path)) as file:
        file.write(f"{checksum}\n".encode())
    move_into_place(temporary, path)
    _intact.add(_identify(path))


def find_damage(path: Path) -> str | None:
    """Why a file of `checksummed_path` may not be used; None if its content has its checksum.

    Each file is read once per process, unless its size or time of modification changes.
    """
    try:
        identity = _identify(path)
        if identity in _intact:
            return None
        if not _checksum_path(path).is_file():
            return "it has no checksum, as those of older releases"
        if _checksum_path(path).read_bytes() != f"{hash_blocks(path)}\n".encode():
            return f"it is damaged: its SHA-256 is not that in {_checksum_path(path).name}"
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read ({error})"
    _intact.add(identity)
    return None


_intact: set[tuple[str, int, int, int]] = set()  # files that were checked by this process


def _identify(path: Path) -> tuple[str, int, int, int]:
    status = path.stat()
    return str(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def hash_blocks(path: Path) -> str:
    """The SHA-256 of the SHA-256 of each block of a file, in hexadecimal; blocks are hashed in parallel."""

    def hash_block(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).digest()

    with ThreadPoolExecutor() as threads:
        return hashlib.sha256(b"".join(threads.map(hash_block, range(0, path.stat().st_size, BLOCK)))).hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Context manager: a binary file to write, renamed to `path` as in `atomic_path`."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def resolve_below(folder: Path, recorded: str | Path) -> Path | None:
    """The path that a record names relative to `folder`; None if it lies elsewhere: absolute, by `..` or by a link.

    Whatever reads a path from a file of a run folder goes through this: such a folder may come from anyone.
    """
    try:
        inside = (folder / recorded).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that no file can have
        return None
    return folder / recorded if inside and not Path(recorded).is_absolute() else None


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


def remove_parts(folder: Path, pattern: str = "**/.*.part") -> None:
    """Removes the temporary files and folders of killed writes; those of live processes are locked and stay."""
    for part in list(folder.glob(pattern)):
        try:
            descriptor = os.open(part, os.O_RDONLY if part.is_dir() else os.O_RDWR)  # NFS locks what may be written
        except OSError:  # just gone, or another user's
            continue
        try:
            with suppress(OSError):  # in a folder that is read-only
                if _lock(descriptor, wait=False):
                    remove(part)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        ValueError: the file, named, is not JSON, or would take more than MOST_JSON bytes of memory.
    """
    try:
        if not stat.S_ISREG((status := path.stat()).st_mode):  # a pipe, which would wait for a writer
            raise ValueError("it is no regular file")
        if status.st_size > MOST_JSON:
            raise ValueError("it is too large")
        content = path.read_bytes()
        # of bytes and text (up to 4 bytes a character, twice), numbers, names and values of objects, lists
        memory = len(content) * (2 if content.isascii() else 9) + 40 * content.count(b",") + 80 * content.count(b'"')
        if memory + 64 * (content.count(b"[") + content.count(b"{")) > MOST_JSON:
            raise ValueError("it is too large")
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # also: not UTF-8, a number of too many digits
        raise ValueError(f"{path} is not a JSON file ({error}): it is damaged, restore or remove it") from error


def hash_json(value: Any, **how: Any) -> str:
    """The SHA-256 of a value as JSON, in hexadecimal; `how`: options of `json.dumps`."""
    return hashlib.sha256(json.dumps(value, **how).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; of a folder: of its files' names and hashes."""
    if path.is_dir():
        with ThreadPoolExecutor() as threads:
            parts = {file.name: threads.submit(sha256, file) for file in path.iterdir() if file.is_file()}
        return combine_sha256({name: part.result() for name, part in parts.items()})
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combine_sha256(parts: Mapping[str, str]) -> str:
    """The SHA-256 of a folder from its files' names and hashes."""
    return hashlib.sha256("".join(f"{name} {parts[name]}\n" for name in sorted(parts)).encode()).hexdigest()
