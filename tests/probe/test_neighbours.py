"""Neighbours by cosine similarity and their vote, by brute force and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from igpt.probe import neighbours
from igpt.probe.neighbours import classify_by_neighbours, find_nearest, find_nearest_centred


def test_nearest_is_the_largest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By brute force: one row after another, in parts or whole; of equal rows the first comes first."""
    monkeypatch.setattr(neighbours, "AT_ONCE", 7)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 5)).astype(np.float16)
    features[31], features[12], features[20] = 2 * features[4], features[4], 0
    query = features[4].astype(np.float32) + 0.1
    by_hand = []
    for row in features.astype(np.float64):
        length = np.sqrt((row**2).sum() * (query.astype(np.float64) ** 2).sum())
        by_hand.append((row * query).sum() / length if length else 0.0)
    rows, cosines = find_nearest(features, query, k=6)
    assert sorted(rows[:3].tolist()) == [4, 12, 31]
    assert rows.tolist() == sorted(range(50), key=lambda i: (-round(by_hand[i], 12), i))[:6]
    assert cosines == pytest.approx(np.array(by_hand)[rows], abs=1e-12)


def test_the_vote_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: scikit-learn's weighted k-NN on centred features, in parts as at once."""
    monkeypatch.setattr(neighbours, "MOST_COSINES", 1000)
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=300)
    train = (rng.normal(size=(300, 6)) + labels[:, None] + 50).astype(np.float16)  # one large common component
    queries = (rng.normal(size=(90, 6)) + rng.integers(4, size=90)[:, None] + 50).astype(np.float16)
    mean = train.astype(np.float64).mean(0)

    def vote(distances: np.ndarray) -> np.ndarray:  # scikit-learn's are 1 - cosine
        return np.exp((1 - distances) / 0.07)

    judge = KNeighborsClassifier(n_neighbors=20, metric="cosine", weights=vote).fit(train - mean, labels)
    given = torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(queries)
    predicted = classify_by_neighbours(*given, k=20, n_class=4)
    assert predicted.tolist() == judge.predict(queries - mean).tolist()
    rows, cosines = find_nearest_centred(given[0], given[2], k=20)
    distances, by_judge = judge.kneighbors(queries - mean)
    assert [set(row) for row in rows.tolist()] == [set(row) for row in by_judge.tolist()]
    np.testing.assert_allclose(cosines, 1 - distances, atol=1e-5)
    plain = KNeighborsClassifier(n_neighbors=20, metric="cosine", weights=vote).fit(train, labels)
    assert (plain.predict(queries) != judge.predict(queries)).mean() > 0.1  # centring matters
