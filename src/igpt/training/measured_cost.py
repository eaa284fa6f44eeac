"""Measured cost of a training: seconds of an optimiser step and peak memory of this process; device-days in all."""

import resource
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch

from igpt.metric.result import Number
from igpt.training.cost_estimate import SECONDS_A_DAY

GB = 1e9  # bytes


class StepTimer:
    """Median seconds of an optimiser step between calls of `mark`; time from `pause` to `resume` does not count.

    `n_untimed`: first intervals that do not count, unless there are no others.
    """

    def __init__(self, step: int, now: float, *, n_untimed: int) -> None:
        self._step, self._since, self._n_untimed = step, now, n_untimed
        self._paused_at = 0.0
        self._seconds: list[float] = []  # of a step, in every interval

    def mark(self, step: int, now: float) -> None:
        """Ends an interval, of all steps since the last; the same step again (of another micro-batch) ends none."""
        if step > self._step:
            self._seconds.append((now - self._since) / (step - self._step))
            self._step, self._since = step, now

    def pause(self, now: float) -> None:
        self._paused_at = now

    def resume(self, now: float) -> None:
        self._since += now - self._paused_at

    @property
    def number(self) -> Number | None:
        """Seconds a step, over n intervals; None before the first."""
        timed = self._seconds[self._n_untimed :] or self._seconds
        return Number(median(timed), "s", len(timed)) if timed else None


class TrainingClock:
    """Wall seconds of a training (with its validations) times its devices, over all processes that continued it.

    What a process did after its last checkpoint, before it was killed, is not counted.
    """

    def __init__(self, n_device: int) -> None:
        self._n_device = n_device
        self._before: float | None = 0.0  # device-seconds of earlier processes; None: not known
        self._since: float | None = None  # while it runs

    def continue_from(self, device_seconds: float | None) -> None:
        """Goes on from a checkpoint's; None: it is of a release that did not measure them."""
        self._before = device_seconds

    def start(self, now: float) -> None:
        self._since = now

    def stop(self, now: float) -> None:
        self._before, self._since = self.read(now), None

    def read(self, now: float) -> float | None:
        """Device-seconds so far; None if those of an earlier process are not known."""
        running = 0.0 if self._since is None else (now - self._since) * self._n_device
        return None if self._before is None else self._before + running

    @property
    def numbers(self) -> dict[str, Number]:
        """`train/device_days` of a training that has ended; nothing if it is not known."""
        days = {} if self._before is None else {"train/device_days": self._before / SECONDS_A_DAY}
        return {name: Number(value, "device-days", self._n_device) for name, value in days.items()}


def reset_peak_memory(device: torch.device) -> None:
    """Begins a new measurement of `peak_memory`; where the kernel refuses, it goes on from the process's start."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # what is reset is there from then on
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # no Linux, or a container that may not
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory becomes the present value


def peak_memory(device: torch.device) -> Number:
    """GB: of a GPU what PyTorch had allocated at most, else the highest resident memory of this process."""
    if device.type == "cuda":
        return Number(torch.cuda.max_memory_allocated(device) / GB, "GB", 1)
    with suppress(OSError):  # no Linux
        lines = Path("/proc/self/status").read_text().splitlines()
        return Number(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")) / GB, "GB", 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return Number(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB, "GB", 1)
