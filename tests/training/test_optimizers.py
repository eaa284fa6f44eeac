"""The optimiser and its schedule."""

import copy
import math

import pytest
import torch
from torch import nn

from igpt.model.gpt import GPT
from igpt.training.optimizers import MuonAdam, make_adam, make_scheduler, warmup_cosine, warmup_stable_decay
from tests.conftest import small_net


def test_schedule_in_closed_form() -> None:
    """By hand: tenths up to the peak at step 10, half of it half way down, nothing at the end."""
    share = [warmup_cosine(step, warmup_steps=10, steps=110) for step in range(111)]
    assert share[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert share[10] == 1.0
    assert share[60] == pytest.approx(0.5)
    assert share[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert share[110] == pytest.approx(0.0)
    assert warmup_cosine(0, warmup_steps=0, steps=5) == 1.0


def test_linear_schedule_by_hand() -> None:
    """By hand: halves up to the peak, which holds to step 6 of 10, and quarters down to nothing."""
    share = [warmup_stable_decay(step, warmup_steps=2, decay_share=0.4, ends=[10]) for step in range(11)]
    assert share == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert [warmup_stable_decay(step, warmup_steps=0, decay_share=0.0, ends=[2]) for step in range(3)] == [1, 1, 0]


def test_schedule_with_cool_downs_by_hand() -> None:
    """By hand: fifths of 10 and of 40 steps fall to nothing, by halves and by eighths; after the first, all at once.

    Its area: 40 steps less half of what warm-up and cool-downs take, one step each half up and half down.
    """
    share = [warmup_stable_decay(step, warmup_steps=4, decay_share=0.2, ends=[10, 40]) for step in range(41)]
    up, peak = [0.25, 0.5, 0.75, 1], [1.0]
    assert share == pytest.approx(up + peak * 5 + [0.5] + peak * 22 + [1 - i / 8 for i in range(9)])
    assert sum(share) == pytest.approx(40 - (4 - 1) / 2 - (2 - 1) / 2 - (8 - 1) / 2)


def test_adam_step_by_hand() -> None:
    """By hand: Adam's first two steps on gradients 2 and -1 with β 0.9, 0.95 and rates by the schedule."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = make_adam([weight], learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0)
    schedule = make_scheduler(optimizer, warmup_steps=2, steps=4)
    expected, m, v = 1.0, 0.0, 0.0
    for t, (gradient, rate) in enumerate([(2.0, 0.05), (-1.0, 0.1)], start=1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        schedule.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        expected -= rate * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
        assert weight.item() == pytest.approx(expected, rel=1e-6)


RATES = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0}


def trained(net: GPT, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """The weights after steps along gradients that are drawn."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in net.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in net.named_parameters()}


def test_muon_for_matrices_and_adam_for_the_rest() -> None:
    """By hand: the first step turns a gradient U S Vᵀ into about 0.2 √(longer side) U Vᵀ; other weights are Adam's."""
    net, same = small_net(), small_net()
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    after = trained(net, MuonAdam(net, **RATES), steps=1, seed=0)
    adams = trained(same, make_adam(same.parameters(), **RATES), steps=1, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in before.items():
        gradient = torch.randn(weight.shape, generator=generator)
        if name.startswith("h.") and weight.ndim == 2:
            sizes = torch.linalg.svdvals((weight - after[name]) / (0.01 * 0.2 * max(weight.shape) ** 0.5))
            assert 0.7 < sizes.median() < sizes.max() < 1.3  # five Newton-Schulz steps come this near to 1
            along = ((weight - after[name]) * gradient).sum() / torch.linalg.svdvals(gradient).sum()
            assert along > 0.6 * 0.01 * 0.2 * max(weight.shape) ** 0.5
        else:
            assert torch.equal(after[name], adams[name])


def test_muon_is_resumed() -> None:
    """Round trip: stopped, saved, loaded into another, gone on: the same weights to the bit."""
    net, same = small_net(), small_net()
    optimizer = MuonAdam(net, **RATES)
    schedule = make_scheduler(optimizer, warmup_steps=2, steps=6)
    same.load_state_dict(trained(net, optimizer, steps=2, seed=1))
    schedule.step()
    resumed = MuonAdam(same, **RATES)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.01]
    own, reference = trained(net, optimizer, steps=2, seed=2), trained(same, resumed, steps=2, seed=2)
    assert all(torch.equal(own[name], reference[name]) for name in own)
