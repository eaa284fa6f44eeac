"""The decoder that works in columns: the layer-by-layer step, but for rounding."""

import pytest
import torch

from igpt.model import decode
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from tests.conftest import small_net


@pytest.mark.parametrize("batch", [1, 4, 17])
def test_logits_are_those_of_the_whole_network(batch: int) -> None:
    """Invariant: at every position those of a full forward pass, and of `GPT.step`, within 1e-5."""
    net = small_net(n_ctx=24)
    tokens = torch.randint(net.n_vocab, (batch, net.n_ctx), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = net(tokens)
        plain, columns = net.new_cache(batch), net.new_cache(batch)
        start = 5
        for cache in (plain, columns):
            net.step(tokens[:, :start], cache)
        for i in range(start, net.n_ctx - 1):
            new = tokens[:, i : i + 1]
            theirs, ours = net.step(new, plain), decode.step(net, new, columns)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours, whole[:, i + 1], rtol=0, atol=1e-5)
    assert columns.length == plain.length == net.n_ctx


def test_the_same_images(net: GPT) -> None:
    """Invariant: token by token, drawn and greedy, with a prompt and without."""
    uniforms = torch.rand(6, net.n_ctx, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = torch.randint(net.n_vocab, (6, net.n_ctx), generator=torch.Generator().manual_seed(1))
    known = torch.arange(net.n_ctx) < 7
    for sampling in (Sampling(1.0, None, None), Sampling(1.0, 1, None)):
        prompts: list[dict[str, torch.Tensor]] = [{}, {"given": given, "known": known}]
        for prompt in prompts:
            drawn = []
            for columns in (True, False):
                drawn.append(generate(net, uniforms, sampling, columns=columns, **prompt))
            assert torch.equal(*drawn)


def test_when_it_is_chosen(net: GPT) -> None:
    assert decode.columns_pay(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert not decode.columns_pay(net)
    assert not decode.columns_pay(net.to(torch.bfloat16))
