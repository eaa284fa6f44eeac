"""Votes over masks."""

import math

import pytest
import torch

from igpt.probe import scores as scores_module
from igpt.probe.scores import vote
from igpt.utils import keyed


def make_rng_keys(n: int, seed: int = 0) -> torch.Tensor:
    return keyed.per_example_keys(keyed.key(seed, "vote"), torch.arange(n))


def test_the_majority_by_hand() -> None:
    """By hand: five masks, four images, no ties."""
    predictions = torch.tensor([[2, 0, 1, 3], [2, 1, 1, 0], [0, 1, 1, 1], [2, 1, 0, 1], [1, 3, 1, 1]])
    for seed in range(20):
        assert vote(predictions, n_class=4, rng_keys=make_rng_keys(4, seed)).tolist() == [2, 1, 1, 1]


def test_ties_are_broken_evenly_among_the_tied() -> None:
    """Independent source: each of three tied classes gets a third of 3,000 images, within 5 standard deviations."""
    predictions = torch.tensor([4, 0, 2, 0, 2, 4, 1])[:, None].expand(-1, 3000)  # 0, 2 and 4 twice, 1 once, 3 never
    counts = torch.bincount(vote(predictions, n_class=5, rng_keys=make_rng_keys(3000)), minlength=5).tolist()
    assert counts[1] == counts[3] == 0
    assert all(abs(counts[k] - 1000) < 5 * math.sqrt(3000 * 2 / 9) for k in (0, 2, 4))


def test_votes_know_no_order() -> None:
    """Invariants: not of the masks, nor of the images with their keys, nor which images are asked about together."""
    predictions = torch.randint(3, (4, 200), generator=torch.Generator().manual_seed(0))
    rng_keys = make_rng_keys(200)
    full = vote(predictions, n_class=3, rng_keys=rng_keys)
    turned = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(vote(predictions[[2, 0, 3, 1]], n_class=3, rng_keys=rng_keys), full)
    assert torch.equal(vote(predictions[:, turned], n_class=3, rng_keys=rng_keys[turned]), full[turned])
    parts = [vote(predictions[:, i : i + 7], n_class=3, rng_keys=rng_keys[i : i + 7]) for i in range(0, 200, 7)]
    assert torch.equal(torch.cat(parts), full)
    assert not torch.equal(
        vote(predictions, n_class=3, rng_keys=make_rng_keys(200, seed=1)), full
    )  # other ties, another draw


def test_votes_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: counted a few images at a time, of several heads, the votes are the same."""
    predictions = torch.randint(4, (3, 5, 100), generator=torch.Generator().manual_seed(0))
    full = vote(predictions, n_class=4, rng_keys=make_rng_keys(100))
    for room in (1, 3 * 4 * 7):
        monkeypatch.setattr(scores_module, "VOTE_COUNTS", room)
        assert torch.equal(vote(predictions, n_class=4, rng_keys=make_rng_keys(100)), full)


def test_every_head_has_its_own_vote() -> None:
    """Invariant: leading dimensions are as many votes of their own."""
    predictions = torch.randint(4, (2, 3, 5, 30), generator=torch.Generator().manual_seed(0))
    together = vote(predictions, n_class=4, rng_keys=make_rng_keys(30))
    assert together.shape == (2, 3, 30)
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], vote(predictions[i, j], n_class=4, rng_keys=make_rng_keys(30)))


def test_no_class_wins_without_a_vote() -> None:
    """Invariant: who wins has as many votes as anybody."""
    predictions = torch.randint(10, (3, 2000), generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(predictions, 10).sum(dim=0)  # (N, K)
    winners = vote(predictions, n_class=10, rng_keys=make_rng_keys(2000))
    assert torch.equal(counts[torch.arange(2000), winners], counts.amax(dim=1))
