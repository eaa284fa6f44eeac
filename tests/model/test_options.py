"""The network's options beyond the paper: positions, attention patterns, later recipes."""

import warnings
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.model import decode
from igpt.model.block import Block
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate, prefill
from igpt.model.gpt import GPT
from igpt.model.linear_attention import attend_to_state, feature_map, linear_attention, read_state
from igpt.model.patterns import TokenLayout
from igpt.model.positions import Factorised
from igpt.utils import keyed
from tests.conftest import perturbed
from tests.task.conftest import machine

SIDE = 5
SHUFFLED = tuple(torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(3)).tolist())
SIZES: dict[str, Any] = {"n_layer": 3, "n_embd": 24, "n_head": 2, "n_vocab": 11}
OPTIONS: dict[str, dict[str, Any]] = {
    "factorised": {"positions": "factorised"},
    "rope_2d": {"positions": "rope_2d"},
    "learned_rope_2d": {"positions": "learned+rope_2d"},
    "factorised_rope_2d": {"positions": "factorised+rope_2d"},
    "relative_bias": {"relative_bias": True},
    "local": {"attention": "local", "radius": 1},
    "local_bias_rope": {"attention": "local", "radius": 2, "relative_bias": True, "positions": "rope_2d"},
    "strided": {"attention": "strided"},
    "fixed": {"attention": "fixed"},
    "axial": {"attention": "axial"},
    "linear": {"attention": "linear"},
    "mixed": {"attention": ["local", "linear", "full"], "radius": 1},
    "qk_norm": {"qk_norm": True},
    "value_residual": {"value_residual": True},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "all_recipes": {
        "qk_norm": True,
        "value_residual": True,
        "activation": "swiglu",
        "attention": ["strided", "linear"],
    },
}
GRIDS = {"cells": (SIDE, SIDE, 1), "channels": (3, 3, 3)}


def make(option: str, *, causal: bool = True, grid: str = "cells", shuffled: bool = False) -> GPT:
    rows, columns, channels = GRIDS[grid]
    permutation = None
    if shuffled:
        permutation = SHUFFLED if grid == "cells" else (4, 2, 0, 8, 1, 3, 7, 5, 6)
    config = GPTConfig(
        **SIZES, **OPTIONS[option], n_ctx=rows * columns * channels, causal=causal, grid=GRIDS[grid],
        permutation=permutation,
    )  # fmt: skip
    return perturbed(GPT(config))


def draw_tokens(net: GPT, batch: int = 2) -> Tensor:
    return torch.randint(net.n_vocab, (batch, net.n_ctx), generator=torch.Generator().manual_seed(1))


CASES = [
    *[(option, "cells", False) for option in OPTIONS],
    *[(option, "channels", True) for option in ("factorised_rope_2d", "local_bias_rope", "strided", "fixed", "axial")],
]


@pytest.mark.parametrize(("option", "grid", "shuffled"), CASES)
@torch.no_grad()
def test_no_logit_sees_its_own_or_a_later_token(option: str, grid: str, shuffled: bool) -> None:
    """Invariant: another token j changes no logit 0 … j, to the bit, and the last token but one some after it."""
    net = make(option, grid=grid, shuffled=shuffled)
    tokens = draw_tokens(net)
    before = net(tokens)
    for j in (0, 7, net.n_ctx - 2):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 1) % net.n_vocab
        after = net(other)
        assert torch.equal(after[:, : j + 1], before[:, : j + 1])
        assert not torch.equal(after[:, j + 1 :], before[:, j + 1 :])


@pytest.mark.parametrize(("option", "grid", "shuffled"), CASES)
@torch.inference_mode()
def test_decoding_with_a_cache_is_the_full_pass(option: str, grid: str, shuffled: bool) -> None:
    """Invariant: logits from the cache equal those of a full pass to 1e-5, after prompts of several lengths."""
    net = make(option, grid=grid, shuffled=shuffled)
    tokens = draw_tokens(net)
    full = net(tokens)
    for start in (0, 1, 8):
        cache = net.new_cache(2)
        torch.testing.assert_close(net.step(tokens[:, :start], cache), full[:, start], rtol=0, atol=1e-5)
        step = decode.make_decode_step(net, cache)
        for i in range(start, net.n_ctx - 1):
            torch.testing.assert_close(step(tokens[:, i : i + 1]), full[:, i + 1], rtol=0, atol=1e-5)


def test_weights_are_not_read_to_choose_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: sharded tables cannot be added up; which backends compute a network follows from its settings."""
    monkeypatch.setattr(Factorised, "table", None)
    lacking = {name: decode.BACKENDS["native"].list_lacking(make(name)) for name in OPTIONS}
    assert [name for name, settings in lacking.items() if not settings] == ["factorised"]
    assert lacking["factorised_rope_2d"] == "positions=factorised+rope_2d"


@torch.inference_mode()
@pytest.mark.parametrize("option", ["linear", "mixed", "local", "value_residual", "factorised"])
def test_prompts_in_common_are_read_once(option: str) -> None:
    """Invariant: equal prompts, which are computed once, give the samples of one full pass per token."""
    net = make(option)
    prompts = draw_tokens(net, 1).expand(3, -1).clone()
    known = torch.arange(net.n_ctx) < 6
    uniforms, sampling = keyed.uniform(torch.arange(3), net.n_ctx), Sampling(1.0, None, None)
    cached, full = (
        generate(net, uniforms, sampling, prompts=prompts, known=known, cached=cached) for cached in (True, False)
    )
    assert torch.equal(cached, full)
    assert prefill(net, prompts[:, :6])[1].length == 7


@pytest.mark.parametrize("option", OPTIONS)
def test_masked_networks_have_the_options(option: str) -> None:
    """Invariant: a BERT network sees both ways: with any pattern of two layers a token reaches earlier logits."""
    net = make(option, causal=False)
    tokens = draw_tokens(net)
    with torch.no_grad():
        before = net(tokens)
        tokens[:, -1] = (tokens[:, -1] + 1) % net.n_vocab
        assert not torch.equal(net(tokens)[:, -3], before[:, -3])


@pytest.mark.parametrize("backend", ["auto", "sdpa", "blocks", "bmm"])
def test_a_batch_without_images(backend: str) -> None:
    """Invariant: a rank that has no image left of a validation computes with the others, under any backend."""
    for option in OPTIONS:
        net = make(option)
        for block in net.blocks:
            block.attn.backend = backend
        logits = net(torch.zeros(0, net.n_ctx, dtype=torch.int64))
        assert logits.shape == (0, net.n_ctx, net.n_vocab)
        logits.sum().backward()


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients(option: str) -> None:
    """Independent source: finite differences in float64 of a loss of all logits, along one direction per weight."""
    net = make(option).double()
    tokens = draw_tokens(net)

    def loss() -> Tensor:
        return F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())

    loss().backward()
    generator = torch.Generator().manual_seed(5)
    for name, weight in net.named_parameters():
        assert weight.grad is not None, name
        along = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        slope, eps = float((weight.grad * along).sum()), 1e-5
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight.add_(along, alpha=sign * eps)
                values.append(float(loss()))
                weight.add_(along, alpha=-sign * eps)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("option", ["relative_bias", "local_bias_rope", "mixed", "strided"])
def test_training_after_sampling(option: str) -> None:
    """Invariant: tables that a pass in inference mode has built serve the backward pass."""
    net = make(option)
    with torch.inference_mode():
        net(draw_tokens(net))
    net(draw_tokens(net)).sum().backward()
    assert net.blocks[0].attn.c_attn.weight.grad is not None


@pytest.mark.slow
def test_blocks_of_many_kinds_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: PyTorch ends with an error where it would give up compiling (and compute eagerly)."""
    monkeypatch.setattr(Block, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setitem(OPTIONS, "kinds", {"attention": ["local", "axial", "axial", "full"], "radius": 1})
    monkeypatch.setitem(OPTIONS["kinds"], "value_residual", True)
    monkeypatch.setitem(SIZES, "n_layer", 5)
    net, plain = make("kinds"), make("kinds")
    machine(compile=True).prepare(net)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        net(draw_tokens(net)).sum().backward()
        for batch in (2, 3):
            tokens = draw_tokens(net, batch)
            with torch.inference_mode():
                torch.testing.assert_close(net(tokens), plain(tokens))


@torch.no_grad()
def test_factorised_is_a_learned_table_of_sums() -> None:
    """Independent source: the paper's network with its table set to row + column (+ channel), to the bit."""
    for grid, permutation in (("cells", None), ("channels", (4, 2, 0, 8, 1, 3, 7, 5, 6))):
        net = make("factorised", grid=grid, shuffled=permutation is not None)
        columns, channels = GRIDS[grid][1:]
        plain = GPT(replace(net.config, positions="learned"))
        state = {name: weight for name, weight in net.state_dict().items() if not name.startswith("positions.")}
        parts = net.positions["factorised"]
        sums = torch.zeros(net.n_ctx, net.n_embd)
        for i in range(net.n_ctx):
            cell = i // channels if permutation is None else permutation[i // channels]
            sums[i] = parts.row[cell // columns] + parts.column[cell % columns]
            if channels > 1:
                sums[i] += parts.channel[i % channels]
        plain.load_state_dict({**state, "wpe": sums})
        tokens = draw_tokens(net)
        assert torch.equal(net(tokens), plain(tokens))


def test_rope_scores_depend_on_offsets_alone() -> None:
    """Invariant: scores of rotated queries and keys stay where all rows and columns shift by one; lengths stay."""
    config = GPTConfig(**{**SIZES, "n_embd": 16}, n_ctx=25, causal=True, positions="rope_2d", grid=(5, 5, 1))
    rope = GPT(config).encodings[0]
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        return float((rope.rotate(q, i) * rope.rotate(k, j)).sum())

    for i, j in ((0, 1), (0, 5), (3, 11), (2, 13), (12, 6)):
        for shift in (1, 5, 6):  # a column, a row, both
            assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=1e-5)
    assert score(0, 1) != pytest.approx(score(0, 5), abs=1e-3)  # rows are not columns
    assert score(0, 1) != pytest.approx(score(1, 0), abs=1e-3)
    assert float(rope.rotate(q, 17).norm()) == pytest.approx(float(q.norm()))


def test_rope_turns_by_the_predicted_token() -> None:
    """Independent source: complex numbers turned by row and column of the token that a position predicts."""
    net = make("rope_2d", grid="channels", shuffled=True)
    layout, size = TokenLayout(3, 3, 3, net.config.permutation), 12
    x = torch.randn(1, 1, net.n_ctx, size, generator=torch.Generator().manual_seed(0))
    turned = torch.view_as_complex(net.encodings[0].rotate(x, 0).view(net.n_ctx, -1, 2))
    plain = torch.view_as_complex(x.view(net.n_ctx, -1, 2))
    for i in (0, 5, 22):
        assert layout.permutation is not None
        cell = layout.permutation[i // 3]
        row, column = cell // 3, cell % 3 * 3 + i % 3
        for pair in range(size // 2):
            place, rank = (row, pair) if pair < size // 4 else (column, pair - size // 4)
            angle = torch.tensor(1j * place * 10_000 ** (-rank / (size // 4)))
            torch.testing.assert_close(turned[i, pair], plain[i, pair] * angle.exp())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("t", "chunk"), [(1, 4), (13, 4), (16, 4), (13, 64)])
def test_linear_attention_is_its_quadratic_form_and_its_recurrence(causal: bool, t: int, chunk: int) -> None:
    """Independent source: all pairs of φ(q)·φ(k) in float64, masked; and one position after the other."""
    q, k, v = torch.randn(3, 2, 3, t, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    weights = weights.tril() if causal else weights
    expected = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(linear_attention(q, k, v, causal=causal, chunk=chunk), expected, rtol=1e-12, atol=1e-12)
    if causal:
        sums, state = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5, 5)
        for i in range(t):
            added = read_state(k[:, :, i : i + 1], v[:, :, i : i + 1])
            sums, state = sums + added[0], state + added[1]
            out = attend_to_state(q[:, :, i : i + 1], sums, state)
            torch.testing.assert_close(out, expected[:, :, i : i + 1], rtol=1e-10, atol=1e-10)
    assert feature_map(q.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_qk_norm_ignores_the_scale_of_queries_and_keys() -> None:
    """Invariant: larger queries and keys change nothing (but for the norm's epsilon), larger values do."""
    net = make("qk_norm")
    tokens = draw_tokens(net)
    before = net(tokens)
    for block in net.blocks:
        block.attn.c_attn.weight[: 2 * net.n_embd] *= 64
    torch.testing.assert_close(net(tokens), before, rtol=1e-3, atol=1e-3)
    net.blocks[0].attn.c_attn.weight[2 * net.n_embd :] *= 64
    assert (net(tokens) - before).abs().max() > 0.1


def test_qk_norm_is_fused_in_mixed_precision() -> None:
    """Independent source: PyTorch warns where it cannot, of queries in bfloat16 and their gains in float32."""
    net = make("qk_norm")
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        net(draw_tokens(net)).sum().backward()
    assert net.blocks[0].attn.q_norm.g.grad is not None


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_first_values_are_kept_where_they_are_mixed(option: str) -> None:
    """Invariant: other networks hold no values of an earlier block, also not through activation checkpoints."""
    net = make(option)
    h = net.embed(draw_tokens(net))
    net.prepare_tables()
    kept = net.blocks[0](h)[2]
    assert (kept is not None) == net.config.value_residual


@torch.no_grad()
def test_value_residual_mixes_the_first_values() -> None:
    """Independent source: with weights 1 and 0 the paper's network; with 0 and 1 the first block's values decide."""
    net = make("value_residual")
    for block in net.blocks[1:]:
        block.attn.value_mix.copy_(torch.tensor([1.0, 0.0]))
    plain = GPT(replace(net.config, value_residual=False))
    plain.load_state_dict({name: weight for name, weight in net.state_dict().items() if "value_mix" not in name})
    tokens = draw_tokens(net)
    torch.testing.assert_close(net(tokens), plain(tokens), rtol=0, atol=1e-6)
    for block in net.blocks[1:]:
        block.attn.value_mix.copy_(torch.tensor([0.0, 1.0]))
    before = net(tokens)
    net.blocks[2].attn.c_attn.weight[2 * net.n_embd :].zero_()  # values that are not read
    assert torch.equal(net(tokens), before)


@torch.no_grad()
def test_the_bias_starts_as_the_papers_network_and_is_one_number_per_offset() -> None:
    """Independent source: a masked softmax by hand, with the bias of every pair looked up by its rows and columns."""
    net = make("relative_bias")
    fresh, plain = GPT(net.config), GPT(replace(net.config, relative_bias=False))
    fresh.init_weights(0), plain.init_weights(0)
    fresh.wtet.normal_(generator=torch.Generator().manual_seed(0))
    plain.wtet.copy_(fresh.wtet)
    tokens = draw_tokens(net)
    torch.testing.assert_close(fresh(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
    attn, t = net.blocks[0].attn, net.n_ctx
    net.prepare_tables()
    x = torch.randn(1, t, net.n_embd, generator=torch.Generator().manual_seed(2))
    q, k, v = (x @ attn.c_attn.weight.T).view(t, 3, net.n_head, -1).unbind(1)  # (T, H, D)
    out = torch.zeros(t, net.n_head, net.n_embd // net.n_head)
    for head in range(net.n_head):
        for i in range(t):
            scores = q[i, head] @ k[: i + 1, head].T / (net.n_embd / net.n_head) ** 0.5
            for j in range(1, i + 1):  # key j carries token j - 1
                down, across = i // SIDE - (j - 1) // SIDE, i % SIDE - (j - 1) % SIDE
                scores[j] += attn.relative[head, down + SIDE - 1, across + SIDE - 1]
            out[i, head] = scores.softmax(-1) @ v[: i + 1, head]
    expected = out.flatten(1) @ attn.c_proj.weight.T
    torch.testing.assert_close(attn(x)[0][0], expected, rtol=0, atol=1e-5)


def test_a_radius_of_a_strangers_file() -> None:
    """By hand: a number that no tensor holds is refused with the config, not in a pass of the network."""
    saved = {**SIZES, "n_ctx": 25, "causal": True, "attention": "local", "radius": 1 << 70, "grid": [5, 5, 1]}
    with pytest.raises(ValueError, match=r"^model\.radius must be a whole number of 1 to 16,777,216, got 11805"):
        GPTConfig.from_dict(saved)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@torch.no_grad()
def test_activations(activation: str) -> None:
    """Independent source: the formulas of So et al. 2021 and Shazeer 2020, written out."""
    mlp = make(activation).blocks[0].mlp
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    wide = x @ mlp.c_fc.weight.T
    if activation == "relu2":
        inner = torch.where(wide > 0, wide, 0) ** 2
    else:
        gate, value = wide[..., :64], wide[..., 64:]  # 8/3 · 24
        inner = gate / (1 + (-gate).exp()) * value
    torch.testing.assert_close(mlp(x), inner @ mlp.c_proj.weight.T)
