"""Runs that are killed, and refused by the disk, at their file operations: a sample of `benchmarks/reliability.py`."""

import errno
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler, cc"
)

SCRIPT = """
import os
from pathlib import Path
os.mkdir("a")
with open("a/new", "wb", buffering=0) as file:
    try:
        file.write(b"0123456789")
    except OSError as error:
        print("write", error.errno)
    try:
        os.fsync(file.fileno())
    except OSError as error:
        print("fsync", error.errno)
open("a/new", "rb").read()
os.makedirs("a", exist_ok=True)
os.replace("a/new", "a/old")
os.chmod("a/old", 0o600)
Path("gone").unlink(missing_ok=True)
os.unlink("a/old")
"""
OPERATIONS = ["mkdir a", "create a/new", "write a/new", "fsync a/new", "rename a/old", "chmod a/old", "unlink a/old"]


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fault_injection import compile_library

    return compile_library(tmp_path_factory.mktemp("library"))


def run_script(library: Path, folder: Path, kind: str | None = None, at: int = 0) -> tuple[int, str, list[str]]:
    """SCRIPT in `folder/work`, with a fault: its exit code, its output, its operations."""
    from fault_injection import Fault, read_operations, write_control

    work, control = folder / "work", folder / "control"
    work.mkdir()
    write_control(control, None if kind is None else Fault(0, at, kind))
    environment = {"LD_PRELOAD": library, "FAULTS_ROOT": work, "FAULTS_CONTROL": control}
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        cwd=work,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    return done.returncode, done.stdout, [f"{each.name} {each.path}" for each in read_operations(control)]


def test_operations_that_write_are_numbered_in_their_order(library: Path, tmp_path: Path) -> None:
    """By hand: reading, and what finds nothing to do, are none."""
    assert run_script(library, tmp_path) == (0, "", OPERATIONS)


def test_kill_at_a_write_leaves_half_of_its_bytes(library: Path, tmp_path: Path) -> None:
    code, _, operations = run_script(library, tmp_path, "KILL", 3)
    assert (code, operations) == (-9, OPERATIONS[:3])
    assert (tmp_path / "work" / "a" / "new").read_bytes() == b"01234"


@pytest.mark.parametrize(("kind", "failed"), [("EIO", ["write"]), ("ENOSPC", ["fsync"])])
def test_error_is_met_once_and_a_full_disk_stays_full(
    library: Path, tmp_path: Path, kind: str, failed: list[str]
) -> None:
    """A disk that becomes full during a write takes the first half, as the kernel's does; then nothing."""
    code, output, _ = run_script(library, tmp_path, kind, 3)
    assert output == "".join(f"{name} {getattr(errno, kind)}\n" for name in failed)
    assert code == (1 if kind == "ENOSPC" else 0)  # the rename after it


def test_faults_are_spread_over_kinds_of_operations(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: no kind of operation has two kills before every kind has one; and errors are those it can meet."""
    import reliability
    from fault_injection import Operation

    monkeypatch.setenv("LD_PRELOAD", str(library))
    paths = [f"runs/pretrain-s0-0123abcd/checkpoints/.step_000000{i % 7}.ckpt.abcd_{i:03d}.part" for i in range(40)]
    operations = [Operation(0, i + 1, ("write", "unlink", "rename")[i % 3], paths[i]) for i in range(40)]
    assert len({each.kind for each in operations}) == 3
    assert {each.file for each in operations} == {f"step_000000{i}.ckpt" for i in range(7)}
    chosen = [*reliability.choose_faults(operations, 7, 40, random.Random(0))]
    kills, errors = chosen[:7], chosen[7:]
    assert sorted(Counter(operations[each.at - 1].name for each in kills).values()) == [2, 2, 3]
    met = {(operations[each.at - 1].name, each.kind) for each in errors}
    assert met == {
        *(("write", kind) for kind in ("ENOSPC", "EIO")),
        *(("unlink", kind) for kind in ("EIO", "EACCES")),
        *(("rename", kind) for kind in ("ENOSPC", "EIO", "EACCES")),
    }


def test_what_is_lost_is_found(tmp_path: Path) -> None:
    """Of checkpoints: one without its checksum is none; one that was written, and is gone, is a violation."""
    import reliability_checks
    from fault_injection import Operation, ProcessResult

    folder = tmp_path / "runs" / "pretrain-1" / "checkpoints"
    folder.mkdir(parents=True)
    for step, content in ((2, b"two"), (4, b"four")):
        (folder / f"step_{step:07d}.ckpt").write_bytes(content)
    (folder / "step_0000002.sha256").write_text(hashlib.sha256(b"two").hexdigest() + "\n")
    (folder / "step_0000004.sha256").write_text(hashlib.sha256(b"fou").hexdigest() + "\n")
    assert reliability_checks.find_steps(tmp_path) == {"pretrain-1": 2}
    at = [
        Operation(0, number, "rename", f"runs/pretrain-1/checkpoints/step_{step:07d}.sha256")
        for number, step in enumerate((2, 4), 1)
    ]
    before, after = (ProcessResult(-9, "", at, hit) for hit in (at[1], None))
    assert reliability_checks.check_killed(before, tmp_path) == []
    assert reliability_checks.check_killed(after, tmp_path) == ["the checkpoint of step 4 was written and is gone"]


@pytest.mark.parametrize(
    ("code", "text", "path", "expected"),
    [
        (0, "step 2/6: 2.5", "runs/a/log.txt", ("equal", [])),
        (0, "a.png was not written", "runs/a/.a.png.abcdefgh.part", ("warning", [])),
        (2, "error: x/model.safetensors: the disk is full", "x/model.safetensors", ("error", [])),
        (2, "error: the disk is full", "x/model.safetensors", ("error", ["no error that names model.safetensors"])),
        (2, "error: log.txt: the disk is full", "runs/a/log.txt", ("error", ["a bystander ends the run"])),
        (2, "error: x/latest: the disk is full", "runs/a/log.txt", ("error", [])),
        (1, "Traceback:\nerror: x", "x", ("error", ["a traceback", "exit code 1"])),
    ],
)
def test_how_errors_end(tmp_path: Path, code: int, text: str, path: str, expected: tuple[str, list[str]]) -> None:
    import reliability_checks
    from fault_injection import Fault, Operation, ProcessResult

    baseline = reliability_checks.Baseline("pretrain", tmp_path, [], "step 4/6: 2.4", {})
    at, later = Operation(0, 1, "write", path), Operation(0, 2, "write", "runs/a/checkpoints/.latest.abcdefgh.part")
    result = ProcessResult(code, text, [at, later], at)
    how, problems = reliability_checks.check_failed(result, baseline, tmp_path, Fault(0, 1, "ENOSPC"))
    assert (how, [problem.partition(":")[0] for problem in problems]) == expected


@pytest.mark.ci
def test_sample_of_kills_and_errors(tmp_path: Path) -> None:
    """Invariant: killed and resumed = undisturbed, to the bit; an error names its file, or changes nothing."""
    command = [sys.executable, str(BENCHMARKS / "reliability.py"), "--sample"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^3 kills, 2 errors .*, 0 violations", done.stdout, re.MULTILINE), done.stdout
