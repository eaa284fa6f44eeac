"""The loss of a split by image and by position, from the same pass."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from igpt.objective.ar import AR
from igpt.objective.base import Objective
from igpt.objective.bert import BERT
from igpt.task.generative_score import GenerativeScore
from igpt.tokens.batches import Batch


@dataclass
class GivenLogits:
    """Stands in for a network: whatever the tokens are, these are their logits (B, T, V)."""

    given: Tensor

    def __call__(self, tokens: Tensor, visible: Tensor | None, head: Callable[[Tensor], Tensor]) -> Tensor:
        return head(self.given)

    def has_large_logits(self, tokens: Tensor) -> bool:
        return False

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def trainer_of_one_device() -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda values, reduce_op: values)
    return SimpleNamespace(strategy=strategy)


@pytest.mark.parametrize("objective", [AR(), BERT(mask_probability=0.4)])
def test_loss_by_position(objective: Objective) -> None:
    """By another computation; of all tokens, its mean is the loss of the images. Batches are of any size."""
    logits = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(0))
    tokens, keys = torch.randint(5, (6, 9), generator=torch.Generator().manual_seed(1)), torch.arange(6)
    visible = objective.visible_mask(tokens, keys)

    def result(sizes: list[int]) -> tuple[Tensor, float]:
        score, first = GenerativeScore(objective), 0
        for size in sizes:
            rows = torch.arange(first, first + size)
            net: Any = GivenLogits(logits[rows])
            score.add(net, Batch(tokens[rows], torch.zeros(size), keys[rows], rows))
            first += size
        numbers = score.numbers("val", trainer_of_one_device(), 6)
        assert score.by_position is not None
        return score.by_position, numbers["val/loss_gen"].value

    found, loss = result([4, 2])
    nats = -logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    hidden = torch.ones_like(nats) if visible is None else (~visible).double()
    torch.testing.assert_close(found, (nats * hidden).sum(0) / hidden.sum(0), rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(result([1, 5])[0], found, rtol=1e-6, atol=0, equal_nan=True)
    if visible is None:
        assert float(found.mean()) == pytest.approx(loss, rel=1e-6)
