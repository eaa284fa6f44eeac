"""The compiled C library in the user's cache: checked before it is loaded, never another user's, made anew."""

import ctypes
import multiprocessing as mp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from igpt.model import c_library, cpu
from tests.conftest import needs_compiler, run_killed

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of this user, or where none is kept a new one."""
    compiler = c_library.find_compiler() or []
    c_library.load_library()
    known = c_library.find_library(c_library.library_path(compiler))
    return known or c_library.compile_library(tmp_path_factory.mktemp("built"), compiler)


@pytest.fixture
def compiled(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """An empty cache below `tmp_path`; the folders in which the library is compiled from here on, by copying it."""
    folders: list[Path] = []

    def compile_library(folder: Path, compiler: list[str]) -> Path:
        folders.append(folder)
        return Path(shutil.copy(built, folder / "native.so"))

    monkeypatch.setattr(c_library, "compile_library", compile_library)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c_library.load_library.cache_clear()
    yield folders
    c_library.load_library.cache_clear()


def load_again() -> ctypes.CDLL | None:
    c_library.load_library.cache_clear()
    return c_library.load_library()


def list_libraries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "igpt" / "kernels").iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def clear_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, clear_page, lambda path: path.write_bytes(b"")])
def test_a_damaged_library_is_compiled_again(
    damage: Callable[[Path], object], compiled: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: it is not loaded (a cut one ends the process by SIGBUS), said, and the same again."""
    assert load_again() is not None
    (path,) = list_libraries(tmp_path)
    complete = path.read_bytes()
    path.unlink()
    path.write_bytes(complete)  # a file of its own: the first is mapped into this process
    damage(path)
    assert load_again() is not None
    assert f"{path} is damaged, attend.c and decode.c are compiled again: its SHA-256 is not that in" in caplog.text
    assert [kept.read_bytes() for kept in list_libraries(tmp_path)] == [complete]
    assert len(compiled) == 2


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.mark.parametrize("which", ["file", "folder"])
@pytest.mark.parametrize("how", ["group", "others", "owner"])
def test_what_others_may_write_is_not_loaded(
    how: str, which: str, compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Invariant: nothing is loaded from a folder that others may write, nor a file of theirs; one is compiled."""
    load_again()
    (path,) = list_libraries(tmp_path)
    changed = path if which == "file" else path.parent
    if how == "owner":
        give_away(changed, monkeypatch)
    else:
        changed.chmod(changed.stat().st_mode | (0o020 if how == "group" else 0o002))
    loaded: list[str] = []
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded.append(name) or load(name))
    assert load_again() is not None
    assert f"{changed} may be written by others" in caplog.text
    if which == "folder" or (how == "owner" and os.geteuid()):
        assert "compiled for this process alone" in caplog.text
        assert not Path(loaded[0]).is_relative_to(tmp_path / "cache")
    else:
        (now,) = list_libraries(tmp_path)
        cpu.check_private(now)
    assert len(compiled) == 2


def without_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", refuse)


def read_only_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))


def full_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", refuse)


def no_execution(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a disk that is mounted with noexec."""
    load = ctypes.CDLL

    def refuse(name: str) -> ctypes.CDLL:
        if Path(name).is_relative_to(place / "cache"):
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)


@pytest.mark.parametrize("broken", [without_home, read_only_home, full_disk, no_execution])
def test_without_a_cache(
    broken: Callable[[Path, pytest.MonkeyPatch], None], compiled: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Invariant: it is compiled for this process, which is said in a line, and nothing temporary is left."""
    broken(tmp_path, monkeypatch)
    assert load_again() is not None
    (message,) = [record.message for record in caplog.records]
    assert "compiled for this process alone, since the cache fails" in message
    assert not list(tmp_path.rglob("*.part"))
    assert len(compiled) == 1


def test_processes_that_need_it_at_once(compiled: list[Path], tmp_path: Path) -> None:
    """Invariant: each loads a complete one; one file is kept."""
    context = mp.get_context("fork")
    answers: mp.Queue[bool] = context.Queue()
    processes = [
        context.Process(target=lambda: answers.put(load_again() is not None), daemon=True) for _ in range(4)
    ]  # fmt: skip
    for process in processes:
        process.start()
    assert [answers.get(timeout=30) for _ in processes] == [True] * 4
    for process in processes:
        process.join(30)
    assert len(list_libraries(tmp_path)) == 1


def test_killed_while_it_is_compiled(compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: the folder that it leaves is gone after the next time."""

    def stop(folder: Path, compiler: list[str]) -> Path:
        os.kill(os.getpid(), 9)
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(c_library, "compile_library", stop)
        run_killed(load_again)
    assert len(list(tmp_path.glob(".igpt-library.*.part"))) == 1
    assert load_again() is not None
    assert not list(tmp_path.glob(".igpt-library.*.part"))
