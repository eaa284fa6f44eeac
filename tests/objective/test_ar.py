"""Next-pixel prediction."""

import math

import pytest
import torch

from igpt.objective.ar import AR
from igpt.objective.registry import build_objective


def test_loss_by_hand() -> None:
    """By hand: probabilities 1/2, 1/4 and 1/8, 1/8 of the right tokens of two images with two tokens each."""
    p = torch.tensor([[[0.5, 0.5], [0.75, 0.25]], [[0.125, 0.875], [0.875, 0.125]]])
    tokens = torch.tensor([[0, 1], [0, 1]])
    nats = AR().per_example_loss(p.log(), tokens, None)
    ln2 = math.log(2)
    assert nats.tolist() == pytest.approx([1.5 * ln2, 3 * ln2])
    assert AR().loss(p.log(), tokens, None).item() == pytest.approx(2.25 * ln2)


def test_nothing_is_hidden() -> None:
    """By hand: an AR network sees all of its input; what it may not see yet, its mask keeps from it."""
    assert AR().visible_mask(torch.zeros(2, 4), torch.zeros(2)) is None
    assert AR().causal


def test_an_unknown_objective() -> None:
    with pytest.raises(ValueError, match=r"objective\.name must be one of ar, bert, got 'mlm'"):
        build_objective(name="mlm")
