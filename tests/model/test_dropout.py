"""Dropout: its masks are functions of image and place alone, its expectation is the identity, off it is not there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from igpt.model.dropout import Dropout, add_dropout
from igpt.model.gpt import GPT
from igpt.utils import keyed
from tests.conftest import small_net

KEYS = keyed.per_example_keys(keyed.key(0, "train", 0), torch.arange(64))


def test_a_share_is_dropped_and_the_mean_kept() -> None:
    """By hand: of 64 × 8,000 ones about 1 in 10 is 0, the others 1 / 0.9: the mean is 1 within 4 standard errors."""
    dropout = Dropout(6554 / 2**16, 3)
    x = torch.ones(64, 40, 200)
    assert dropout(x) is x  # outside of training
    dropout.rng_keys = KEYS
    out = dropout(x)
    kept = (out != 0).double()
    assert (1 - kept).mean().item() == pytest.approx(0.1, abs=4 * (0.09 / x.numel()) ** 0.5)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.9], abs=1e-4)
    for axis in (0, 1, 2):  # no image, token or channel is dropped more than others
        means = kept.mean(dim=[other for other in range(3) if other != axis])
        assert (means - 0.9).abs().max() < 5 * (0.09 * len(means) / x.numel()) ** 0.5


def masks(net: GPT, keys: Tensor, tokens: Tensor) -> Tensor:
    dropout = add_dropout(net, 0.25)
    dropout.begin(keys)
    logits = net(tokens)
    dropout.end()
    return logits


def test_masks_are_of_the_image_not_the_batch(net: GPT, tokens: Tensor) -> None:
    """Invariant: any part of a batch, in any order, gives the logits that it has in the batch; other keys do not."""
    full = masks(net, KEYS[:4], tokens)
    for rows in ([0, 1], [3], [2, 0]):
        assert torch.allclose(masks(net, KEYS[rows], tokens[rows]), full[rows], atol=1e-6)
    assert not torch.allclose(masks(net, KEYS[4:8], tokens), full, atol=1e-2)


def test_every_place_drops_otherwise(net: GPT, tokens: Tensor) -> None:
    """By hand: the embedding and two places in each of three blocks, each with zeros of its own."""
    places = add_dropout(net, 0.5).places
    seen: list[Tensor] = []
    for place in places:
        place.register_forward_hook(lambda module, args, out: seen.append(out == 0))
        place.rng_keys = KEYS[:4]
    net(tokens)
    assert len(seen) == 7
    agree = torch.stack([(a == b).double().mean() for i, a in enumerate(seen) for b in seen[:i]])
    assert (agree - 0.5).abs().max() < 5 * (0.25 / seen[0].numel()) ** 0.5


@pytest.mark.parametrize("change", [lambda net: None, lambda net: add_dropout(net, 0.3)])
def test_without_keys_the_network_is_as_ever(change: Callable[[GPT], object], tokens: Tensor) -> None:
    """Invariant: no weight more, and the same logits, to the bit."""
    plain, changed = small_net(), small_net()
    change(changed)
    assert changed.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(changed(tokens), plain(tokens))


def test_recomputed_activations_are_dropped_alike(net: GPT, tokens: Tensor) -> None:
    """Invariant: with activation checkpointing the gradients are the same, to the bit."""
    gradients = []
    dropout = add_dropout(net, 0.25)
    dropout.begin(KEYS[:4])
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(tokens).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in net.parameters() if weight.grad is not None]))
    assert torch.equal(*gradients)
