"""Neighbours by cosine similarity and their vote, by brute force and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from igpt.probe import neighbours
from igpt.probe.neighbours import classify_by_neighbours, find_nearest, find_neighbours


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


def test_neighbours_and_their_vote_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: scikit-learn's weighted k-NN, and its neighbours of centred features; in parts as at once."""
    monkeypatch.setattr(neighbours, "MOST_COSINES", 1000)
    rng = np.random.default_rng(0)
    labels, of_queries = rng.integers(4, size=300), rng.integers(4, size=90)
    train = (rng.normal(size=(300, 6)) + 2 * np.eye(6)[labels] + 2).astype(np.float16)
    queries = (rng.normal(size=(90, 6)) + 2 * np.eye(6)[of_queries] + 2).astype(np.float16)

    def weigh(distances: np.ndarray) -> np.ndarray:  # scikit-learn's are 1 - cosine
        return np.exp((1 - distances) / 0.07)

    judge = KNeighborsClassifier(n_neighbors=20, metric="cosine", weights=weigh).fit(train, labels)
    given = torch.from_numpy(train), torch.from_numpy(queries)
    predicted = classify_by_neighbours(given[0], torch.from_numpy(labels), given[1], k=20, n_class=4).numpy()
    assert predicted.tolist() == judge.predict(queries).tolist()
    assert 0.6 < (predicted == of_queries).mean() < 1
    mean = train.astype(np.float64).mean(0)
    for centred, less in ((False, 0 * mean), (True, mean)):
        rows, cosines = find_neighbours(*given, k=20, centred=centred)
        distances, by_judge = judge.fit(train - less, labels).kneighbors(queries - less)
        assert [set(row) for row in rows.tolist()] == [set(row) for row in by_judge.tolist()]
        np.testing.assert_allclose(cosines, 1 - distances, atol=1e-5)
