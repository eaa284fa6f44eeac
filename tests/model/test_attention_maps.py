"""Attention weights and their spread, against what the network computes and against sums by hand."""

import math

import pytest
import torch

from igpt.model import attention_maps
from igpt.model.attention import split_heads
from igpt.model.attention_maps import iterate_attention, measure_spread
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.model.patterns import TokenLayout
from tests.conftest import perturbed
from tests.model.test_options import CASES, draw_tokens, make


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("option", "grid", "shuffled"), CASES)
@torch.no_grad()
def test_weights_times_values_are_the_blocks_output(option: str, grid: str, shuffled: bool, causal: bool) -> None:
    """Independent source: attention as each block computes it, by its own backend; linear attention has no weights."""
    net = make(option, causal=causal, grid=grid, shuffled=shuffled)
    tokens = draw_tokens(net)
    visible = None if causal else torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) > 0.3
    queries = torch.tensor([0, net.n_ctx - 1, 7, 3])
    h, first_value = net.embed(tokens, visible), None
    maps = list(iterate_attention(net, tokens, visible))
    assert [each is None for each in maps] == [pattern == "linear" for pattern in net.config.patterns]
    for block, attention in zip(net.blocks, maps, strict=True):
        x = block.ln_1(h)
        expected, _ = block.attn(x, first_value)
        if attention is not None:
            weights = attention.weights(queries)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, net.n_head, 4))
            qkv = block.attn.c_attn(x)
            if not block.attn.is_plain:
                qkv, _ = block.attn.transform(qkv, first_value, 0)
            read = (weights @ split_heads(qkv, net.n_head)[2]).transpose(1, 2).flatten(2)  # (B, Q, C)
            torch.testing.assert_close(block.attn.c_proj(read), expected[:, queries], rtol=1e-4, atol=1e-5)
        h, added, first_value = block(h, None, first_value)
        h = h + added


@pytest.mark.parametrize("causal", [True, False])
def test_spread_is_the_sum_over_pairs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a loop over queries and keys, with the tokens' places written out; in parts as at once."""
    net = make("local", causal=causal, grid="channels", shuffled=True)
    tokens, layout = draw_tokens(net), net.config.layout
    assert layout is not None
    monkeypatch.setattr(attention_maps, "MOST_WEIGHTS", 2 * net.n_head * net.n_ctx * 4)
    spread = measure_spread(net, tokens, layout)
    weights = next(iterate_attention(net, tokens)).weights(torch.arange(net.n_ctx)).double()
    places = [divmod(layout.permutation[i // 3], 3) for i in range(net.n_ctx)]  # 3 × 3 cells of 3 channels
    far = on_tokens = uniform_far = uniform_on = 0.0
    for i in range(net.n_ctx):
        seen = [j for j in range(net.n_ctx) if weights[0, 1, i, j] > 0]
        for j in seen:
            if causal and j == 0:
                continue
            apart = math.dist(places[i], places[j - causal])
            far, on_tokens = far + weights[:, 1, i, j].mean() * apart, on_tokens + weights[:, 1, i, j].mean()
            uniform_far, uniform_on = uniform_far + apart / len(seen), uniform_on + 1 / len(seen)
    assert spread.distance[0, 1] == pytest.approx(float(far / on_tokens), rel=1e-5)
    assert spread.start_share[0, 1] == pytest.approx(1 - float(on_tokens) / net.n_ctx, abs=1e-6)
    assert spread.uniform_distance[0] == pytest.approx(uniform_far / uniform_on, rel=1e-5)
    entropy = -(weights[:, 1] * weights[:, 1].clamp_min(1e-300).log()).sum(-1).mean()
    assert spread.entropy[0, 1] == pytest.approx(float(entropy), rel=1e-5)


def test_uniform_attention_has_the_uniform_spread() -> None:
    """By hand: without queries every key weighs the same, log n of n keys; linear attention has no spread."""
    config = GPTConfig(n_layer=2, n_embd=8, n_head=2, n_ctx=4, n_vocab=5, causal=True, attention=("full", "linear"))
    net = perturbed(GPT(config))
    with torch.no_grad():
        net.blocks[0].attn.c_attn.weight[:8].zero_()
    spread = measure_spread(net, draw_tokens(net), TokenLayout(2, 2))
    # keys of queries 1 … 3 are tokens 0; 0, 1; 0, 1, 2, each with weight 1 / (n + 1), after the start vector
    far = 1 / 2 + (1 + math.sqrt(2)) / 3 + (math.sqrt(2) + 1 + 1) / 4
    assert spread.distance[0].tolist() == pytest.approx([far / (1 / 2 + 2 / 3 + 3 / 4)] * 2)
    assert spread.entropy[0].tolist() == pytest.approx([sum(map(math.log, (1, 2, 3, 4))) / 4] * 2)
    assert spread.start_share[0].tolist() == pytest.approx([(1 + 1 / 2 + 1 / 3 + 1 / 4) / 4] * 2)
    assert spread.uniform_distance[0] == pytest.approx(float(spread.distance[0, 0]))
    assert spread.distance[1].isnan().all()
    assert spread.uniform_entropy[1].isnan()
