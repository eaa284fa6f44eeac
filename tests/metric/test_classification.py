"""Shares with their intervals, and the metrics of predicted classes."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, sem
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch import Tensor

from igpt.metric.classification import ClassMetrics
from igpt.metric.share import share_number, wilson_interval


@pytest.mark.parametrize(("n", "right"), [(200, 150), (1000, 31), (60, 7), (14, 0), (14, 14), (1, 0), (1, 1)])
def test_the_interval_is_wilsons(n: int, right: int) -> None:
    """Independent source: scipy's Wilson interval; by hand: share and √(p (1 - p) / n). It has a width at both ends."""
    number = share_number(right / n, n)
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert number.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert number.interval is not None
    assert 0 <= number.interval[0] < number.interval[1] <= 1
    assert number.value == right / n
    assert number.stderr == pytest.approx(math.sqrt(right * (n - right) / n**3))
    assert (number.n, number.unit) == (n, "share")


def test_the_interval_holds_the_mean_of_shares() -> None:
    """Invariant: for a mean over images of shares in [0, 1], it holds the truth in 95 % of trials or more."""
    rng, truth, held = np.random.default_rng(0), 0.1, 0
    for _ in range(500):
        low, high = wilson_interval(float(rng.beta(0.5, 4.5, size=30).mean()), 30)
        held += low <= truth <= high
    assert held >= 0.95 * 500


def draw_scores(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (n, k), labels (n,) that agree with them more often than not, and votes (n,) that often agree."""
    generator = torch.Generator().manual_seed(k)
    scores = 3 * torch.randn(n, k, generator=generator)
    others = torch.randint(k, (2, n), generator=generator)
    labels, votes = (torch.where(torch.rand(n, generator=generator) < 0.6, scores.argmax(1), of) for of in others)
    return scores, labels, votes


def measure(
    scores: Tensor, votes: Tensor, labels: Tensor, *, parts: Sequence[int] | None = None, synced: bool = False
) -> tuple[dict[str, float], np.ndarray]:
    """Values and confusions of `ClassMetrics` that see the images in batches of these sizes."""
    metrics = ClassMetrics(scores.shape[1], has_votes=True, synced=synced)
    for some in zip(*(of.split(list(parts or [len(of)])) for of in (scores, votes, labels)), strict=True):
        metrics.update(*some)
    numbers, matrix = metrics.compute()
    assert {number.n for number in numbers.values()} == {len(labels)}
    return {name: number.value for name, number in numbers.items()}, matrix


@pytest.mark.parametrize("k", [3, 7, 120])
def test_predictions_are_counted(k: int) -> None:
    """Independent source: numpy and scikit-learn, float64 shares to the bit; uneven batches change nothing."""
    scores, labels, votes = draw_scores(500, k)
    numbers, matrix = measure(scores, votes, labels)
    y, answers, first = labels.numpy(), votes.numpy(), scores.argmax(1).numpy()
    assert numbers["accuracy"] == (answers == y).mean() != numbers["accuracy_one_mask"] == (first == y).mean()
    assert numbers["gain_by_vote"] == pytest.approx(numbers["accuracy"] - numbers["accuracy_one_mask"], abs=1e-12)
    assert np.array_equal(matrix, confusion_matrix(y, answers, labels=range(k)))
    if k > 5:
        top_5 = top_k_accuracy_score(y, scores.numpy(), k=5, labels=range(k), normalize=False) / 500
        assert numbers["top_5"] == top_5 > numbers["accuracy_one_mask"]
    assert ("top_5" in numbers) == (k > 5)
    again, same = measure(scores.flip(0), votes.flip(0), labels.flip(0), parts=(1, 64, 300, 135))
    assert again == numbers
    assert np.array_equal(same, matrix)


def test_the_gain_by_the_vote_is_paired() -> None:
    """Independent source: SciPy's standard error of the mean of the images' differences; of one image none."""
    scores, labels, votes = draw_scores(500, 7)
    metrics = ClassMetrics(7, has_votes=True, synced=False)
    metrics.update(scores, votes, labels)
    gain = metrics.compute()[0]["gain_by_vote"]
    differences = (votes == labels).int() - (scores.argmax(1) == labels).int()
    assert gain.stderr == pytest.approx(sem(differences.numpy()), rel=1e-9)
    assert gain.value == pytest.approx(differences.double().mean().item(), abs=1e-12)
    metrics.update(scores[:1], votes[:1], labels[:1])
    assert metrics.compute()[0]["gain_by_vote"].stderr is None


def test_the_calibration_error() -> None:
    """Independent source: the mean over 15 bins of |accuracy - confidence|, by numpy. By hand: 0 and 0.8."""
    scores, labels, votes = draw_scores(500, 7)
    error = measure(scores, votes, labels)[0]["calibration_error"]
    probabilities = np.exp(scores.double().numpy())
    confidence = (probabilities / probabilities.sum(1, keepdims=True)).max(1)
    right = scores.argmax(1).numpy() == labels.numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(right[bins == i].sum() - confidence[bins == i].sum()) for i in range(15)]
    assert error == pytest.approx(sum(gaps) / 500, abs=1e-7)
    assert 0.1 < error < 0.5
    sure = torch.full((10, 5), -1e3).index_fill(1, torch.tensor(2), 1e3)  # with probability 1, which is right twice
    labels = torch.tensor([2, 2, *[1] * 8])
    assert measure(sure, labels, labels)[0]["calibration_error"] == pytest.approx(0.8)
    assert measure(torch.zeros(10, 5), labels, torch.arange(10) % 5)[0]["calibration_error"] == pytest.approx(
        0, abs=1e-7
    )
