"""The joint objective, against closed forms and hand-made sums."""

import math

import pytest
import torch

from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.objective.joint import JointObjective, LossWeights, classification_loss
from tests.conftest import small_net


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_class_loss_by_hand() -> None:
    """Closed forms: ln K of equal scores; ln(1 + e^-d) of two scores that are d apart; float32 also of bfloat16."""
    assert classification_loss(torch.zeros(4, 10), torch.arange(4)).item() == pytest.approx(math.log(10))
    apart = torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.bfloat16)
    values = classification_loss(apart, torch.tensor([0, 1]))
    assert values.dtype == torch.float32
    assert values.item() == pytest.approx(math.log1p(math.exp(-2)))


@pytest.mark.parametrize("generative", [AR(), BERT(mask_probability=0.15)], ids=["ar", "bert"])
def test_the_sum_and_its_gradient(generative: AR | BERT) -> None:
    """Invariant: 0.5 · L_GEN + 2 · L_CLF, each as it is alone; gradients are the same sum of each one's."""
    tokens, labels = torch.randint(7, (3, 16)), torch.tensor([0, 2, 1])
    visible = generative.visible_mask(tokens, torch.arange(3))
    net = small_net(n_vocab=7)
    hidden, scores = drawn(0, 3, 16, 24).requires_grad_(), drawn(1, 3, 4).requires_grad_()
    joint = JointObjective(generative, LossWeights(gen=0.5, clf=2.0))
    losses = joint.losses(net, hidden, scores, tokens, labels, visible)
    logits = net.logits(hidden)
    alone = {"loss_gen": generative.loss(logits, tokens, visible), "loss_clf": classification_loss(scores, labels)}
    assert {name: loss.item() for name, loss in losses.items()} == {name: loss.item() for name, loss in alone.items()}
    total = joint.total(losses)
    assert total.item() == pytest.approx(0.5 * alone["loss_gen"].item() + 2 * alone["loss_clf"].item())
    both = torch.autograd.grad(total, [hidden, scores])
    for gradient, one, given, weight in zip(both, alone.values(), (hidden, scores), (0.5, 2.0), strict=True):
        torch.testing.assert_close(gradient, weight * torch.autograd.grad(one, given)[0])


def test_without_generation_the_token_head_is_not_read() -> None:
    joint = JointObjective(AR(), LossWeights(gen=0, clf=1))
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    losses = joint.losses(small_net(), drawn(0, 3, 16, 24), drawn(1, 3, 4), tokens, torch.arange(3), None)
    assert not joint.has_generative_loss
    assert joint.total(losses) == losses["loss_clf"]
    assert set(losses) == {"loss_clf"}
