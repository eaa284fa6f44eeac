"""Few labels: what is drawn, what is chosen by what, and the mean and spread of the subsets."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from igpt.checkpoint.find import find_weights
from igpt.data.source import ArraySplit
from igpt.data.split import balanced_subset
from igpt.metric.result import Result
from igpt.model.features import layer_features
from igpt.probe import selection
from igpt.probe.lbfgs import TOLERANCE, logistic_regression
from igpt.tokens.palette import Palette
from tests.task.conftest import Arrays, Lab


def few_labels(lab: Lab, pretrained: Path, folder: Path, **changed: Any) -> Result:
    settings: dict[str, Any] = {
        "per_class": [4],
        "subsets": 3,
        "subset_seed": 7,
        "norm": "ln_1",
        "dtype": "float32",
        "batch_size": 64,
        "C_grid": [1.0],
        "layer": 1,
        "eval_masks": 1,
        "baselines": ["pixels"],
        "split": "test",
    }
    return lab.execute("low_data", folder, find_weights(str(pretrained)), **{**settings, **changed})


def test_mean_and_deviation_are_those_of_scikit_learn_on_the_same_subsets(
    tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path
) -> None:
    """Independent source: scikit-learn's logistic regression and numpy's standard deviation; with one C to take."""
    lab = Lab(few, palette)
    result = few_labels(lab, pretrained, tmp_path)
    net, train, test = find_weights(str(pretrained)).net(), few.split("train"), few.split("test")
    x, judged = (
        layer_features(net, lab.tokens().encode(_tensor(split)))[1].detach().numpy() for split in (train, test)
    )
    of_pixels = [split.pixels.reshape(len(split), -1) / 127.5 - 1 for split in (train, test)]
    for key, (a, b) in {"accuracy": (x, judged), "raw_pixels": of_pixels}.items():
        shares = []
        for i in range(3):
            rows = balanced_subset(train.labels, per_class=4, seed=7 + i, where="")
            assert np.bincount(train.labels[rows]).tolist() == [4] * 10
            head = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(a[rows], train.labels[rows])
            shares.append(head.score(b, test.labels))
        number = result.numbers[f"test/{key}_4_per_class"]
        assert number.value == pytest.approx(np.mean(shares), abs=1e-9)
        assert number.deviation == pytest.approx(np.std(shares, ddof=1), abs=1e-9)
        assert (number.n, number.features) == (3, "layer 1" if key == "accuracy" else "raw pixels")
    assert result.provenance["layer_chosen_by"] == "given"
    assert 0 < result.provenance["suboptimality"] <= TOLERANCE


def test_fits_that_do_not_converge_are_named(
    tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant: the provenance names each subset's search and final head, and the search of the layer."""
    monkeypatch.setattr(selection, "logistic_regression", partial(logistic_regression, max_iterations=0))
    result = few_labels(Lab(few, palette), pretrained, tmp_path, layer=None, subsets=2, baselines=[])
    names = {line.partition(", layer")[0] for line in result.provenance["not_converged"]}
    of_subsets = {f"features, 4 labels a class, subset {i}, {fit}" for i in (0, 1) for fit in ("folds", "final")}
    assert names == {"all labels"} | of_subsets


def _tensor(split: ArraySplit) -> Any:
    import torch

    return torch.from_numpy(split.pixels)


def test_no_label_but_the_drawn_ones_is_used(tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path) -> None:
    """Invariant: with all other training images and the labels of val changed, and the layer given, numbers stay."""
    plain = few_labels(Lab(few, palette), pretrained, tmp_path / "a", C_grid=[0.01, 1.0, 100.0])
    train, val = few.split("train"), few.split("val")
    drawn = np.unique([balanced_subset(train.labels, per_class=4, seed=7 + i, where="") for i in range(3)])
    other = train.labels.copy()
    others = np.setdiff1d(np.arange(len(other)), drawn)
    rng = np.random.default_rng(0)
    # the draw itself looks at all labels, so of images that no subset holds the pixels are changed instead
    pixels = train.pixels.copy()
    pixels[others] = rng.integers(0, 256, pixels[others].shape)
    changed = Arrays(
        {
            "train": ArraySplit(pixels, other),
            "val": ArraySplit(val.pixels, rng.permutation(val.labels)),
            "test": few.split("test"),
        }
    )
    again = few_labels(Lab(changed, palette), pretrained, tmp_path / "b", C_grid=[0.01, 1.0, 100.0])
    assert again.numbers == plain.numbers


def test_the_layer_is_that_of_a_probe_with_all_labels(
    tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path
) -> None:
    """Round trip: the layer that task=probe finds best on val; the result says how it was chosen."""
    lab = Lab(few, palette)
    found = few_labels(lab, pretrained, tmp_path / "a", layer=None, baselines=[], C_grid=[1.0, 0.01])
    probe = lab.probe(tmp_path / "b", find_weights(str(pretrained)), test=False, C_grid=[1.0, 0.01])
    assert found.numbers["probe/layer"].value == probe.numbers["probe/layer"].value
    assert found.provenance["layer_chosen_by"] == "probe with 200 labels, on val"


def test_more_labels_than_there_are(tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path) -> None:
    """Invariant: found before a feature is computed, naming the class."""
    with pytest.raises(ValueError, match=r"class \d has \d+ images, task.per_class=25 are asked for"):
        few_labels(Lab(few, palette), pretrained, tmp_path, per_class=[25])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_class": [1]}, r"task\.per_class\.0 must be at least 2, got 1"),
        ({"per_class": []}, r"task\.per_class must be a list of at least 1"),
        ({"subsets": 1}, r"task\.subsets must be at least 2"),
        ({"C_grid": [0.0]}, r"task\.C_grid\.0 must be at least 1e-100, got 0"),
        ({"norm": "ln_2"}, "task.norm must be one of"),
        ({"layer": 3}, r"must lie in 0 … 2"),
    ],
)
def test_bad_settings(
    tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path, changed: dict[str, Any], message: str
) -> None:
    """Invariant: clear errors."""
    with pytest.raises(ValueError, match=message):
        few_labels(Lab(few, palette), pretrained, tmp_path, **changed)
