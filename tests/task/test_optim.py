"""The optimiser and its schedule."""

import math

import pytest
import torch
from torch import nn

from igpt.task.optim import adam, check_schedule, scheduled, warmup_cosine


def test_schedule_in_closed_form() -> None:
    """By hand: tenths up to the peak at step 10, half of it half way down, nothing at the end."""
    share = [warmup_cosine(step, warmup_steps=10, steps=110) for step in range(111)]
    assert share[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert share[10] == 1.0
    assert share[60] == pytest.approx(0.5)
    assert share[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert share[110] == pytest.approx(0.0)
    assert warmup_cosine(0, warmup_steps=0, steps=5) == 1.0


def test_adam_step_by_hand() -> None:
    """By hand: Adam's first two steps on gradients 2 and -1 with β 0.9, 0.95 and rates by the schedule."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = adam([weight], learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0)
    schedule = scheduled(optimizer, warmup_steps=2, steps=4)
    expected, m, v = 1.0, 0.0, 0.0
    for t, (gradient, rate) in enumerate([(2.0, 0.05), (-1.0, 0.1)], start=1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        schedule.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        expected -= rate * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
        assert weight.item() == pytest.approx(expected, rel=1e-6)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        check_schedule(learning_rate=0.0, warmup_steps=0, steps=5)
    with pytest.raises(ValueError, match=r"warmup_steps 5 must be below task\.steps 5"):
        check_schedule(learning_rate=0.1, warmup_steps=5, steps=5)
