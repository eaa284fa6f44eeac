"""Stopping well: a signal asks, the optimiser step is finished, the state saved."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

# the last two are what SLURM warns with (--signal=USR1@120), submitit by its own default (USR2)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 75  # exit code "try again later" (sysexits.h): what a scheduler may start again


class StoppedError(RuntimeError):
    """A signal (None: one that another process of the run got) has stopped the run after a step; its state is saved."""

    def __init__(self, name: str | None, step: int) -> None:
        super().__init__(f"stopped by {name or 'another process of this run'} after step {step}")
        self.name = name


class StopRequest:
    """Remembers the first signal that asked to stop; a second one leaves at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block lasts, signals are requests. What answered them before does so again afterwards."""
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_over(self) -> None:
        """Listens again where a library has put itself in front."""
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.name = signal.Signals(number).name
        log.warning("%s: finishing this step, then saving; once more to leave at once", self.name)


def pass_on(name: str | None) -> bool:
    """Gives a signal that was answered here to whoever listened before: submitit, say, which queues the job again.

    True when somebody did.
    """
    if name is None:
        return False
    handler = signal.getsignal(number := signal.Signals[name])
    if not callable(handler) or handler is signal.default_int_handler:
        return False
    handler(number, None)
    return True


def deaf(worker: int) -> None:
    """For a process that reads images: it leaves stopping to the one that trains, which ends it when it is done.

    A signal to the whole group (Ctrl-C, scancel) would else take the images from under a step that is to be finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_soon)


def _leave_soon(*_: Any) -> None:
    signal.alarm(10)  # should nobody end it
