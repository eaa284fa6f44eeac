"""Graceful stop: on a signal the optimiser step is finished and the state saved."""

import logging
import os
import signal
import time
from contextlib import AbstractContextManager
from types import FrameType

from igpt.distributed.process_state import signal_handler

log = logging.getLogger(__name__)

# the last two are warnings of SLURM (--signal=USR1@120) and, by default, submitit (USR2)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
AGAIN_SECONDS = 1.0
STOPPED = 75  # exit code EX_TEMPFAIL (sysexits.h): a scheduler may restart the job


class RunEndedError(RuntimeError):
    """Ends a run by design: whoever passes over the errors of what watches a run raises this one."""


class StoppedError(RunEndedError):
    """A signal to some rank has stopped the run after a step; its state is saved."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {number.name} after step {step}")
        self.number = number


class StopRequest:
    """Records the first stop signal; a second SIGINT or SIGTERM ends the process at once.

    A second one within `AGAIN_SECONDS` is ignored, as a signal to a whole group can arrive twice; so is a SIGTERM after
    a scheduler's warning and the reverse, as schedulers send both.
    """

    def __init__(self, answer: str = "finishing this step, then saving") -> None:
        self.answer = answer  # logged on the first signal
        self.number = 0  # of the first signal; 0: none
        self._since = 0.0

    def install_handlers(self) -> AbstractContextManager[None]:
        """Context manager: records stop signals, then restores the previous handlers; no effect in other threads."""
        return signal_handler(SIGNALS, self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            log.warning("%s: %s; once more to leave at once", name, self.answer)
            return
        by_hand = {self.number, number} <= {signal.SIGINT, signal.SIGTERM}
        if by_hand and time.monotonic() - self._since > AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def forward_signal(number: signal.Signals) -> bool:
    """Forwards a scheduler's warning to the previous handler, e.g. submitit's, which requeues the job.

    Returns whether there was one.
    """
    handler = signal.getsignal(number)
    if number not in (signal.SIGUSR1, signal.SIGUSR2) or not callable(handler):
        return False
    handler(number, None)
    return True


def ignore_signals(worker: int) -> None:
    """Worker initialisation of a DataLoader: ignores stop signals, as the training process ends its workers.

    A signal to the whole group (Ctrl-C, scancel) would otherwise end them during the step that is still to finish.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))  # SIGALRM ends it if the parent does not
