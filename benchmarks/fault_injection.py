"""`python train.py …` as a fork of this process, killed at one of its file operations or refused it (Linux).

This process has `fault_injection.c` preloaded and has imported what a run imports, so that a run takes half a second.
"""

import atexit
import contextlib
import ctypes
import errno
import functools
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TRAIN = Path(__file__).parents[1] / "train.py"
SOURCE = Path(__file__).with_name("fault_injection.c")
KILL, ERRORS = "KILL", ("ENOSPC", "EIO", "EACCES")
PROCESS_SECONDS = 90
ORPHAN_SECONDS = 20  # for the processes that a killed one leaves
N_SLOT = 64  # of `struct control` in SOURCE
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Operation:
    """A file operation of a run, in the folder that it runs in. `slot`: 0, or 1 + the rank."""

    slot: int
    number: int
    name: str
    path: str

    @property
    def file(self) -> str:
        """Name of the file; of a temporary one, the name that it will have."""
        return re.sub(r"^\.(.+?)(\.[a-z0-9_]{8}|\.\d+)?\.part$", r"\1", Path(self.path).name)

    @property
    def kind(self) -> tuple[int, str, str]:
        """Equal for operations that differ only in a step, a number, a hash or a temporary name."""
        path = re.sub(r"\.[a-z0-9_]{8}\.part|(?<=tmp)/?[a-z0-9_]{8}|-[0-9a-z_]{8}(?=/|$)", "", self.path)
        return self.slot, self.name, re.sub(r"\d+", "N", path)

    @property
    def faults(self) -> list["Fault"]:
        """What can happen at it."""
        able = load_library().faults_can_fail
        errors = [name for name in ERRORS if able(self.name.encode(), ctypes.c_long(getattr(errno, name)))]
        return [Fault(self.slot, self.number, kind) for kind in (KILL, *errors)]


@dataclass(frozen=True)
class Fault:
    """An operation at which the process is killed, or which fails with an error. ENOSPC stays: later ones fail, too."""

    slot: int
    at: int
    kind: str  # KILL, or one of ERRORS


@dataclass
class ProcessResult:
    """A run that has ended, with all processes that it started."""

    code: int  # exit code, negative for a signal
    text: str  # its terminal
    operations: list[Operation]
    hit: Operation | None  # where the fault was
    problems: list[str] = field(default_factory=list)


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library that is preloaded here."""
    return ctypes.CDLL(os.environ["LD_PRELOAD"])


def compile_library(folder: Path) -> Path:
    """Compiles SOURCE into a folder; returns the library's path, to be preloaded."""
    library = folder / "fault_injection.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


def write_control(path: Path, fault: Fault | None) -> None:
    """Writes `struct control` of SOURCE: nothing is counted yet."""
    values = [0] * 6
    if fault is not None:
        action = 1 if fault.kind == KILL else 2
        values = [fault.slot, fault.at, action, getattr(errno, fault.kind, 0), int(fault.kind == "ENOSPC"), 0]
    path.write_bytes(bytes(8 * N_SLOT) + struct.pack("6l", *values))
    Path(f"{path}.log").unlink(missing_ok=True)


def read_operations(control: Path) -> list[Operation]:
    log = Path(f"{control}.log")
    lines = [line.split("\t") for line in log.read_text().splitlines()] if log.is_file() else []
    return [Operation(int(slot), int(number), name, path) for slot, number, name, path in lines]


def run_train(
    place: Path, arguments: Sequence[str], fault: Fault | None = None, *, forks: bool = True
) -> ProcessResult:
    """Runs `python train.py ARGUMENTS` in `place/work`, with its terminal in `console.txt` there.

    `forks`: jobs of a sweep and ranks are forks, too; else new interpreters.
    """
    work, control, console = place / "work", place / "control", place / "work" / "console.txt"
    write_control(control, fault)
    console.unlink(missing_ok=True)
    folders = {
        "FAULTS_ROOT": place / "work",
        "TMPDIR": place / "work" / "tmp",
        "XDG_CACHE_HOME": place / "work" / "xdg",
    }
    environment = {**os.environ, "FAULTS_CONTROL": str(control), **{name: str(path) for name, path in folders.items()}}
    pid = os.fork()
    if pid == 0:
        output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _become_train(environment, arguments, output, work, forks=forks)
    problems: list[str] = []
    code = _wait(pid, PROCESS_SECONDS, problems)
    _wait(-1, ORPHAN_SECONDS, problems)
    operations = read_operations(control)
    hit = [each for each in operations if fault is not None and (each.slot, each.number) == (fault.slot, fault.at)]
    text = console.read_text(errors="replace") if console.is_file() else ""
    return ProcessResult(code, text, operations, hit[0] if hit else None, problems)


def adopt_orphans() -> None:
    """Processes whose parent was killed become children of this one, which waits for them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _wait(pid: int, seconds: float, problems: list[str]) -> int:
    """Waits for a child, or with -1 for all; returns the exit code. Kills those that are there after `seconds`."""
    deadline, code = time.monotonic() + seconds, 0
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return code
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if pid > 0:
                return code
        elif time.monotonic() > deadline:
            problems.append(f"a process is still there after {seconds:.0f} s")
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for child in map(int, children):
                os.kill(child, signal.SIGKILL)
            deadline += seconds
        else:
            time.sleep(0.005)


def _become_train(
    environment: dict[str, str], arguments: Sequence[str], output: int, cwd: Path, *, forks: bool
) -> None:
    """Makes this process `python train.py ARGUMENTS`; does not return."""
    code = 1
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # no public way to keep the parent's folders
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False, buffering=1)
        if forks:
            _replace_popen()
        load_library().faults_attach()
        sys.argv = [str(TRAIN), *arguments]
        runpy.run_path(str(TRAIN), run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # as an interpreter does
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def _replace_popen() -> None:
    """Lets igpt's launcher fork its children from this process, in place of new interpreters."""
    from igpt.distributed import launcher

    launcher.subprocess = SimpleNamespace(Popen=_ForkedTrain, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]  # no module
    _ForkedTrain.inherited = set(os.listdir("/proc/self/fd"))


class _ForkedTrain:
    """The part of `subprocess.Popen` that igpt's launcher uses, for `[python, train.py, …]`."""

    inherited: set[str]  # file descriptors that every process here has

    def __init__(
        self, command: Sequence[str], *, stdout: Any, env: dict[str, str], pass_fds: Sequence[int], **_: Any
    ) -> None:
        sys.stdout.flush()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        from hydra.core.global_hydra import GlobalHydra

        from igpt.distributed import launcher

        GlobalHydra.instance().clear()
        launcher.sweep_code = 0
        output = os.dup(2 if stdout is None else stdout.fileno())
        kept = {str(output), *map(str, pass_fds)}
        for descriptor in set(os.listdir("/proc/self/fd")) - self.inherited - kept:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(int(descriptor))
        _become_train(env, command[2:], output, Path.cwd(), forks=True)

    def poll(self) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)
