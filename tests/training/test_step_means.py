"""Figures between two log lines: means over optimiser steps, the gradient's norm, the progress bar's text."""

import ast

import pytest
import torch
from torch import nn

from igpt.training.progress_bar import describe_progress
from igpt.training.step_means import MINIMISED, StepMeans, squared_gradient_norm
from tests.conftest import ROOT

NAMES = [MINIMISED, "grad_norm"]
VALUES = [[1.0, 9.0], [2.0, 49.0], [6.0, 25.0]]  # a gradient's norm is given as its square
MEANS = {MINIMISED: 3.0, "grad_norm": 5.0, "grad_norm_max": 7.0}


def summed(values: list[list[float]] | torch.Tensor, means: StepMeans | None = None) -> StepMeans:
    means = means or StepMeans("grad_norm", 1)
    for step, row in enumerate(torch.as_tensor(values), start=1):
        means.add(step, NAMES, row)
    return means


def test_means_and_the_largest_value() -> None:
    """By hand, twice: a reading starts anew."""
    means = StepMeans("grad_norm", 1)
    for _ in range(2):
        assert summed(VALUES, means).gather() is None
        assert means.read() == MEANS


def test_means_go_on_from_a_checkpoint() -> None:
    """Round trip in the middle of an interval, gathered or not: the same to the bit as without."""
    values = torch.rand(7, 2).float()
    straight, resumed = summed(values), StepMeans("grad_norm", 1)
    for step, row in enumerate(values):
        if step % 2:
            resumed.gather()
        saved = resumed.state_dict()
        resumed = StepMeans("grad_norm", 1)
        resumed.load_state_dict(saved)
        resumed.add(step, NAMES, row)
    for means in (straight, resumed):
        means.gather()
    assert resumed.read() == straight.read()


def test_the_first_step_that_is_not_finite() -> None:
    """Of the loss; a gradient that overflows is none."""
    assert summed([[1.0, torch.inf], [torch.nan, 1.0], [torch.inf, 1.0]]).gather() == 2
    assert summed([[1.0, torch.inf]]).gather() is None


def test_sums_of_other_numbers_of_ranks() -> None:
    """By hand: of three ranks; of means over ranks, as older releases saved them; of one rank for all, at an error."""
    of_three = {"steps": 3, "sums": {MINIMISED: 27.0, "grad_norm": 45.0}, "largest": 7.0, "ranks": 3}
    of_means = {"steps": 3, "sums": {MINIMISED: 9.0, "grad_norm": 15.0}, "largest": 7.0}
    of_one = summed(VALUES, StepMeans("grad_norm", 2)).state_dict()
    for saved in (of_three, of_means, of_one):
        for n_rank in (1, 2, 3):
            means = StepMeans("grad_norm", n_rank)
            means.load_state_dict(saved)
            assert means.read() == pytest.approx(MEANS, rel=1e-12)


def test_gradient_norm_is_that_of_all_weights() -> None:
    """Equal to the norm that PyTorch's clipping finds."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    net(torch.randn(4, 5)).square().sum().backward()
    norm = squared_gradient_norm(torch.optim.SGD(net.parameters(), lr=1.0), 3).sqrt()  # replicated: ranks do not matter
    assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(net.parameters(), 1e-3)), rel=1e-6)


@pytest.mark.parametrize(("width", "parts"), [(100, 5), (50, 4), (30, 2), (5, 1)])
def test_progress_fits_its_width(width: int, parts: int) -> None:
    """By hand: the most important parts that fit, none cut."""
    newest = {"train/loss_gen": 1.9083, "train/grad_norm": 0.4, "val/loss_gen": 1.945}
    text = describe_progress(72, 600, 2.0, newest, batch_size=64, learning_rate=0.003, width=width)
    every = ["72/600", "loss 1.908", "4.4 min left", "128 images/s", "lr 0.003"]
    assert text == ", ".join(every[:parts])


def test_every_bar_vanishes_and_is_hidden_off_a_terminal() -> None:
    """Invariant, over all bars in src: `leave=False`, and `disable` (None: where stderr is no terminal)."""
    files = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    calls = [call for text in files for call in ast.walk(ast.parse(text)) if isinstance(call, ast.Call)]
    bars = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "tqdm"]
    assert len(bars) >= 7
    for bar in bars:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in bar.keywords}
        assert given["leave"] == "False"
        assert given["disable"] in ("None", "hidden")
