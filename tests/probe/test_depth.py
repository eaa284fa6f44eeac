"""Layers by depth: their numbers by hand, the best layer's interval and the fall after it by known statistics."""

from itertools import pairwise
from math import sqrt

import numpy as np
import pytest

from igpt.probe.depth import best_layer_interval, fall_to_last_layer, number_layer, resolve_layer


@pytest.mark.parametrize(
    ("named", "n_layer", "layer"),
    [(None, 8, None), (0, 8, 0), (7, 8, 7), ("last", 8, 8), ("last", 48, 48), (0.5, 8, 4), (0.5, 9, 4), (0.5, 1, 0),
     (0.75, 48, 36), (0.01, 48, 0), (0.02, 48, 1), (0.99, 48, 48), (0.29, 100, 29)],
)  # fmt: skip
def test_a_layer_by_its_name(named: float | str | None, n_layer: int, layer: int | None) -> None:
    """By hand: the nearest to the fraction, of two equally near ones the lower."""
    assert resolve_layer(named, n_layer) == layer


def images(*shares: float, n: int = 1000, seed: int = 0) -> np.ndarray:
    """Layers that are right on so many images, each on its own: (L + 1, n) bool."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(np.arange(n) < share * n) for share in shares])


def test_the_best_layer_and_its_rivals() -> None:
    """By hand: a clear maximum is one layer; a plateau is all of its layers; equal layers are all of them."""
    assert best_layer_interval(images(0.3, 0.4, 0.7, 0.5, 0.4)) == (2, 2)
    assert best_layer_interval(images(0.2, 0.6, 0.6, 0.6, 0.6, 0.3)) == (1, 4)
    assert best_layer_interval(images(0.2, 0.3, 0.4)[[1, 2, 2, 2, 0]]) == (1, 3)
    assert best_layer_interval(np.zeros((4, 50), dtype=bool)) == (0, 3)
    number = number_layer(2, 4, images(0.3, 0.4, 0.7, 0.5, 0.4))
    assert (number.value, number.interval, number.n, number.unit) == (2, (2, 2), 1000, "of 0 … 4")


@pytest.mark.parametrize(("ahead", "behind", "interval"), [(58, 42, (0, 1)), (64, 36, (0, 0))])
def test_a_rival_is_left_out_where_its_chance_is_small(ahead: int, behind: int, interval: tuple[int, int]) -> None:
    """Independent source: the normal distribution. 1.6 standard errors leave 5 % to the second, 2.8 leave 0.3 %."""
    first = np.arange(400) < ahead
    second = (np.arange(400) >= ahead) & (np.arange(400) < ahead + behind)
    assert best_layer_interval(np.stack([first, second])) == interval


@pytest.mark.parametrize("copies", [1, 6])
def test_the_fall_of_a_pair(copies: int) -> None:
    """Independent source: the paired difference ± 1.96 standard errors; a layer that is there again adds nothing."""
    better, last = images(0.6, 0.5)
    fall = fall_to_last_layer(np.stack([*[better] * copies, last]))
    difference = better.astype(float) - last
    reach = 1.96 * difference.std() / sqrt(len(difference))
    assert fall.value == pytest.approx(difference.mean())
    assert fall.interval == pytest.approx((difference.mean() - reach, difference.mean() + reach), abs=0.06 * reach)
    assert (fall.n, fall.features) == (1000, f"layers 0 and {copies}")


def test_the_images_are_paired() -> None:
    """By hand: right on the same images but 20, the last layer is surely worse, though 2 % is little."""
    last = images(0.5)[0]
    better = last.copy()
    better[np.flatnonzero(~last)[:20]] = True
    fall = fall_to_last_layer(np.stack([better, last]))
    assert fall.value == pytest.approx(0.02)
    assert fall.interval is not None
    assert fall.interval[0] > 0.01


def test_a_rise_to_the_last_layer_is_no_fall() -> None:
    """By hand: 0, and not below; equal predictions have no width."""
    fall = fall_to_last_layer(images(0.2, 0.4, 0.6))
    assert (fall.value, fall.interval) == (0.0, (0.0, 0.0))
    same = fall_to_last_layer(images(0.4)[[0, 0, 0]])
    assert (same.value, same.interval) == (0.0, (0.0, 0.0))


def test_the_choice_of_the_best_is_in_the_interval() -> None:
    """Invariant: of 12 equally good layers the best one is rarely called better, though a plain interval often does."""
    found, plain = 0, 0
    for seed in range(40):
        correct = np.random.default_rng(seed).random((13, 150)) < 0.5
        fall = fall_to_last_layer(correct)
        difference = correct[correct.sum(axis=1).argmax()].astype(float) - correct[-1]
        assert fall.interval is not None
        found += fall.interval[0] > 0
        plain += difference.mean() > 1.96 * difference.std() / sqrt(150)
    assert found <= 4 < plain


def test_more_images_make_a_narrower_interval() -> None:
    """Invariant: of a maximum among slowly changing layers."""
    shares = [0.5 - 0.004 * (layer - 10) ** 2 for layer in range(21)]
    widths = [np.ptp(best_layer_interval(images(*shares, n=n))) for n in (200, 800, 4000)]
    assert all(wide > narrow for wide, narrow in pairwise(widths))
