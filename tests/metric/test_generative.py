"""Sample quality: against torchmetrics, closed forms, and sets whose numbers are known."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from igpt.metric.generative import (
    N_BLOCK,
    find_nearest_images,
    frechet_distance,
    kernel_distance,
    memorisation_numbers,
    precision_and_recall,
)


def draw(n: int, width: int = 16, *, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * scale + shift


def test_kid_is_torchmetrics() -> None:
    """Independent source: torchmetrics' MMD² with the same kernel, which takes sets of one size; a shift is seen."""
    real, drawn = draw(200), draw(200, seed=1, scale=1.1, shift=0.3)
    kid = kernel_distance(real, drawn)
    assert kid.value == pytest.approx(float(poly_mmd(real, drawn)), abs=1e-9)
    assert kid.stderr is not None
    assert kid.value > 5 * kid.stderr


def test_kid_of_sets_of_two_sizes() -> None:
    """By hand: the three means of the kernel over pairs, written out; 45 and 61 images in unequal blocks."""
    real, drawn = draw(45, 4), draw(61, 4, seed=1)

    def kernel(x: Tensor, y: Tensor) -> np.ndarray:
        return np.array([[(float(a @ b) / 4 + 1) ** 3 for b in y] for a in x])

    def mean_of_pairs(x: Tensor) -> float:
        k = kernel(x, x)
        return float(k[~np.eye(len(k), dtype=bool)].mean())

    expected = mean_of_pairs(real) + mean_of_pairs(drawn) - 2 * kernel(real, drawn).mean()
    assert kernel_distance(real, drawn).value == pytest.approx(expected, abs=1e-12)


def test_kid_is_unbiased_and_its_error_is_right() -> None:
    """Invariant: over 40 pairs of sets of one Gaussian the mean is 0 within two of its standard errors, where V-
    statistics are 20 errors off; of two Gaussians the jackknife's error is the spread of the values, to a third."""
    same = np.array([kernel_distance(draw(60, seed=i), draw(80, seed=1000 + i)).value for i in range(40)])
    assert abs(same.mean()) < 2 * same.std(ddof=1) / 40**0.5
    apart = [kernel_distance(draw(60, seed=i), draw(80, seed=1000 + i, shift=0.5)) for i in range(40)]
    spread = np.std([kid.value for kid in apart], ddof=1)
    assert np.mean([kid.stderr or 0 for kid in apart]) == pytest.approx(spread, rel=1 / 3)


def test_too_few_images() -> None:
    """Invariant: both numbers in the message."""
    with pytest.raises(ValueError, match=f"drawn images: .* at least {2 * N_BLOCK} images of each kind, got 39"):
        kernel_distance(draw(100), draw(39))


def test_frechet_distance_is_the_closed_form() -> None:
    """Closed form: Gaussians with diagonal covariances, (μ - μ')² + (σ - σ')² in each direction, from the sets' own
    moments; and fewer images than features, where equal sets are at distance 0."""
    wide = draw(400, 3, seed=2)
    white = torch.linalg.inv(torch.linalg.cholesky(torch.cov(wide.T)))
    exact = (wide - wide.mean(0)) @ white.T  # mean 0, covariance I
    real = exact * torch.tensor([1.0, 2.0, 3.0]).double()
    drawn = exact * torch.tensor([4.0, 2.0, 1.0]).double() + torch.tensor([0.0, 1.0, 2.0]).double()
    assert frechet_distance(real, drawn) == pytest.approx(9 + 0 + 4 + 1 + 4, rel=1e-9)
    few = draw(20, 64)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)


def test_precision_and_recall_of_known_sets() -> None:
    """By hand: of identical sets 1 and 1, of distant ones 0 and 0; of half of the modes: all precise, half recalled."""
    real = draw(80)
    assert [number.value for number in precision_and_recall(real, real)] == [1, 1]
    assert [number.value for number in precision_and_recall(real, real + 1000)] == [0, 0]
    other = draw(80, seed=1) + 1000
    modes, one = torch.cat([real[:40], other[:40]]), torch.cat([real[:40], real[:40] + 1e-3])
    precision, recall = precision_and_recall(modes, one)
    assert (precision.value, recall.value) == (1, 0.5)
    assert recall.interval is not None
    assert recall.n == 80


def test_precision_is_the_papers_definition() -> None:
    """Oracle: Kynkäänniemi et al. 2019, Algorithm 1, image by image."""
    real, drawn = draw(50, 3), draw(60, 3, seed=1, scale=1.5)
    radii = [sorted(float((x - y).norm()) for y in real)[3] for x in real]  # the first is the distance to itself
    inside = [any(float((x - y).norm()) <= radius for y, radius in zip(real, radii, strict=True)) for x in drawn]
    assert 0 < np.mean(inside) < 1
    assert precision_and_recall(real, drawn)[0].value == np.mean(inside)


def test_copies_are_memorised() -> None:
    """Invariants: the excess of copies is 1, of half copies a half, of fresh images 0 within its interval, whatever
    the numbers of training and held-out images; copies are at distance 0, and have themselves as nearest."""
    training, held_out, fresh = draw(600), draw(150, seed=1), draw(400, seed=2)
    copies = memorisation_numbers(training[:400], training=training, held_out=held_out)
    assert (copies["nearest_in_train"].value, copies["nearest_excess"].value) == (1, 1)
    assert copies["nearest_distance_ratio"].value == 0
    half = memorisation_numbers(torch.cat([training[:200], fresh[:200]]), training=training, held_out=held_out)
    none = memorisation_numbers(fresh, training=training, held_out=held_out)
    for numbers, share in ((half, 0.5), (none, 0.0)):
        low, high = numbers["nearest_excess"].interval or (1, 0)
        assert low < share < high
    assert none["nearest_in_train"].value == pytest.approx(0.8, abs=0.06)
    assert none["nearest_distance_ratio"].value == pytest.approx(1, abs=0.05)
    distances, rows = find_nearest_images(training[:5], training, k=2)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert distances[:, 0].tolist() == [0] * 5
    assert (distances[:, 1] > 1).all()
