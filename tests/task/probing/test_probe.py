"""Linear probes: one pass, kept on disk; accuracies against scikit-learn's and plain PyTorch's; both solvers."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from igpt.checkpoint.igpt_format import Weights
from igpt.data.source import ArraySplit
from igpt.metric.result import Result
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.probe import selection
from igpt.probe.lbfgs import TOLERANCE, logistic_regression
from igpt.probe.selection import assign_folds
from igpt.run.targets import task_settings
from igpt.settings.fields import format_setting
from igpt.task.class_score import check_classes
from igpt.tokens.palette import Palette
from tests.task.conftest import PROBE, SGD, SIZES, Arrays, Lab, check_bad_settings
from tests.task.probing.conftest import MASKED, features, kept_features, labels, perturbed, save_state

STRENGTHS = [10.0, 0.1]
OF_TRAIN, OF_VAL, OF_TEST = 1.01 / 200, 1.01 / 60, 1.01 / 100  # one image: two solvers end a little apart


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, few: Arrays, palette: Palette, ar: Weights) -> tuple[Path, Result]:
    """A probe with plain settings, its features left on disk."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, Lab(few, palette).probe(folder, ar)


def sklearn(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, tol=1e-7, max_iter=5000)


@pytest.mark.parametrize("refit", [True, False])
def test_every_accuracy_is_that_of_scikit_learn(
    tmp_path: Path, lab: Lab, ar: Weights, probed: tuple[Path, Result], refit: bool
) -> None:
    """Independent source: scikit-learn on the features of one plain pass: every layer, the choice, test, the file."""
    result = lab.probe(tmp_path, ar, refit=refit, cache=probed[0] / "cache")
    x = {split: features(lab, ar.net(), split) for split in ("train", "val", "test")}
    y = {split: labels(lab, split) for split in x}
    table = np.array(
        [
            [sklearn(c).fit(x["train"][layer], y["train"]).score(x["val"][layer], y["val"]) for c in STRENGTHS]
            for layer in range(3)
        ]
    )
    numbers = {name: number.value for name, number in result.numbers.items()}
    best, c = int(numbers["probe/layer"]), numbers["probe/C"]
    assert table.max() - table.min() > 0.1  # or any choice would do
    assert result.curves["probe, val"].y == pytest.approx(table.max(axis=1), abs=OF_VAL)
    assert table[best, STRENGTHS.index(c)] >= table.max() - OF_VAL
    assert numbers["val/accuracy"] == pytest.approx(table.max(), abs=OF_VAL)
    assert numbers["val/embedding"] == pytest.approx(table[0].max(), abs=OF_VAL)
    assert numbers["val/last_layer"] == pytest.approx(table[2].max(), abs=OF_VAL)
    seen = ("train", "val") if refit else ("train",)
    fit = sklearn(c).fit(np.concatenate([x[s][best] for s in seen]), np.concatenate([y[s] for s in seen]))
    assert numbers["test/accuracy"] == pytest.approx(fit.score(x["test"][best], y["test"]), abs=OF_TEST)
    top = np.argsort(fit.predict_proba(x["test"][best]), axis=1)[:, -5:]
    assert numbers["test/top_5"] == pytest.approx((top == y["test"][:, None]).any(axis=1).mean(), abs=OF_TEST)
    head = load_file(tmp_path / "probe.safetensors")
    predictions = (x["test"][best] @ head["weight"].numpy().T + head["bias"].numpy()).argmax(axis=1)
    assert numbers["test/accuracy"] == (predictions == y["test"]).mean()
    with safe_open(tmp_path / "probe.safetensors", "pt") as file:
        assert json.loads(file.metadata()["probe"])["layers"] == [best]
    matrix = result.matrices["confusion"]
    assert result.class_names == {"confusion": tuple("0123456789")}
    assert matrix.sum(axis=1).tolist() == np.bincount(y["test"], minlength=10).tolist()
    assert np.trace(matrix) == round(100 * numbers["test/accuracy"])
    assert result.provenance["refitted_on_val"] is refit


def test_fits_that_do_not_converge_are_named(
    tmp_path: Path, lab: Lab, ar: Weights, probed: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant: the provenance of a result holds the largest bound, and names each fit above the tolerance."""
    assert 0 < probed[1].provenance["suboptimality"] <= TOLERANCE
    assert "not_converged" not in probed[1].provenance
    monkeypatch.setattr(selection, "logistic_regression", partial(logistic_regression, max_iterations=0))
    cache = probed[0] / "cache"
    result = lab.probe(tmp_path, ar, cache=cache, concat_layers=3, baselines=["untrained", "pixels"], test=False)
    names = [line.partition(",")[0] for line in result.provenance["not_converged"]]
    counts = {"probe": 6, "concatenated": 2, "untrained": 6, "raw pixels": 2, "final": 1}  # layers × strengths
    assert {name: names.count(name) for name in names} == counts
    assert result.provenance["suboptimality"] > TOLERANCE


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_layer(tmp_path: Path, lab: Lab, ar: Weights, probed: tuple[Path, Result], layer: int) -> None:
    """Invariant: where it is given, its own best is reported, whatever the others reach."""
    result = lab.probe(tmp_path, ar, layer=layer, cache=probed[0] / "cache", test=False)
    assert result.numbers["probe/layer"].value == layer
    assert result.numbers["val/accuracy"].value == result.curves["probe, val"].y[layer]
    assert result.provenance["layers"] == [layer]
    assert result.curves == probed[1].curves


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
@pytest.mark.parametrize("layer", [-1, 3, 1.0, 1.5, "first", True])
def test_a_layer_that_is_not_there(tmp_path: Path, lab: Lab, ar: Weights, layer: Any, solver: str) -> None:
    """Invariant: what is accepted is said."""
    expected = (
        r"lie in 0 … 2 \(0: the embedding\), or be last or" if layer == 3 else "be a layer's number .*, last, or null"
    )
    with pytest.raises(ValueError, match=rf"task\.layer must {expected}.*, got {format_setting(layer)}"):
        lab.probe(tmp_path, ar, layer=layer, solver=solver)


@pytest.mark.parametrize(("named", "layer"), [("last", 2), (0.5, 1), (0.9, 2), (0.2, 0)])
def test_a_layer_by_its_depth(
    tmp_path: Path, lab: Lab, ar: Weights, probed: tuple[Path, Result], named: Any, layer: int
) -> None:
    """By hand: of layers 0 to 2, the nearest; its numbers are those of the layer by its number."""
    results = [lab.probe(tmp_path, ar, layer=each, cache=probed[0] / "cache") for each in (named, layer)]
    assert results[0].numbers == results[1].numbers
    assert results[0].provenance["layers"] == [layer]


@pytest.mark.parametrize(("layer", "shifted"), [("last", True), (1, False)])
@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_window_off_its_centre_is_said(
    tmp_path: Path, lab: Lab, ar: Weights, probed: tuple[Path, Result], caplog: pytest.LogCaptureFixture,
    layer: Any, shifted: bool, solver: str,
) -> None:  # fmt: skip
    """By hand: three of layers 0 to 2 around the last one, and around the middle one."""
    result = lab.probe(
        tmp_path,
        ar,
        layer=layer,
        concat_layers=3,
        solver=solver,
        test=False,
        cache=probed[0] / "cache",
        sgd={"steps": 2},
    )
    expected = "layers 0+1+2 are not centred on layer 2, as the paper's are: 2 below it and 0 above"
    assert result.provenance["layers"] == [0, 1, 2]
    assert [line.startswith(expected) for line in result.warnings] == [True] * shifted
    assert (expected in caplog.text) == shifted


def test_the_best_layer_and_the_fall_after_it(lab: Lab, ar: Weights, probed: tuple[Path, Result]) -> None:
    """Independent source: scikit-learn's predictions on val, each layer at its best C; resampled by numpy."""
    x, y = (features(lab, ar.net(), split) for split in ("train", "val")), [labels(lab, s) for s in ("train", "val")]
    train, val = x
    right = []
    for layer in range(3):
        fits = [sklearn(c).fit(train[layer], y[0]).predict(val[layer]) == y[1] for c in sorted(STRENGTHS)]
        right.append(max(fits, key=np.sum))
    drawn = np.random.default_rng(1).integers(60, size=(4000, 60))
    shares = np.array(right)[:, drawn].mean(axis=2)  # (3, 4000)
    low, high = np.quantile(shares.argmax(axis=0), [0.025, 0.975])
    number, curve = probed[1].numbers["probe/layer"], probed[1].curves["probe, val"]
    assert number.interval == curve.best == (low, high)
    assert number.n == 60
    fall = probed[1].numbers["val/fall_to_last_layer"]
    assert fall.value == pytest.approx(max(curve.y) - curve.y[-1], abs=1e-9)
    assert "untrained network, val" not in probed[1].curves or probed[1].curves["untrained network, val"].best is None


def test_layers_together(tmp_path: Path, lab: Lab, ar: Weights, probed: tuple[Path, Result]) -> None:
    """Independent source: scikit-learn on all three layers side by side, on val and, refitted, on test."""
    result = lab.probe(tmp_path, ar, concat_layers=3, cache=probed[0] / "cache")
    x = {s: np.concatenate(features(lab, ar.net(), s), axis=1) for s in ("train", "val", "test")}
    y = {split: labels(lab, split) for split in x}
    shares = [sklearn(c).fit(x["train"], y["train"]).score(x["val"], y["val"]) for c in STRENGTHS]
    assert result.numbers["val/accuracy"].value == pytest.approx(max(shares), abs=OF_VAL)
    assert (probed[1].curves["chance"].x, probed[1].curves["chance"].y) == ([0, 2], [0.1, 0.1])
    alone = probed[1].numbers["val/accuracy"]
    assert result.numbers["val/best_layer"] == alone
    assert alone.features == f"layer {probed[1].provenance['layers'][0]}"
    together = {key for key, number in result.numbers.items() if number.features == "layers 0, 1, 2"}
    assert together == {"val/accuracy", "test/accuracy", "test/top_5", "test/calibration_error"}
    assert all(number.features for number in result.numbers.values() if number.unit == "share")
    fit = sklearn(result.provenance["C"])
    fit = fit.fit(np.concatenate([x["train"], x["val"]]), np.concatenate([y["train"], y["val"]]))
    assert result.numbers["test/accuracy"].value == pytest.approx(fit.score(x["test"], y["test"]), abs=OF_TEST)
    assert result.provenance["layers"] == [0, 1, 2]
    assert load_file(tmp_path / "probe.safetensors")["weight"].shape == (10, 3 * 16)
    with pytest.raises(ValueError, match=r"task\.concat_layers=5: the network has 3 layers to take together"):
        lab.probe(tmp_path, ar, concat_layers=5)


def test_folds_look_at_train_alone(
    tmp_path: Path, lab: Lab, few: Arrays, ar: Weights, probed: tuple[Path, Result], caplog: pytest.LogCaptureFixture
) -> None:
    """Independent source: scikit-learn's cross-validation. Invariant: a source without val will do.

    `auto` is that where training images were cut down, here to no less than three of a class; no refit then, and said.
    """
    lab.digits = replace(few, splits={name: few.splits[name] for name in ("train", "test")})
    result = lab.probe(
        tmp_path / "a", ar, folds=3, refit=False, baselines=["untrained", "pixels"], cache=probed[0] / "cache"
    )
    x, y = features(lab, ar.net(), "train"), labels(lab, "train")
    folds = PredefinedSplit(assign_folds(y, 3, seed=0))
    table = [[(cross_val_predict(sklearn(c), of, y, cv=folds) == y).mean() for c in STRENGTHS] for of in x]
    assert result.curves["probe, cv"].y == pytest.approx([max(row) for row in table], abs=OF_TRAIN)
    assert result.numbers["cv/accuracy"].n == 200
    assert not [name for name in [*result.numbers, *result.curves] if "val" in name]
    lab.digits = replace(lab.digits, labels_per_class=3)
    again = lab.probe(tmp_path / "b", ar, folds="auto", refit=True, cache=probed[0] / "cache").numbers
    assert "data.labels_per_class=3 limits labels" in caplog.text
    assert again == {name: result.numbers[name] for name in again}
    heads = [(tmp_path / name / "probe.safetensors").read_bytes() for name in ("a", "b")]
    assert heads[0] == heads[1]


def test_what_it_has_to_beat(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Independent source: scikit-learn on the pixels, and on the features of a network that was only drawn."""
    result = lab.probe(tmp_path, ar, baselines=["untrained", "pixels"])
    y, splits = labels(lab, "train"), ("train", "val")
    fresh = GPT(GPTConfig(**SIZES))
    fresh.init_weights(0)
    of_fresh = [features(lab, fresh, split) for split in splits]
    best = [
        max(sklearn(c).fit(a, y).score(b, labels(lab, "val")) for c in STRENGTHS)
        for a, b in zip(*of_fresh, strict=True)
    ]
    assert result.curves["untrained network, val"].y == pytest.approx(best, abs=OF_VAL)
    assert result.numbers["val/untrained"].value == pytest.approx(max(best), abs=OF_VAL)
    raw = [lab.digits.split(split).pixels.reshape(-1, 192) / 127.5 - 1 for split in splits]
    share = max(sklearn(c).fit(raw[0], y).score(raw[1], labels(lab, "val")) for c in STRENGTHS)
    assert result.numbers["val/raw_pixels"].value == pytest.approx(share, abs=OF_VAL)
    assert result.curves["raw pixels, val"].x == [0.0, 2.0]


def test_the_untrained_network_reads_this_runs_colours(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Invariant: with one cache, weights of another palette get the untrained network of their own tokens."""
    how: dict[str, Any] = {"baselines": ["untrained"], "test": False, "C_grid": [10.0]}
    lab.probe(tmp_path, ar, **how)
    lab.palette = Palette(lab.palette.centres[np.random.default_rng(0).permutation(17)].copy())
    other = save_state(tmp_path / "other", lab, perturbed(ar))
    shared = lab.probe(tmp_path, other, **how)
    alone = lab.probe(tmp_path / "alone", other, **how)
    assert shared.curves["untrained network, val"] == alone.curves["untrained network, val"]


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_test_is_not_read(
    tmp_path: Path,
    lab: Lab,
    few: Arrays,
    ar: Weights,
    probed: tuple[Path, Result],
    sgd: tuple[Path, Result],
    solver: str,
) -> None:
    """Invariant: without `test`, a source that has no such split will do; asked for, it is read."""
    expected = (probed if solver == "lbfgs" else sgd)[1].numbers
    lab.digits = replace(few, splits={name: few.splits[name] for name in ("train", "val")})
    result = lab.probe(tmp_path / "part", ar, solver=solver, test=False)
    left = {name: number for name, number in expected.items() if not name.startswith("test/")}
    assert result.numbers == left
    assert len(expected) > len(left)
    assert result.matrices == {}
    with pytest.raises(KeyError, match="test"):
        lab.probe(tmp_path / "asked", ar, solver=solver)


def without_class(of: ArraySplit, label: int) -> ArraySplit:
    return ArraySplit(of.pixels[of.labels != label], of.labels[of.labels != label])


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("class", "class 7 is in val, but no image of it is in train"),
        ("class in test", "class 7 is in test, but no image of it is in train"),
        ("none", r"data=few has no labels \(data\.n_class=null\)"),
        ("some", "some images have no label, a probe needs them all"),
        ("val", r"few has no images in its val split: .*data\.val_fraction above 0"),
    ],
)
def test_labels_that_cannot_be_learnt(
    tmp_path: Path, lab: Lab, few: Arrays, ar: Weights, fault: str, message: str, solver: str
) -> None:
    parts = dict(few.splits)
    if fault.startswith("class"):
        parts["train"] = without_class(parts["train"], 7)
    if fault == "class in test":
        parts["val"] = without_class(parts["val"], 7)
    if fault == "some":
        parts["train"] = replace(parts["train"], labels=np.where(np.arange(200) == 9, -1, parts["train"].labels))
    if fault == "val":
        parts["val"] = ArraySplit(parts["val"].pixels[:0], parts["val"].labels[:0])
    lab.digits = replace(few, splits=parts, n_class=None if fault == "none" else 10)
    with pytest.raises(ValueError, match=message):
        lab.probe(tmp_path, ar, solver=solver)


def test_classes_that_are_in_train_alone(few: Arrays) -> None:
    """By hand: that is no fault; the number of classes is the source's."""
    parts = few.splits | {"val": without_class(few.splits["val"], 7)}
    assert check_classes(replace(few, splits=parts), ["val"]) == 10


def test_masks_are_of_the_seed_alone(tmp_path: Path, lab: Lab, bert: Weights) -> None:
    """Invariants: other batches, the same masks and, to one image, votes; another seed or mask shows other pixels."""
    kept, numbers = [], []
    for batch_size, seed in ((64, 0), (23, 0), (64, 1)):
        folder = tmp_path / f"{batch_size} {seed}"
        result = lab.probe(folder, bert, objective=MASKED, eval_masks=2, batch_size=batch_size, seed=seed)
        kept.append({name: np.load(folder / "cache" / "features" / name) for name in kept_features(folder)})
        numbers.append(result.numbers)
    assert kept[0].keys() == kept[1].keys()
    assert max(np.abs(kept[1][name] - values).max() for name, values in kept[0].items()) < 1e-5
    for name in ("val/accuracy", "val/accuracy_one_mask", "test/accuracy", "test/accuracy_one_mask"):
        assert numbers[1][name].value == pytest.approx(numbers[0][name].value, abs=OF_VAL)
    of_train = [values for features in kept[::2] for name, values in features.items() if "-train-" in name]
    of_masks = [values for name, values in kept[0].items() if "-val-" in name]
    for one, other in (of_train, of_masks):
        assert np.abs(one - other).max() > 0.01


def test_the_vote_by_hand(tmp_path: Path, lab: Lab, bert: Weights) -> None:
    """Independent source: the kept head on plain passes under each of five masks; only ties are left to the draw."""
    result = lab.probe(tmp_path, bert, objective=MASKED)
    head = load_file(tmp_path / "probe.safetensors")
    (layer,) = result.provenance["layers"]
    predictions = np.stack(
        [
            (features(lab, bert.net(), "test", objective=MASKED, mask=mask)[layer] @ head["weight"].numpy().T
             + head["bias"].numpy()).argmax(axis=1)
            for mask in range(5)
        ]
    )  # fmt: skip
    y = labels(lab, "test")
    counts = (predictions[:, :, None] == np.arange(10)).sum(axis=0)  # (N, K)
    leads = counts == counts.max(axis=1, keepdims=True)
    surely = leads[np.arange(100), y] & (leads.sum(axis=1) == 1)
    assert result.numbers["test/accuracy_one_mask"].value == (predictions[0] == y).mean()
    accuracy = result.numbers["test/accuracy"].value
    assert surely.mean() <= accuracy <= leads[np.arange(100), y].mean()
    assert {"val/accuracy", "val/accuracy_one_mask"} <= set(result.numbers)
    assert len(kept_features(tmp_path)) == 5 + 5 + 1


def test_without_masks_there_is_no_vote(tmp_path: Path, lab: Lab, ar: Weights, bert: Weights) -> None:
    """By hand: an autoregressive network has none, and one mask is no vote: a file for each split."""
    for name, weights, objective, masks in (("ar", ar, AR(), 5), ("one", bert, MASKED, 1)):
        numbers = lab.probe(tmp_path / name, weights, objective=objective, eval_masks=masks).numbers
        assert not [number for number in numbers if "one_mask" in number]
        assert len(kept_features(tmp_path / name)) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": "ln_2"}, r"task\.norm must be one of ln_1, raw, got 'ln_2'"),
        ({"solver": "adam"}, r"task\.solver must be one of lbfgs, sgd, got 'adam'"),
        ({"solver": "sgd", "concat_layers": 3}, r"around which layer: task\.layer=N"),
        ({"solver": "sgd", "folds": 5}, r"task\.folds=null"),
        ({"batch_size": 0}, r"task\.batch_size must be at least 1, got 0"),
        ({"eval_masks": 0}, r"task\.eval_masks must be at least 1, got 0"),
        ({"C_grid": []}, r"task\.C_grid"),
        ({"C_grid": [1.0, 0.0]}, r"task\.C_grid"),
        ({"concat_layers": 1}, r"task\.concat_layers"),
        ({"concat_layers": 4}, r"task\.concat_layers"),
        ({"folds": 1}, r"task\.folds"),
        ({"folds": "all"}, r"task\.folds"),
        ({"sgd": SGD | {"rates": []}}, r"task\.sgd"),
        ({"sgd": SGD | {"rates": [1.0, -1.0]}}, r"task\.sgd"),
        ({"sgd": SGD | {"steps": 0}}, r"task\.sgd"),
        ({"sgd": SGD | {"val_every": 0}}, r"task\.sgd"),
        ({"sgd": SGD | {"momentun": 0.9}}, r"task\.sgd has no setting 'momentun', did you mean momentum\?"),
        ({"sgd": {key: value for key, value in SGD.items() if key != "rates"}}, r"task\.sgd\.rates is not given"),
        ({"sgd": SGD | {"momentum": -0.9}}, r"task\.sgd"),
        ({"sgd": SGD | {"momentum": 1.5}}, r"task\.sgd"),
        ({"sgd": SGD | {"weight_decay": -0.1}}, r"task\.sgd"),
        ({"sgd": SGD | {"search": "both"}}, r"task\.sgd\.search must be one of together, in_turn, got 'both'"),
        ({"sgd": SGD | {"augment": "no"}}, r"task\.sgd\.augment must be true or false"),
        ({"refit": "always"}, r"task\.refit must be true or false or auto"),
    ],
)
def test_bad_settings(changed: dict[str, Any], message: str) -> None:
    for good in ({}, {"solver": "sgd", "layer": 1, "concat_layers": 3}, {"folds": "auto"}):
        assert task_settings("igpt.task.probe.run", PROBE | good)
    check_bad_settings("probe", PROBE, changed, message)
