"""Numbers that are reported."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from igpt.metric.likelihood import PER_DIM, BitUnit, likelihood_numbers, position_nats, unigram_nats
from igpt.metric.throughput import Meter, train_flops_per_image
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT


def test_mean_and_standard_error() -> None:
    """Independent source: numpy's mean and s / √n on the same values."""
    nats = torch.tensor([1.0, 2.0, 4.0, 5.5, 0.5], dtype=torch.float64)
    numbers = likelihood_numbers("val", nats)
    loss, bits = numbers["val/loss_gen"], numbers["val/bits_per_token"]
    assert loss.value == pytest.approx(np.mean(nats.numpy()))
    assert loss.stderr == pytest.approx(np.std(nats.numpy(), ddof=1) / 5**0.5)
    assert (loss.n, loss.unit) == (5, "nats/token")
    assert bits.value == pytest.approx(loss.value / math.log(2))


def test_the_papers_bits() -> None:
    """Independent source: iGPT-L's 2.0466 nats are 2.9526 bits."""
    nats = torch.tensor([2.0466], dtype=torch.float64)
    assert likelihood_numbers("test", nats)["test/bits_per_token"].value == pytest.approx(2.9526, abs=1e-4)


def test_bits_of_pixels_and_dimensions() -> None:
    """By hand: ln 2 and 3 ln 2 nats a token are 1 and 3 bits; a quarter a pixel in 2×2 patches, thrice that in RGB."""
    nats = torch.tensor([math.log(2), 3 * math.log(2)], dtype=torch.float64)
    for tokens, bits in ((0.25, 0.5), (3.0, 6.0)):
        numbers = likelihood_numbers("val", nats, [BitUnit("bits_per_pixel", "bits/pixel", tokens), PER_DIM])
        assert numbers["val/bits_per_pixel"].value == pytest.approx(bits)
        assert numbers["val/bits_per_pixel"].stderr == pytest.approx(tokens)  # 2 values 2 bits apart: 1 bit a token
        assert numbers["val/bits_per_dim"].value == pytest.approx(2)


def test_histograms_of_many_images() -> None:
    """Independent source: log-probabilities looked up token by token, over more images than are counted at once."""
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 7, (2500, 3)), rng.integers(0, 7, (1300, 3)).astype(np.int16)
    by_place = np.array([[(train[:, t] == v).sum() + 1 for v in range(7)] for t in range(3)], float)
    nats = -np.log(by_place / by_place.sum(1, keepdims=True))
    assert position_nats(train, held_out, 7) == pytest.approx(
        np.mean([nats[t, row[t]] for row in held_out for t in range(3)])
    )
    overall = by_place.sum(0) - 2  # one added to each, not three
    assert unigram_nats(train, held_out, 7) == pytest.approx(-np.log(overall / overall.sum())[held_out].mean())


def test_histograms_by_hand() -> None:
    """By hand: three training images of two tokens, one count added to each of two colours."""
    train = np.array([[0, 1], [0, 1], [0, 0]])
    held_out = np.array([[0, 1]])
    # all tokens: four 0, two 1 → 5/8, 3/8; position 0: three 0 → 4/5; position 1: one 0, two 1 → 3/5
    assert unigram_nats(train, held_out, 2) == pytest.approx(-(math.log(5 / 8) + math.log(3 / 8)) / 2)
    assert position_nats(train, held_out, 2) == pytest.approx(-(math.log(4 / 5) + math.log(3 / 5)) / 2)


def test_flops_by_hand() -> None:
    """Independent source: 312.5 GFLOP for a step of 4 images at 12 × 256, 1024 tokens, 512 colours (6NT + 6LT²d)."""
    network = GPTConfig(n_layer=12, n_embd=256, n_head=4, n_ctx=1024, n_vocab=512, causal=True)
    flops = train_flops_per_image(network)
    assert 4 * flops == pytest.approx(312.5e9, rel=1e-3)
    full = train_flops_per_image(replace(network, causal=False))
    assert full - flops == 6 * 12 * 1024**2 * 256


SETTINGS = [  # beyond the paper's
    {},
    {"positions": "factorised+rope_2d", "qk_norm": True, "value_residual": True},
    {"activation": "relu2"},
    {"activation": "swiglu"},
    {"attention": "local", "radius": 1},
    {"attention": "strided", "stride": 8},
    {"attention": "fixed"},
    {"attention": "axial"},
    {"attention": "linear"},
    {"attention": ["local", "full", "linear"], "radius": 2, "activation": "swiglu"},
]


@pytest.mark.parametrize("changed", SETTINGS, ids=str)
def test_flops_by_decoding(changed: dict[str, Any]) -> None:
    """Independent source: thrice the operations that PyTorch counts while an image is decoded token by token.

    Decoding computes visible pairs only, and linear attention by its state. By hand, counted besides: half a pair on
    the diagonal of full attention, and the sum of weights by which linear attention divides.
    """
    network = GPTConfig(n_layer=3, n_embd=24, n_head=2, n_ctx=16, n_vocab=7, causal=True, grid=(4, 4, 1), **changed)
    net = GPT(network)
    net.init_weights(0)
    cache, tokens = net.new_cache(1), torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for i in range(16):
            net.step(tokens[:, max(0, i - 1) : i], cache)
    halves = sum(pattern == "full" for pattern in network.patterns) * 12 * 24 * 16 / 2
    divided = sum(pattern == "linear" for pattern in network.patterns) * 6 * 24 * 16
    assert train_flops_per_image(network) == 3 * counter.get_total_flops() - halves - divided


@pytest.mark.parametrize("changed", [{}, {"attention": "local", "radius": 1}, {"relative_bias": True}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_flops_by_training(causal: bool, changed: dict[str, Any]) -> None:
    """Independent source: what PyTorch counts of a forward and backward pass, without the pairs that are masked.

    By hand, counted besides: the gradient of the gain of five norms, a product.
    """
    network = GPTConfig(n_layer=2, n_embd=24, n_head=2, n_ctx=16, n_vocab=7, causal=causal, grid=(4, 4, 1), **changed)
    net = GPT(network)
    net.init_weights(0)
    for block in net.blocks:
        block.attn.backend = "bmm"
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 16, dtype=torch.int64)).sum().backward()
    masked = 16**2 / 2 if causal else 0
    if "radius" in changed:  # by hand: a pixel sees itself and its neighbours, of causal attention earlier ones
        pixels = [(i, *divmod(i, 4)) for i in range(16)]
        near = [(i, j) for i, y, x in pixels for j, v, u in pixels if max(abs(y - v), abs(x - u)) <= 1]
        before = {(i, j + 1) for i, j in near if j < i} | {(i, i) for i in range(16)} | {(i, 0) for i in range(16)}
        masked = 16**2 - len(before if causal else near)
    assert train_flops_per_image(network) == counter.get_total_flops() - 2 * 12 * 24 * masked - 5 * 2 * 24 * 16


def test_the_meter_counts_only_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 30 images in 3 s of work and 10 s of pause, against a stated peak."""
    now = [100.0]
    monkeypatch.setattr("igpt.metric.throughput.time.perf_counter", lambda: now[0])
    meter = Meter(flops_per_image=50.0, n_ctx=64, peak_flops=1000.0)
    meter.add(30)
    now[0] += 2
    meter.pause()
    now[0] += 10
    meter.resume()
    now[0] += 1
    assert meter.read() == pytest.approx({"images_per_s": 10.0, "tokens_per_s": 640.0, "flop_utilisation": 0.5})
    meter.add(8)
    now[0] += 4
    assert meter.read()["images_per_s"] == pytest.approx(2.0)
