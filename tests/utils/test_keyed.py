"""Keyed randomness."""

import torch

from igpt.utils import keyed


def test_the_bits_are_splitmix64s() -> None:
    """Independent source: the first outputs of splitmix64 from seed 0, as published with the algorithm."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    drawn = keyed.uniform(torch.tensor([0]), 3)[0]
    assert drawn.tolist() == [(bits >> 11) * 2.0**-53 for bits in published]


def test_a_row_depends_on_its_key_alone() -> None:
    """Invariant: neither the other rows nor the length of the row change what is drawn."""
    rng_keys = keyed.per_example_keys(torch.tensor(keyed.key(3, "mask")), torch.arange(50))
    full = keyed.uniform(rng_keys, 64)
    assert torch.equal(keyed.uniform(rng_keys[17:18], 64)[0], full[17])
    assert torch.equal(keyed.uniform(rng_keys, 10), full[:, :10])
    assert len(set(rng_keys.tolist())) == 50


def test_uniform_is_uniform() -> None:
    """Invariant: mean 1/2, variance 1/12 and no correlation between neighbours, within 5 standard errors."""
    rng_keys = keyed.per_example_keys(torch.tensor(keyed.key(0, "test")), torch.arange(1000))
    u = keyed.uniform(rng_keys, 1000)
    assert abs(u.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 1000
    assert abs(u.var() - 1 / 12) < 5e-4
    for shifted in (u[1:] - 0.5, torch.roll(u, 1, dims=1)[1:] - 0.5):
        assert abs(((u[:-1] - 0.5) * shifted).mean()) < 5 / 12 / 1000
    assert u.min() >= 0
    assert u.max() < 1


def test_streams_and_counters_differ() -> None:
    """Invariant: every part of a name counts."""
    keys = {
        keyed.key(0, "a", 1),
        keyed.key(0, "a", 2),
        keyed.key(0, "b", 1),
        keyed.key(1, "a", 1),
        keyed.key(0, "a", 1, 0),
    }
    assert len(keys) == 5
    assert keyed.generator(0, "a", 1).random() == keyed.generator(0, "a", 1).random()
