"""Stopping well: a signal asks, the optimiser step is finished, the state saved."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from igpt.distributed.process_state import signal_handler

log = logging.getLogger(__name__)

# the last two are what SLURM warns with (--signal=USR1@120), submitit by its own default (USR2)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
AGAIN_SECONDS = 1.0
STOPPED = 75  # exit code "try again later" (sysexits.h): what a scheduler may start again


class StoppedError(RuntimeError):
    """A signal, to this process or to another of the run, has stopped it after a step; its state is saved."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {number.name} after step {step}")
        self.number = number


class StopRequest:
    """Remembers the first signal that asked to stop; a second SIGINT or SIGTERM leaves at once.

    Not one that comes within a second of the first: who signals a whole group reaches a process more than once. Nor a
    SIGTERM after a scheduler's warning, nor the other way round: schedulers send both.
    """

    def __init__(self, answer: str = "finishing this step, then saving") -> None:
        self.answer = answer  # what is said to be done
        self.number = 0  # of the signal; 0: nobody has asked
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block lasts, signals are requests. What answered them before does so again afterwards.

        Outside of a process's main thread, which alone may answer signals, nothing asks.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with signal_handler(SIGNALS, self._ask):
            yield

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            log.warning("%s: %s; once more to leave at once", name, self.answer)
            return
        by_hand = {self.number, number} <= {signal.SIGINT, signal.SIGTERM}
        if by_hand and time.monotonic() - self._since > AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def pass_on(number: signal.Signals) -> bool:
    """Gives a scheduler's warning to whoever listened before us: submitit, say, which queues the job again.

    True when somebody did.
    """
    handler = signal.getsignal(number)
    if number not in (signal.SIGUSR1, signal.SIGUSR2) or not callable(handler):
        return False
    handler(number, None)
    return True


def deaf(worker: int) -> None:
    """For a process that reads images: it leaves stopping to the one that trains, which ends it when it is done.

    A signal to the whole group (Ctrl-C, scancel) would else take the images from under a step that is to be finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_soon)


def _leave_soon(*_: Any) -> None:
    signal.alarm(10)  # should nobody end it
