"""Which layer and which strength: searches against scikit-learn's, ties, folds, votes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from igpt.data.source import ArraySplit
from igpt.probe import selection
from igpt.probe.feature_files import Features
from igpt.probe.lbfgs import TOLERANCE, logistic_regression
from igpt.probe.selection import (
    Choice,
    FeatureSet,
    GridScores,
    assign_folds,
    fit_head,
    grid_search,
    report_convergence,
    select_best,
    window_around,
)

CPU = torch.device("cpu")
STRENGTHS = [1.0, 0.01, 0.1]  # in no order
N_CLASS, N_TRAIN, N_VAL = 4, 90, 60
OF_VAL, OF_TRAIN = 1.01 / N_VAL, 1.01 / N_TRAIN  # one image: theirs and ours end a little beside the optimum


def make_features(values: np.ndarray, labels: np.ndarray) -> FeatureSet:
    return FeatureSet([Features(values.astype(np.float32), labels)])


@pytest.fixture(scope="module")
def both() -> tuple[FeatureSet, FeatureSet]:
    """Three layers of train and val: six projections of the digits 0 to 3, each layer with more noise."""
    found = load_digits(n_class=N_CLASS)
    generator = np.random.default_rng(0)
    n = N_TRAIN + N_VAL
    layers = np.stack(
        [
            found.data[:n] / 16 @ generator.normal(size=(64, 6)) / 2 + noise * generator.normal(size=(n, 6))
            for noise in (1.5, 0.5, 1.0)
        ]
    )
    labels = found.target[:n].astype(np.int64)
    return make_features(layers[:, :N_TRAIN], labels[:N_TRAIN]), make_features(layers[:, N_TRAIN:], labels[N_TRAIN:])


def scikit_learn(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, tol=1e-8, max_iter=5000)


def values(images: FeatureSet, window: list[int]) -> np.ndarray:
    """The features of some layers, side by side, as numpy sees them: (N, P · C)"""
    return np.concatenate([images.by_mask[0].values[layer] for layer in window], axis=1)


def test_searched_on_val_is_scikit_learn(both: tuple[FeatureSet, FeatureSet]) -> None:
    """Independent source: scikit-learn's accuracy on val for each layer and C, to one image."""
    train, val = both
    table = grid_search(train, val, STRENGTHS, n_class=N_CLASS, device=CPU, seed=0)
    expected = [
        [
            scikit_learn(c).fit(values(train, [layer]), train.labels).score(values(val, [layer]), val.labels)
            for c in STRENGTHS
        ]
        for layer in range(3)
    ]
    assert table.accuracy == pytest.approx(np.array(expected), abs=OF_VAL)
    assert np.array_equal(table.one_mask, table.accuracy)
    assert table.accuracy.max() - table.accuracy.min() > 0.1  # or any table would do
    assert (table.windows, table.C_grid, table.n_image) == ([[0], [1], [2]], STRENGTHS, N_VAL)


def test_searched_with_folds_is_scikit_learn(both: tuple[FeatureSet, FeatureSet]) -> None:
    """Independent source: scikit-learn's cross-validation on the same folds; val is not looked at."""
    train, val = both
    folds = assign_folds(train.labels, 3, seed=0)
    blind = make_features(np.full_like(val.by_mask[0].values, np.nan), val.labels)
    table = grid_search(train, blind, STRENGTHS, n_class=N_CLASS, device=CPU, seed=0, folds=folds)
    for layer in range(3):
        for i, c in enumerate(STRENGTHS):
            predictions = cross_val_predict(
                scikit_learn(c), values(train, [layer]), train.labels, cv=PredefinedSplit(folds)
            )
            assert table.accuracy[layer, i] == pytest.approx(accuracy_score(train.labels, predictions), abs=OF_TRAIN)
    assert table.n_image == N_TRAIN


def test_a_window_is_its_layers_side_by_side(both: tuple[FeatureSet, FeatureSet]) -> None:
    """Independent source: scikit-learn on numpy's concatenation."""
    train, val = both
    windows = [[0, 1, 2], [2, 1, 0], [1, 1, 2]]
    table = grid_search(train, val, STRENGTHS, n_class=N_CLASS, device=CPU, seed=0, windows=windows)
    for row, window in enumerate(windows):
        for i, c in enumerate(STRENGTHS):
            head = scikit_learn(c).fit(values(train, window), train.labels)
            assert table.accuracy[row, i] == pytest.approx(head.score(values(val, window), val.labels), abs=OF_VAL)
    assert table.accuracy[0] == pytest.approx(table.accuracy[1], abs=OF_VAL)  # the same layers


@pytest.mark.parametrize("folded", [False, True])
def test_the_images_that_a_layer_is_right_on(both: tuple[FeatureSet, FeatureSet], folded: bool) -> None:
    """Independent source: scikit-learn's predictions at the best strength of each layer."""
    train, val = both
    folds = assign_folds(train.labels, 3, seed=0) if folded else None
    table = grid_search(train, val, STRENGTHS, n_class=N_CLASS, device=CPU, seed=0, folds=folds)
    assert table.correct is not None
    assert np.allclose(table.correct.mean(axis=1), table.accuracy.max(axis=1))
    for layer in range(3):
        head = scikit_learn(select_best(table, layer=layer).strength)
        x = values(train, [layer])
        if folds is None:
            right = head.fit(x, train.labels).predict(values(val, [layer])) == val.labels
        else:
            right = cross_val_predict(head, x, train.labels, cv=PredefinedSplit(folds)) == train.labels
        assert (table.correct[layer] != right).sum() <= 1


@pytest.mark.parametrize("folded", [False, True])
def test_little_memory_changes_nothing(
    both: tuple[FeatureSet, FeatureSet], monkeypatch: pytest.MonkeyPatch, folded: bool
) -> None:
    """Invariant: layers fitted one after another give the table of all together, to one image."""
    train, val = both
    folds = assign_folds(train.labels, 3, seed=0) if folded else None
    tables, sizes = [], []

    def noted(features: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        sizes.append(len(features))
        return logistic_regression(features, *arguments, **settings)

    monkeypatch.setattr(selection, "logistic_regression", noted)
    for room in (1 << 30, 2 * 4 * N_TRAIN * 6, 1):  # all, two layers, not even one
        monkeypatch.setattr(selection, "CPU_BYTES", room)
        tables.append(grid_search(train, val, STRENGTHS, n_class=N_CLASS, device=CPU, seed=0, folds=folds).accuracy)
    assert sorted(set(sizes)) == [1, 2, 3]
    for table in tables[1:]:
        assert table == pytest.approx(tables[0], abs=OF_VAL)


def test_the_broken_layer_is_named(both: tuple[FeatureSet, FeatureSet], monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is that of the layer, however many are fitted together."""
    train, val = both
    broken = train.by_mask[0].values.copy()
    broken[2, 5, 3] = np.nan
    for room in (1 << 30, 1):
        monkeypatch.setattr(selection, "CPU_BYTES", room)
        with pytest.raises(ValueError, match=r"the features of layer\(s\) 2 hold NaN or infinity"):
            grid_search(make_features(broken, train.labels), val, STRENGTHS, n_class=N_CLASS, device=CPU, seed=0)


def make_scores(accuracy: list[list[float]]) -> GridScores:
    rows = np.array(accuracy)
    return GridScores(rows, rows / 2, [[layer] for layer in range(len(rows))], STRENGTHS, 50)


@pytest.mark.parametrize(
    ("accuracy", "layer", "best"),
    [
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], None, Choice([0], 0.01)),  # all alike
        ([[0.5, 0.1, 0.1], [0.5, 0.5, 0.1]], None, Choice([0], 1.0)),  # the lowest layer, though C is larger
        ([[0.1, 0.1, 0.1], [0.7, 0.2, 0.7]], None, Choice([1], 0.1)),  # the smallest C, though it comes last
        ([[0.1, 0.2, 0.1], [0.3, 0.1, 0.9]], None, Choice([1], 0.1)),
        ([[0.9, 0.2, 0.1], [0.3, 0.3, 0.2]], 1, Choice([1], 0.01)),  # of one layer, best or not
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], None, Choice([0], 0.01)),  # nothing right at all
    ],
)
def test_the_best_and_its_ties(accuracy: list[list[float]], layer: int | None, best: Choice) -> None:
    """By hand: the highest; among equals the lowest layer, then the strongest regularisation."""
    assert select_best(make_scores(accuracy), layer=layer) == best


def test_what_a_table_says() -> None:
    """By hand: √(0.8 · 0.2 / 50); without the vote it is another column; the curve is of each layer's best."""
    table = make_scores([[0.5, 0.1, 0.2], [0.3, 0.4, 0.8]])
    number = table.number(Choice([1], 0.1))
    assert (number.value, number.n, number.unit) == (0.8, 50, "share")
    assert number.stderr == pytest.approx(0.0565685, rel=1e-5)
    assert table.number(Choice([1], 0.1), one_mask=True).value == 0.4
    curve = table.curve()
    assert (curve.x, curve.y, curve.y_unit) == ([0.0, 1.0], [0.5, 0.8], "accuracy")
    wilson = [binomtest(right, 50).proportion_ci(method="wilson") for right in (25, 40)]
    assert curve.y_intervals == [pytest.approx((ends.low, ends.high)) for ends in wilson]


def test_folds_share_every_class_out() -> None:
    """By hand: of 5 folds, each has ⌊n / 5⌋ or ⌈n / 5⌉ images of a class; which ones, the seed says."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [5, 13, 31]))
    folds = assign_folds(labels, 5, seed=0)
    assert folds.shape == labels.shape
    for label in (0, 1, 3):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert set(counts.tolist()) <= {len(labels[labels == label]) // 5, -(-len(labels[labels == label]) // 5)}
    assert np.array_equal(assign_folds(labels, 5, seed=0), folds)
    assert not np.array_equal(assign_folds(labels, 5, seed=1), folds)


def test_a_class_too_small_for_the_folds() -> None:
    with pytest.raises(ValueError, match=r"class 7 has 2 images, too few for task\.folds=3"):
        assign_folds(np.array([0, 0, 0, 7, 7]), 3, seed=0)
    assert sorted(assign_folds(np.array([0, 0, 7, 7]), 2, seed=0).tolist()) == [0, 0, 1, 1]


def test_pixels_as_features() -> None:
    """By hand: 0 is -1, 255 is 1, 51 is -0.6; row by row, channels last."""
    pixels = np.zeros((70, 2, 2, 3), dtype=np.uint8)  # more than one chunk
    pixels[3, 0, 1] = [51, 255, 102]
    pixels[69, 1, 1, 2] = 255
    labels = np.arange(70)
    images = FeatureSet.from_pixels(ArraySplit(pixels, labels))
    array = images.by_mask[0].values
    assert array.shape == (1, 70, 12)
    assert array.dtype == np.float32
    assert array[0, 3].tolist() == pytest.approx([-1, -1, -1, -0.6, 1, -0.2, *[-1] * 6], abs=1e-6)
    assert array[0, 69].tolist() == [*[-1] * 11, 1]
    assert (array[0, 4:69] == -1).all()
    assert np.array_equal(images.labels, labels)
    assert images.n_layer == 1


@pytest.mark.parametrize("window", [[1], [0, 1]])
def test_the_chosen_head(both: tuple[FeatureSet, FeatureSet], window: list[int]) -> None:
    """Independent source: scikit-learn on train and val together."""
    train, val = both
    head = fit_head([train, val], Choice(window, 0.1), n_class=N_CLASS, device=CPU, seed=0)
    x = np.concatenate([values(train, window), values(val, window)])
    expected = scikit_learn(0.1).fit(x, np.concatenate([train.labels, val.labels]))
    predictions, scores = head.predict(val)
    assert (predictions != expected.predict(values(val, window))).sum() <= 1
    probabilities = scores.softmax(dim=-1).numpy()
    assert np.abs(probabilities - expected.predict_proba(values(val, window))).max() < 0.01


@pytest.mark.parametrize(
    ("layer", "size", "window"),
    [(5, 5, [3, 4, 5, 6, 7]), (0, 3, [0, 1, 2]), (1, 5, [0, 1, 2, 3, 4]), (12, 3, [10, 11, 12]), (11, 5, range(8, 13)),
     (6, 13, range(13))],
)  # fmt: skip
def test_windows_by_hand(layer: int, size: int, window: Sequence[int]) -> None:
    """By hand: of layers 0 to 12, centred where there is room."""
    assert window_around(layer, size, 12) == list(window)


def test_masks_vote(both: tuple[FeatureSet, FeatureSet]) -> None:
    """By hand: with two classes and three masks the vote is the median; alone, the first mask counts.

    Of two classes scikit-learn fits one vector where ours are two of half its length: its ½ |w|² is twice theirs.
    """
    train, val = both
    two = make_features(train.by_mask[0].values, train.labels % 2)
    generator = np.random.default_rng(1)
    noisy = [val.by_mask[0].values + 2 * generator.normal(size=val.by_mask[0].values.shape) for _ in range(3)]
    seen = [Features(values.astype(np.float32), val.labels % 2) for values in noisy]
    how: dict[str, Any] = {"n_class": 2, "device": CPU, "seed": 0}
    table = grid_search(two, FeatureSet(seen), STRENGTHS, **how)
    alone = [grid_search(two, FeatureSet([features]), STRENGTHS, **how).accuracy for features in seen]
    assert np.array_equal(table.one_mask, alone[0])
    assert not np.array_equal(table.accuracy, alone[0])
    for layer in range(3):
        for i, c in enumerate(STRENGTHS):
            head = scikit_learn(2 * c).fit(values(two, [layer]), two.labels)
            vote = np.median([head.predict(features.values[layer]) for features in seen], axis=0)
            assert table.accuracy[layer, i] == pytest.approx((vote == val.labels % 2).mean(), abs=OF_VAL)
    best = fit_head([two], Choice([1], 0.1), n_class=2, device=CPU, seed=0)
    predictions, scores = best.predict(FeatureSet(seen))
    assert (predictions == seen[0].labels).mean() == pytest.approx(table.accuracy[1, 2], abs=OF_VAL)
    assert (scores.argmax(dim=-1).numpy() == seen[0].labels).mean() == pytest.approx(table.one_mask[1, 2], abs=OF_VAL)


@pytest.mark.parametrize("folded", [False, True])
def test_fits_that_do_not_converge_are_listed(
    both: tuple[FeatureSet, FeatureSet],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    folded: bool,
) -> None:
    """Invariant: the bounds of all folds and of the final head are reported, each with its layers and C."""
    train, val = both
    how: dict[str, Any] = {"n_class": N_CLASS, "device": CPU, "seed": 0}
    folds = assign_folds(train.labels, 3, seed=0) if folded else None
    table = grid_search(train, val, STRENGTHS, folds=folds, **how)
    assert table.suboptimality is not None
    assert ((table.suboptimality > 0) & (table.suboptimality <= TOLERANCE)).all()
    assert report_convergence({"probe": table}) == {"suboptimality": table.suboptimality.max()}
    assert not caplog.records
    monkeypatch.setattr(selection, "logistic_regression", partial(logistic_regression, max_iterations=0))
    stopped = grid_search(train, val, [1.0, 0.1], folds=folds, windows=[[0, 1], [1, 2]], **how)
    head = fit_head([train], Choice([1], 0.1), **how)
    assert stopped.suboptimality is not None
    gaps = [*stopped.suboptimality.flatten(), float(head.heads.suboptimality)]
    found = report_convergence({"search": stopped, "final": head})
    cells = ["search, layer 0+1, C = 1", "search, layer 0+1, C = 0.1", "search, layer 1+2, C = 1",
             "search, layer 1+2, C = 0.1", "final, layer 1, C = 0.1"]  # fmt: skip
    expected = [f"{cell}: up to {gap:.1e} nats" for cell, gap in zip(cells, gaps, strict=True)]
    assert found == {"suboptimality": max(gaps), "not_converged": expected}
    assert all(line in caplog.text for line in expected)
