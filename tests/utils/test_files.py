"""Atomic writing: the old file survives whatever happens to the new one."""

import errno
import multiprocessing as mp
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from igpt.checkpoint.resume import AtomicCheckpointIO, checkpoint_path, latest_checkpoint, mark_latest
from igpt.utils import files
from tests.conftest import run_killed

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from igpt.utils import files
with files.atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half of the n")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""

DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from igpt.utils import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk does, the write fails half way
try:
    with files.atomic_write(Path(sys.argv[1])) as file:
        file.write(b"x" * 100_000)
except OSError:
    sys.exit(3)
"""


@pytest.mark.parametrize(("program", "exit_code"), [(KILLED_WHILE_WRITING, -9), (DISK_FULL, 3)])
def test_the_old_file_survives(tmp_path: Path, program: str, exit_code: int) -> None:
    """Invariant: a kill or a full disk leaves what was there."""
    path = tmp_path / "value.json"
    files.write_json(path, {"good": 1})
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == exit_code
    assert files.read_json(path) == {"good": 1}


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    """Invariant: no temporary file stays."""
    with pytest.raises(KeyError), files.atomic_write(tmp_path / "a") as file:
        file.write(b"1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("create", [files.atomic_path, files.atomic_folder])
def test_an_error_that_names_no_file_names_the_one_to_be_written(tmp_path: Path, create: Any) -> None:
    """Of write and fsync, and NumPy's of fwrite, which has no errno; one that names a file keeps that name."""
    path = tmp_path / "result"
    refused = OSError(errno.EIO, "Input/output error")
    named = FileNotFoundError(errno.ENOENT, "No such file or directory", "input")
    for error, message in (
        (refused, f"[Errno 5] Input/output error: '{path}'"),
        (OSError("51 requested and 0 written"), f"{path} could not be written (51 requested and 0 written)"),
        (named, "[Errno 2] No such file or directory: 'input'"),
    ):
        with pytest.raises(type(error)) as caught, create(path):
            raise error
        assert str(caught.value) == message


def test_parts_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """Invariant: at any depth, files and folders; not those that a live process is writing, here or elsewhere."""

    def begin(name: str) -> Any:
        held = ExitStack()
        held.enter_context(files.temporary_path(tmp_path / name / "file"))
        (held.enter_context(files.temporary_folder(tmp_path / name / "folder")) / "a").write_bytes(b"1")
        return held

    run_killed(lambda: begin("a"))
    assert len(list((tmp_path / "a").iterdir())) == 2
    live = mp.get_context("fork").Process(target=lambda: (begin("b"), time.sleep(60)), daemon=True)
    live.start()
    while len(list((tmp_path).glob("b/.*.part/a"))) < 1:
        time.sleep(0.01)
    with begin("c"):
        files.remove_parts(tmp_path)
        assert sorted(path.parent.name for path in tmp_path.glob("*/.*.part")) == ["b", "b", "c", "c"]
    live.kill()
    live.join()
    files.remove_parts(tmp_path)
    assert not list(tmp_path.glob("*/.*"))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Syncs, renames and removals in their order, by the names of files; a temporary name is `part`."""
    done: list[tuple[str, str]] = []

    def record(function: str) -> None:
        call = getattr(os, function)

        def called(path: Any, *more: Any, **how: Any) -> Any:
            name = Path(os.readlink(f"/proc/self/fd/{path}")) if isinstance(path, int) else Path(path)
            done.append((function, "part" if name.name.endswith(".part") else name.name))
            return call(path, *more, **how)

        monkeypatch.setattr(os, function, called)

    for function in ("fsync", "replace", "unlink"):
        record(function)
    return done


def test_content_and_name_are_on_the_disk(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    """By hand: the content before the rename, the folder after it, also of what is in a folder."""
    with files.atomic_write(tmp_path / "a") as file:
        file.write(b"1")
    assert events[:3] == [("fsync", "part"), ("replace", "part"), ("fsync", tmp_path.name)]
    events.clear()
    with files.atomic_folder(tmp_path / "b") as folder:
        (folder / "c").mkdir()
        (folder / "c" / "d").write_bytes(b"2")
    expected = [("fsync", "d"), ("fsync", "c"), ("fsync", "part"), ("replace", "part"), ("fsync", tmp_path.name)]
    assert events[:5] == expected


def test_a_checkpoint_is_on_the_disk_before_others_go(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    """By hand: the folder is synced after the newest is named and before an older one is removed."""
    for step in (1, 2):
        path = checkpoint_path(tmp_path, step)
        AtomicCheckpointIO().save_checkpoint({"step": step}, path)
        mark_latest(path, keep=2)
    unfinished = tmp_path / "checkpoints" / ".step_0000003.ckpt.part"
    unfinished.mkdir()
    (unfinished / "shard").write_bytes(b"of a rank")
    path = checkpoint_path(tmp_path, 3)
    events.clear()
    AtomicCheckpointIO().replace(unfinished, path, files.sha256(unfinished))
    mark_latest(path, keep=2)
    assert latest_checkpoint(tmp_path) == path
    first = events.index(("unlink", "step_0000001.ckpt"))
    renames = [i for i, (what, _) in enumerate(events) if what == "replace"]
    assert len(renames) == 3  # checksum, folder, latest
    for rename in renames:
        assert ("fsync", "checkpoints") in events[rename:first]
    assert events.index(("fsync", "shard")) < renames[1]


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    """Round trip; damage names the file; NaN is refused, for JSON has none."""
    path = tmp_path / "a.json"
    files.write_json(path, {"x": [1.5, "é"]})
    assert files.read_json(path) == {"x": [1.5, "é"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, float("nan"))
    path.write_text('{"x": ')
    with pytest.raises(ValueError, match=r"a\.json is not a JSON file"):
        files.read_json(path)
