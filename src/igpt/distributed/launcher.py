"""Starts child processes and ranks, forwards signals to them, and ends them with this process."""

import atexit
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from igpt.distributed.cores import count_cores, count_physical_cores
from igpt.distributed.process_state import signal_handler
from igpt.distributed.rank import this_rank
from igpt.distributed.signals import SIGNALS, STOPPED
from igpt.utils import files

LIFELINE = "IGPT_LIFELINE"  # a file descriptor that stays open as long as the parent lives
RUN_DIR_FILE = "IGPT_TELL"  # a file in which a run writes its directory, for the parent
SWEEP = "IGPT_SWEEP"  # the name of the sweep of this job
RENDEZVOUS_FILE = "IGPT_MEETING"  # rendezvous file of the ranks that were started here
GRACE_SECONDS = 10  # for the other ranks to exit after one has failed
SAVE_SECONDS = 60  # for runs to save and exit after an error of the parent
FEW_PROCESSES = 8  # are started without looking for GPUs: each checks its own
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", RENDEZVOUS_FILE)

sweep_code = 0  # exit code of this process after a sweep: 1 if a job failed
rank_finished = False  # whether this process is a rank whose run has ended without an error


@dataclass(eq=False)
class Child:
    """A child process in its own session, so that a Ctrl-C reaches it only through its parent."""

    command: Sequence[str]
    output: IO[bytes] | None  # its stdout and stderr; None: inherited
    environment: Mapping[str, str] = field(default_factory=dict)  # added to this process's
    without: Sequence[str] = ()  # variables of this process that are not inherited

    def __post_init__(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in self.without}
        reading, self._lifeline = os.pipe()  # -1: closed
        self.process = subprocess.Popen(
            self.command,
            stdout=self.output,
            stderr=self.output,
            stdin=subprocess.DEVNULL,
            env={**inherited, **self.environment, LIFELINE: str(reading)},
            pass_fds=(reading,),
            start_new_session=True,
        )
        os.close(reading)

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """Sends it a signal if it still runs."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kills it and its process group."""
        if self.code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def die_with_parent() -> None:
    """Kills this process group as soon as the parent process is gone, however it ended."""
    descriptor = os.environ.pop(LIFELINE, None)
    if descriptor is None:
        return

    def wait() -> None:
        os.read(int(descriptor), 1)  # returns when the other end is closed
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def skip_teardown() -> None:
    """Lets a rank that has finished leave after its exit handlers, without a teardown of the interpreter.

    Threads of gloo outlive their group where a network holds it. If one lets go of a tensor while the interpreter is
    torn down, the process aborts (PyTorch's pull request 179291): a finished run would seem to be killed. To be called
    before anything registers an exit handler that must run: handlers run in reverse order.
    """

    def leave() -> None:
        if rank_finished:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # nobody reads it, or it is closed
                    stream.flush()
            os._exit(0)

    atexit.register(leave)


class Children:
    """Runs child processes in parallel. In a `supervise` block signals are forwarded to them; its end kills those left.

    `received_signal`: name of the first signal.
    """

    def __init__(self) -> None:
        self.running: list[Child] = []
        self.received_signal: str | None = None

    def start(self, child: Child) -> Child:
        """Adds a started process; forwards the signal to it if one has arrived."""
        self.running.append(child)
        if self.received_signal is not None:  # a signal arrived during its start
            child.send(signal.Signals[self.received_signal])
        return child

    def wait(self) -> tuple[Child, int]:
        """Waits for the next child to end; returns it and its exit code (negative for a signal)."""
        while True:
            for child in self.running:
                if (code := child.code) is not None:
                    self.running.remove(child)
                    child.kill()
                    return child, code
            time.sleep(0.02)

    @contextmanager
    def supervise(self) -> Iterator["Children"]:
        with signal_handler(SIGNALS, self._forward_signal):
            try:
                yield self
            except BaseException:
                for child in self.running:
                    child.send(signal.SIGTERM)  # let them save before they end
                _wait(self.running, SAVE_SECONDS)
                raise
            finally:
                for child in self.running:
                    child.kill()

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        self.received_signal = self.received_signal or signal.Signals(number).name
        for child in self.running:
            child.send(number)


def is_rank() -> bool:
    """Whether this process is a rank of a distributed run, started by this package, torchrun or srun.

    Raises:
        ValueError: as `this_rank`.
    """
    return this_rank().count > 1 or "RANK" in os.environ


def count_devices(trainer: Mapping[str, Any]) -> int:
    """Number of processes of a run on this machine: `trainer.devices`.

    `auto`: one per GPU; two without GPUs, to try things out. Other types are refused when settings are parsed.

    Raises:
        ValueError: more processes than this machine has GPUs or cores.
    """
    if not isinstance(trainer, Mapping) or trainer.get("plan") is True:
        return 1
    devices: Any = trainer.get("devices")
    if devices != "auto" and (not isinstance(devices, int) or devices <= max(FEW_PROCESSES, count_cores())):
        return devices if isinstance(devices, int) else 1
    import torch  # slow: imported only if needed

    n_gpu = torch.cuda.device_count() if trainer.get("accelerator") != "cpu" else 0
    if devices != "auto":
        if devices > n_gpu:
            what = f"{n_gpu} GPUs" if n_gpu else f"{count_cores()} cores and no GPU in use"
            raise ValueError(f"trainer.devices={devices} starts {devices} processes; this machine has {what}: lower it")
    else:
        devices = n_gpu or 2
    return int(devices)


def run_ranks(command: Sequence[str], n: int) -> int:
    """Runs `command` as `n` ranks on this machine; returns the first nonzero exit code, else 0.

    Rank 0 inherits this process's output, the others write to files that are shown after a failure. When a rank fails
    or is killed, the others have `GRACE_SECONDS` to exit, and the reason is written to the run's log.
    """
    meeting_place = Path(tempfile.gettempdir()) / "igpt-ranks"
    with files.temporary_folder(meeting_place) as rendezvous, Children().supervise() as children:
        tell = Path(os.environ.get(RUN_DIR_FILE, rendezvous / "folder"))
        common = {
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            RENDEZVOUS_FILE: str(rendezvous / "meeting"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, count_physical_cores() // n))),
            RUN_DIR_FILE: str(tell),
        }
        ranks: list[Child] = []
        for rank in range(n):
            output = (rendezvous / f"rank_{rank}").open("wb") if rank else None
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(children.start(Child(command, output, environment)))
            if output:
                output.close()
        code = 0
        while children.running:
            ended, its_code = children.wait()
            if its_code in (0, STOPPED):
                code = code or its_code
                continue
            _wait(children.running, GRACE_SECONDS)
            codes = [child.code for child in ranks]
            while children.running:
                children.running.pop().kill()
            # a forwarded signal ended it: before its handler was installed, or sent twice
            is_stopping = children.received_signal is not None and -its_code in SIGNALS
            all_bad_input = codes[0] == 2 and its_code == 2  # rank 0 has printed the error
            if not is_stopping and not all_bad_input:
                lines = [
                    f"rank {rank} wrote:\n{text}"
                    for rank, code in enumerate(codes)
                    if rank
                    and code not in (0, None, STOPPED)
                    and (text := (rendezvous / f"rank_{rank}").read_text(errors="replace").strip())
                ]
                first = f"rank {ranks.index(ended)} of {n} {describe_exit(its_code)}; the others were ended"
                _report_failure("\n".join([first, *lines]), tell)
            return its_code if its_code >= 0 else 128 - its_code  # as in shells: 128 + the signal's number
        return code


def _wait(children: Sequence[Child], seconds: float) -> None:
    """Waits until all children have ended, at most `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.code is None for child in children):
        time.sleep(0.02)


def _report_failure(what: str, tell: Path) -> None:
    """Prints why ranks ended, and appends it to the run's log if there is one."""
    head, *rest = what.splitlines()
    text = "\n".join([head, *(f"    {line}" for line in rest[-60:])])
    with suppress(OSError):  # its reader may be gone
        sys.stderr.write(f"error: {text}\n")
    log = Path(os.fsdecode(tell.read_bytes())) / "log.txt" if tell.is_file() else None
    if log is not None and log.is_file():
        with suppress(OSError), log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR igpt.distributed.launcher: {text}\n")


def describe_exit(code: int) -> str:
    """`ended with exit code 2`, `was killed by SIGKILL (…)`."""
    why = " (the system does so when memory runs out: `dmesg`)" if code == -signal.SIGKILL else ""
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}{why}"
