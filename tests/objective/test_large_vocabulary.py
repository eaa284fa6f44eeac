"""The loss of many logits, never all in memory: equal to the plain one."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igpt.model import token_loss
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.objective.base import generative_loss, hidden_nats
from igpt.objective.bert import BERT
from tests.conftest import small_net

OBJECTIVES = {"ar": AR(), "bert": BERT(mask_probability=0.15)}


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was computed."""

    numel = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(each.numel() for each in [out] if isinstance(each, Tensor))])
        return out


def take_step(net: GPT, objective: AR | BERT, tokens: Tensor) -> list[Tensor]:
    """Loss, nats and all gradients."""
    visible = objective.visible_mask(tokens, torch.arange(len(tokens)))
    head = partial(generative_loss, objective, net, tokens=tokens, visible=visible)
    loss = net(tokens, visible, head)
    with torch.no_grad():
        nats = net(tokens, visible, partial(hidden_nats, net, tokens=tokens))
    return [loss.detach(), nats, *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: PyTorch's cross-entropy of all logits at once, to 1e-5 in float32; in bfloat16 no further
    from those than the plain loss is. By what is computed: no tensor has more numbers than a chunk.
    """
    objective = OBJECTIVES[name]
    net = small_net(causal=objective.causal, n_vocab=1500)
    tokens = torch.randint(1500, (3, 16), generator=torch.Generator().manual_seed(0))
    assert not net.has_large_logits(tokens)
    plain = take_step(net, objective, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        plain_rounded = take_step(net, objective, tokens)
    monkeypatch.setattr(token_loss, "CHUNK", 1500 * 7)
    assert net.has_large_logits(tokens)
    assert not small_net(n_vocab=1024).has_large_logits(tokens.repeat(1000, 1))  # small vocabularies: as ever
    for one, same in zip(take_step(net, objective, tokens), plain, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-5 * float(same.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = take_step(net, objective, tokens)
    assert rounded[0].dtype == rounded[1].dtype == torch.float32
    for one, other, same in zip(rounded, plain_rounded, plain, strict=True):
        assert (one - same).norm() < 1.2 * (other - same).norm() + 1e-5
    hidden = torch.randn(3, 16, 24, requires_grad=True)
    with Largest() as largest:
        net.token_nats(hidden, tokens).sum().backward()
    assert largest.numel == max(7 * 1500, net.wtet.numel())


def test_what_needs_no_gradient_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: of a frozen head, and of frozen hidden states."""
    monkeypatch.setattr(token_loss, "CHUNK", 50)
    tokens = torch.randint(11, (2, 16))
    hidden, head = torch.randn(2, 16, 8), torch.randn(11, 8)
    for of in range(2):
        inputs = [hidden.clone().requires_grad_(of == 0), head.clone().requires_grad_(of == 1)]
        along = torch.randn(2, 16)
        token_loss.chunked_nats(*inputs, tokens).backward(along)
        plain = [each.detach().requires_grad_() for each in inputs]
        nats = F.cross_entropy(F.linear(*plain).mT, tokens, reduction="none")
        expected = torch.autograd.grad(nats, plain, along)
        assert inputs[1 - of].grad is None
        torch.testing.assert_close(inputs[of].grad, expected[of])
