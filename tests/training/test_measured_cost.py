"""The measured cost of a training: seconds of a step, memory."""

import mmap
import os

import pytest
import torch

from igpt.metric.result import Number
from igpt.report.closing_table import format_number
from igpt.training.measured_cost import StepTimer, TrainingClock, peak_memory, reset_peak_memory


def test_seconds_of_a_step_by_hand() -> None:
    """By hand: of 9, 2, 3 and 7 seconds, the last for two steps, the first does not count, nor does a validation."""
    timer = StepTimer(10, 100.0, n_untimed=1)
    assert timer.number is None
    timer.mark(11, 109.0)
    assert timer.number == Number(9.0, "s", 1)  # there is no other
    timer.mark(11, 110.0)  # a further micro-batch
    timer.mark(12, 111.0)
    timer.pause(112.0)
    timer.resume(162.0)
    timer.mark(13, 164.0)
    timer.mark(15, 171.0)
    assert timer.number == Number(3.0, "s", 3)


def test_device_days_over_several_processes_by_hand() -> None:
    """By hand: 21,600 seconds on two devices, saved, then 43,200 on one; of an older checkpoint nothing is known."""
    first = TrainingClock(2)
    first.start(100.0)
    saved = first.read(21_700.0)
    second = TrainingClock(1)
    second.continue_from(saved)
    second.start(0.0)
    second.stop(43_200.0)
    assert second.numbers == {"train/device_days": Number(1.0, "device-days", 1)}
    second.continue_from(None)
    second.start(0.0)
    second.stop(1.0)
    assert second.numbers == {}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel resets no peak here")
def test_memory_at_its_peak() -> None:
    """By hand: 200 MB that were held and freed before the measurement do not count, those held during it do."""
    device = torch.device("cpu")

    def hold() -> None:
        with mmap.mmap(-1, 200_000_000) as memory:  # which the allocator does not keep
            for start in range(0, 200_000_000, 4096):
                memory[start] = 1

    hold()
    reset_peak_memory(device)
    before = peak_memory(device).value
    hold()
    assert 0.19 < peak_memory(device).value - before < 0.21


def test_operations_are_shown_by_powers_of_ten() -> None:
    """By hand: thousands are counted out, as images are; what nobody can count is not."""
    assert format_number(Number(1.23456e15, "FLOP", 1)) == "1.235e+15"
    assert format_number(Number(1.23456e15, "FLOP", 3, deviation=2e12)) == "1.235e+15 ± 2e+12 (std)"
    assert format_number(Number(12_345_678.0, "images", 1)) == "12,345,678"
