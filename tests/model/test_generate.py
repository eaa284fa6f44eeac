"""Sampling: cached equals uncached, and nothing but its own row decides an image."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from igpt.model import decode
from igpt.model.generate import Sampling, generate, generate_stream
from igpt.model.gpt import GPT
from igpt.utils import keyed
from tests.conftest import small_net

PLAIN = Sampling(1.0, None, None)


def uniforms(n: int, n_ctx: int = 16) -> Tensor:
    return keyed.uniform(keyed.per_example_keys(torch.tensor(keyed.key(0, "test")), torch.arange(n)), n_ctx)


def test_cached_logits_equal_uncached(net: GPT, tokens: Tensor) -> None:
    """Invariant: fed one token at a time, or after a prompt, to 1e-5."""
    with torch.no_grad():
        expected = net(tokens)
        for prompt in (0, 7):
            cache = net.new_cache(len(tokens))
            logits = [net.step(tokens[:, :prompt], cache)]
            logits += [net.step(tokens[:, i : i + 1], cache) for i in range(prompt, net.n_ctx - 1)]
            assert (torch.stack(logits, dim=1) - expected[:, prompt:]).abs().max() < 1e-5


def test_cached_draws_equal_uncached(net: GPT) -> None:
    """Invariant: the same uniforms give the same images as OpenAI's way, a whole pass for every pixel."""
    assert torch.equal(generate(net, uniforms(6), PLAIN), generate(net, uniforms(6), PLAIN, cached=False))


def test_the_batch_changes_no_image(net: GPT) -> None:
    """Invariant: image i is the same drawn alone, in twos or with all others."""
    together = generate(net, uniforms(6), PLAIN)
    for size in (1, 2):
        parts = [generate(net, part, PLAIN) for part in uniforms(6).split(size)]
        assert torch.equal(torch.cat(parts), together)
    assert len({tuple(row) for row in together.tolist()}) == 6


def test_known_tokens_stay_and_condition_the_rest(net: GPT, tokens: Tensor) -> None:
    """Invariant: a prompt is kept; the rest is what drawing on from it gives; a whole image is returned as it is."""
    known = torch.arange(16) < 6
    drawn = generate(net, uniforms(4), PLAIN, prompts=tokens, known=known)
    assert torch.equal(drawn[:, :6], tokens[:, :6])
    assert torch.equal(drawn, generate(net, uniforms(4), PLAIN, prompts=tokens, known=known, cached=False))
    scattered = torch.arange(16) % 3 == 1
    mixed = generate(net, uniforms(4), PLAIN, prompts=tokens, known=scattered)
    assert torch.equal(mixed[:, scattered], tokens[:, scattered])
    assert torch.equal(mixed, generate(net, uniforms(4), PLAIN, prompts=tokens, known=scattered, cached=False))
    assert torch.equal(
        generate(net, uniforms(4), PLAIN, prompts=tokens, known=torch.ones(16, dtype=torch.bool)), tokens
    )


def test_equal_prompts_are_read_once(net: GPT, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: each image is what it is alone; by hand: the prompts' pass has two rows of five, the others all."""
    known, given = torch.arange(16) < 6, tokens[[2, 0, 2, 2, 0]]
    pairs = zip(uniforms(5).split(1), given.split(1), strict=True)
    alone = [generate(net, u, PLAIN, prompts=g, known=known) for u, g in pairs]
    assert decode.is_verified(net, "layers")  # which is looked at once
    read: list[tuple[int, ...]] = []
    step = net.step
    monkeypatch.setattr(net, "step", lambda new, cache: read.append(tuple(new.shape)) or step(new, cache))
    drawn = generate(net, uniforms(5), PLAIN, prompts=given, known=known, backend="layers")
    assert torch.equal(drawn, torch.cat(alone))
    assert read == [(2, 6), *[(5, 1)] * 9]
    assert len({tuple(row) for row in torch.cat(alone).tolist()}) == 5


def in_a_thread_of_its_own(steps: Iterator[tuple[Tensor, int]]) -> tuple[Tensor, int] | None:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(next, steps, None).result()


def test_growing_images_are_those_that_are_generated(net: GPT, tokens: Tensor) -> None:
    """Invariant: after each step what is settled is the end's, token by token, whatever thread takes the step."""
    for known in (torch.arange(16) < 6, torch.arange(16) % 3 == 0, torch.ones(16, dtype=torch.bool)):
        end = generate(net, uniforms(4), PLAIN, prompts=tokens, known=known)
        steps = generate_stream(net, uniforms(4), PLAIN, prompts=tokens, known=known)
        seen = []
        while (step := in_a_thread_of_its_own(steps)) is not None:
            so_far, settled = step
            there = known | (torch.arange(16) < settled)
            assert torch.equal(so_far, torch.where(there, end, 0))
            seen.append(settled)
        assert seen[1:] == [i + 1 for i in range(16) if not known[i]]


def test_greedy_is_the_likeliest(net: GPT) -> None:
    """Invariant: with top_k=1 every token is the argmax of the teacher-forced logits."""
    drawn = generate(net, uniforms(3), Sampling(1.0, 1, None))
    with torch.no_grad():
        assert torch.equal(net(drawn).argmax(-1), drawn)


def test_draws_follow_the_distribution() -> None:
    """By hand: inverting the cumulative distribution of (0.5, 0.3, 0.2) at chosen points."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(6, 3)
    u = torch.tensor([0.0, 0.4999, 0.5001, 0.7999, 0.8001, 1 - 1e-12], dtype=torch.float64)
    assert PLAIN.draw(logits, u).tolist() == [0, 0, 1, 1, 2, 2]
    assert Sampling(1.0, 2, None).draw(logits, u).tolist() == [0, 0, 0, 1, 1, 1]  # 0.625, 0.375
    assert Sampling(1.0, None, 0.6).draw(logits, u).tolist() == [0, 0, 0, 1, 1, 1]
    assert Sampling(1.0, None, 0.4).draw(logits, u).tolist() == [0] * 6
    squared = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) ** 2  # temperature 1/2
    edge = (squared.cumsum(0) / squared.sum())[:2]
    cold = Sampling(0.5, None, None)
    assert cold.draw(logits[:4], torch.stack([edge - 1e-6, edge + 1e-6], 1).flatten()).tolist() == [0, 1, 1, 2]


def test_a_colour_without_probability_is_never_drawn() -> None:
    """Invariant: at both ends of the unit interval."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    assert PLAIN.draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0.0, None, None), "temperature"),
        ((-1.0, None, None), "temperature"),
        ((1.0, 0, None), "top_k"),
        ((1.0, None, 1.5), "top_p"),
    ],
)
def test_bad_settings(settings: tuple[float, int | None, float | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(*settings)


def test_a_bidirectional_network_does_not_generate() -> None:
    with pytest.raises(ValueError, match="only causal"):
        generate(small_net(causal=False), uniforms(1), PLAIN)


def test_shapes_that_do_not_fit(net: GPT, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(B, 16\)"):
        generate(net, uniforms(1, 8), PLAIN)
    with pytest.raises(ValueError, match="come together"):
        generate(net, uniforms(4), PLAIN, prompts=tokens)
