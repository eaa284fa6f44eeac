"""Linear probes: one pass, kept on disk; accuracies against scikit-learn's and plain PyTorch's; both solvers."""

import json
import math
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights, save_model
from igpt.data.order import BatchPlan
from igpt.data.source import ArraySplit
from igpt.distributed.signals import StoppedError
from igpt.metric.result import Result
from igpt.model.config import GPTConfig
from igpt.model.features import layer_features
from igpt.model.gpt import GPT, Block
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.probe import selection
from igpt.probe.lbfgs import TOLERANCE, logistic_regression
from igpt.probe.selection import assign_folds
from igpt.run.targets import task_settings
from igpt.settings.fields import format_setting
from igpt.task.class_score import check_classes
from igpt.tokens.palette import Palette
from igpt.training.nan_guard import NonFiniteLossError
from igpt.utils import files, keyed
from tests.checkpoint.test_igpt_format import small_disk
from tests.data.test_damaged_caches import ReadOnlyLock
from tests.task.conftest import PROBE, SGD, SIZES, Arrays, Lab, check_bad_settings, drawn, machine
from tests.task.test_stopping import Send

STRENGTHS = [10.0, 0.1]
MASKED = BERT(mask_probability=0.15)
LN_10 = 2.302585
OF_TRAIN, OF_VAL, OF_TEST = 1.01 / 200, 1.01 / 60, 1.01 / 100  # one image: two solvers end a little apart


@pytest.fixture
def lab(few: Arrays, palette: Palette) -> Lab:
    return Lab(few, palette)


@pytest.fixture(scope="module")
def ar(tmp_path_factory: pytest.TempPathFactory, palette: Palette) -> Weights:
    return drawn(tmp_path_factory.mktemp("ar"), palette, AR())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, palette: Palette) -> Weights:
    return drawn(tmp_path_factory.mktemp("bert"), palette, MASKED)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, few: Arrays, palette: Palette, ar: Weights) -> tuple[Path, Result]:
    """A probe with plain settings, its features left on disk."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, Lab(few, palette).probe(folder, ar)


@pytest.fixture(scope="module")
def sgd(tmp_path_factory: pytest.TempPathFactory, few: Arrays, palette: Palette, ar: Weights) -> tuple[Path, Result]:
    """One with task.solver=sgd, of six steps without a break."""
    folder = tmp_path_factory.mktemp("sgd")
    return folder, Lab(few, palette).probe(folder, ar, solver="sgd")


def features(lab: Lab, net: GPT, split: str, *, objective: Any = None, mask: int = 0, norm: str = "ln_1") -> np.ndarray:
    """All images in one plain pass: (L + 1, N, C)"""
    tokens = lab.tokens().sample_tokens(split).long()
    visible = None
    if objective is not None:
        rng_keys = keyed.per_example_keys(keyed.key(0, split, 0), torch.arange(len(tokens)))
        visible = objective.visible_mask(tokens, keyed.fold_in(rng_keys, 100 + mask) if mask else rng_keys)
    with torch.no_grad():
        return layer_features(net, tokens, visible, norm=norm).numpy()


def labels(lab: Lab, split: str) -> np.ndarray:
    return lab.digits.split(split).labels


def sklearn(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, tol=1e-7, max_iter=5000)


def kept_features(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache" / "features").glob("*.npy") if ".labels." not in path.name)


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


@pytest.mark.parametrize("norm", ["ln_1", "raw"])
def test_what_is_kept_is_a_plain_pass(tmp_path: Path, lab: Lab, ar: Weights, norm: str) -> None:
    """Independent source: the features of one pass over all images, whatever the batches were."""
    lab.probe(tmp_path, ar, norm=norm, batch_size=13)
    for name in kept_features(tmp_path):
        split = name.split("-")[1]
        found = np.load(tmp_path / "cache" / "features" / name)
        assert np.abs(found - features(lab, ar.net(), split, norm=norm)).max() < 1e-5
    assert [name.split("-")[1] for name in kept_features(tmp_path)] == ["test", "train", "val"]


def test_one_pass_for_all_layers_and_none_the_second_time(
    tmp_path: Path, lab: Lab, ar: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: each of 2 blocks sees each of 360 images once; read from disk, the numbers are the same."""
    seen, forward = [], Block.forward

    def noted(self: Block, h: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(h))
        return forward(self, h, *rest)

    monkeypatch.setattr(Block, "forward", noted)
    first = lab.probe(tmp_path, ar)
    assert sum(seen) == 2 * (200 + 60 + 100)

    def refuses(*_: Any) -> None:
        raise KeyError("forward pass")

    monkeypatch.setattr(GPT, "embed", refuses)
    again = lab.probe(tmp_path, ar)
    assert again.numbers == first.numbers
    assert again.curves == first.curves
    with pytest.raises(KeyError):  # so it is noticed
        lab.probe(tmp_path, ar, norm="raw")


@pytest.mark.parametrize("changed", [{"norm": "raw"}, {"dtype": "float16"}, {"seed": 1}, "weights"])
def test_other_features_are_other_files(tmp_path: Path, lab: Lab, ar: Weights, changed: Any) -> None:
    """Invariant: nothing is read that something else has made, and nothing of it is written over."""
    lab.probe(tmp_path, ar, test=False)
    before = kept_features(tmp_path)
    assert len(before) == 2
    if changed == "weights":
        lab.probe(tmp_path, save_state(tmp_path / "other", lab, perturbed(ar)), test=False)
    else:
        lab.probe(tmp_path, ar, test=False, **changed)
    assert len(kept_features(tmp_path)) == 4
    assert set(before) < set(kept_features(tmp_path))


def perturbed(weights: Weights, *, times: float = 1.01) -> dict[str, torch.Tensor]:
    state = weights.net().state_dict()
    return state | {"wte": state["wte"] * times}


def save_state(folder: Path, lab: Lab, state: dict[str, torch.Tensor]) -> Weights:
    save_model(folder / "model", state, lab.metadata()(step=0))
    return find_weights(str(folder))


def test_damaged_features_are_made_anew(
    tmp_path: Path, lab: Lab, ar: Weights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: cut, or with zeros in them, that is said, and the numbers are those of before; also read-only."""
    first = lab.probe(tmp_path, ar)
    short, zeroed = (tmp_path / "cache" / "features" / name for name in kept_features(tmp_path)[1:3])
    short.write_bytes(short.read_bytes()[:1000])
    content = bytearray(zeroed.read_bytes())
    content[2048:] = bytes(len(content) - 2048)
    zeroed.write_bytes(content)
    monkeypatch.setattr(files, "_intact", set())
    assert lab.probe(tmp_path, ar).numbers == first.numbers
    for path in (short, zeroed):
        assert caplog.text.count(f"{path} is made anew: it is damaged") == 1
    monkeypatch.setattr("igpt.data.cache.FileLock", ReadOnlyLock)
    assert lab.probe(tmp_path, ar).numbers == first.numbers
    short.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{short} cannot be written \(Read-only file system\): it is damaged"):
        lab.probe(tmp_path, ar)


def changed_labels(few: Arrays, split: str) -> Arrays:
    of = few.splits[split]
    return replace(few, splits=few.splits | {split: ArraySplit(of.pixels, (of.labels + 1) % 10)})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_other_labels_than_on_disk(tmp_path: Path, lab: Lab, few: Arrays, ar: Weights, split: str) -> None:
    """The file is named, and what to do; once it is removed, the run goes through."""
    lab.probe(tmp_path, ar)
    lab.digits = changed_labels(few, split)
    (name,) = [name for name in kept_features(tmp_path) if f"-{split}-" in name]
    with pytest.raises(ValueError, match=f"the labels of {split} are not those that .*{name} was written with"):
        lab.probe(tmp_path, ar)
    (tmp_path / "cache" / "features" / name).unlink()
    lab.probe(tmp_path, ar)


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


def test_a_full_disk(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """It says what to do, and leaves nothing that takes room."""
    with pytest.raises(ValueError, match=r"cannot be written .*paths\.cache=FOLDER"), small_disk():
        lab.probe(tmp_path, ar)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size] == []
    lab.probe(tmp_path, ar)


def test_features_too_large_for_float16(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """By hand: the streams of an embedding a million times larger, not normed, pass 65,504."""
    large = save_state(tmp_path / "large", lab, perturbed(ar, times=1e8))
    with pytest.raises(ValueError, match=r"layer\(s\) 0, 1, 2 hold NaN or infinity.*task\.dtype=float32"):
        lab.probe(tmp_path, large, norm="raw", dtype="float16")
    assert list((tmp_path / "cache" / "features").glob(".*.part")) == []
    lab.probe(tmp_path, large, norm="raw", dtype="float32", test=False, C_grid=[0.1])


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


# solver=sgd


class LossesOfHeads(L.Callback):
    """Notes the loss of every head before the first step, (L + 1, R)."""

    losses: torch.Tensor

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            scores = pl_module.scores(pl_module.pool_features(batch, 0))
            nats = scores.logsumexp(dim=-1) - scores[..., torch.arange(len(batch.labels)), batch.labels]
            self.losses = nats.mean(dim=-1)


def heads(folder: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds of them."""
    newest = sorted((folder / "checkpoints").glob("step_*.ckpt"))[-1]
    state: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("masks", [False, True])
def test_sgd_begins_at_ln_10(tmp_path: Path, lab: Lab, ar: Weights, bert: Weights, masks: bool) -> None:
    """Independent source: ln 10 = 2.302585, of every head; at the end some head is below it."""
    noted = LossesOfHeads()
    weights, objective = (bert, MASKED) if masks else (ar, AR())
    result = lab.probe(tmp_path, weights, solver="sgd", callbacks=(noted,), objective=objective, test=False)
    assert noted.losses.shape == (3, 2)
    assert noted.losses.flatten().tolist() == pytest.approx([LN_10] * 6, abs=1e-6)
    curve = train_losses(tmp_path)
    assert curve[0] == pytest.approx(LN_10, abs=1e-6)
    assert curve[-1] < LN_10 - 0.01
    assert ("val/accuracy_one_mask" in result.numbers) == masks


def train_losses(folder: Path) -> list[float]:
    newest = sorted((folder / "checkpoints").glob("step_*.ckpt"))[-1]
    return [y for _, y in torch.load(newest, weights_only=True)["history"]["train/loss_clf"]]


def test_sgd_is_plain_momentum_with_a_cosine(lab: Lab, ar: Weights, sgd: tuple[Path, Result]) -> None:
    """Independent source: six steps in numpy, v ← 0.9 v + g, w ← w - η ½ (1 + cos(π s / 6)) v, for every head."""
    folder, result = sgd
    data = lab.tokens(plan=BatchPlan(50, 50))
    batches = [batch for _, batch in zip(range(6), data.train_dataloader(), strict=False)]
    trained = heads(folder)
    net, right = ar.net(), np.zeros((3, 2))
    x_val, y_val = features(lab, net, "val"), labels(lab, "val")
    for r, rate in enumerate((0.1, 1.0)):
        for layer in range(3):
            w, v = np.zeros((17, 10)), np.zeros((17, 10))  # the last row: the bias
            for step, batch in enumerate(batches):
                with torch.no_grad():
                    x = layer_features(net, data.encode(batch.tokens))[layer].double().numpy()
                x = np.concatenate([x, np.ones((50, 1))], axis=1)
                p = np.exp(x @ w)
                p = p / p.sum(axis=1, keepdims=True) - np.eye(10)[batch.labels.numpy()]
                v = 0.9 * v + x.T @ p / 50
                w = w - rate * 0.5 * (1 + math.cos(math.pi * step / 6)) * v
            assert np.abs(trained[f"weights.{r}"][layer].numpy().T - w[:16]).max() < 1e-4
            assert np.abs(trained[f"biases.{r}"][layer].numpy() - w[16]).max() < 1e-4
            predictions = (x_val[layer] @ w[:16] + w[16]).argmax(axis=1)
            right[layer, r] = (predictions == y_val).mean()
    assert result.curves["probe, val"].y == pytest.approx(right.max(axis=1))
    assert result.numbers["val/accuracy"].value == pytest.approx(right.max())
    layer, r = (int(i) for i in np.unravel_index(right.argmax(), right.shape))
    assert (result.numbers["probe/layer"].value, result.numbers["probe/rate"].value) == (layer, (0.1, 1.0)[r])
    head, y = load_file(folder / "probe.safetensors"), labels(lab, "test")
    assert torch.equal(head["weight"], trained[f"weights.{r}"][layer])
    assert torch.equal(head["bias"], trained[f"biases.{r}"][layer])
    scores = features(lab, net, "test")[layer] @ head["weight"].numpy().T + head["bias"].numpy()
    assert result.numbers["test/accuracy"].value == pytest.approx((scores.argmax(axis=1) == y).mean())
    assert result.class_names == {"confusion": tuple("0123456789")}
    top = np.argsort(scores, axis=1)[:, -5:]
    assert result.numbers["test/top_5"].value == pytest.approx((top == y[:, None]).any(axis=1).mean())


@pytest.mark.parametrize("step", [2, 3])
def test_sgd_resumes(tmp_path: Path, lab: Lab, ar: Weights, sgd: tuple[Path, Result], step: int) -> None:
    """Invariant: 3 + 3 steps, or 4 + 2, are six: heads and curves to the bit; the network is not in a checkpoint."""
    with pytest.raises(StoppedError, match=f"after step {step + 1}"):
        lab.probe(tmp_path, ar, solver="sgd", callbacks=(Send(signal.SIGTERM, step=step),))
    for _ in range(2):  # the second time nothing is left to train
        assert lab.probe(tmp_path, ar, solver="sgd").numbers == sgd[1].numbers
        assert train_losses(tmp_path) == train_losses(sgd[0])
        expected = heads(sgd[0])
        assert sorted(expected) == ["biases.0", "biases.1", "weights.0", "weights.1"]
        assert all(torch.equal(value, expected[name]) for name, value in heads(tmp_path).items())


def test_sgd_accumulates(tmp_path: Path, lab: Lab, ar: Weights, sgd: tuple[Path, Result]) -> None:
    """Invariant: passes of 10 images give the heads of one of 50, but for rounding."""
    lab.probe(tmp_path, ar, solver="sgd", test=False, on=machine(micro_batch=10))
    expected = heads(sgd[0])
    for name, value in heads(tmp_path).items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5)


def test_sgd_on_a_window(tmp_path: Path, lab: Lab, ar: Weights, sgd: tuple[Path, Result]) -> None:
    """Independent source: the heads of all three layers side by side, after one step in numpy; one layer is itself."""
    settings: dict[str, Any] = {"solver": "sgd", "layer": 1, "test": False}
    result = lab.probe(tmp_path / "three", ar, **settings, concat_layers=3, sgd={"steps": 1})
    batch = next(iter((data := lab.tokens(plan=BatchPlan(50, 50))).train_dataloader()))
    with torch.no_grad():
        x = np.concatenate(list(layer_features(ar.net(), data.encode(batch.tokens)).numpy()), axis=1)
    gradient = (0.1 - np.eye(10)[batch.labels.numpy()]).T @ x / 50
    assert np.abs(heads(tmp_path / "three")["weights.1"][0].numpy() + 1.0 * gradient).max() < 1e-5
    assert (result.provenance["layers"], result.numbers["probe/layer"].value) == ([0, 1, 2], 1)
    lab.probe(tmp_path / "one", ar, **settings)
    alone, together = heads(tmp_path / "one"), heads(sgd[0])
    assert all(torch.allclose(value, together[name][1:2], atol=1e-6) for name, value in alone.items())


@pytest.fixture
def large(tmp_path: Path, lab: Lab, ar: Weights) -> Weights:
    """A network with features of about 1,000: heads overflow in the first step at a rate of 1e38."""
    return save_state(tmp_path / "large", lab, perturbed(ar, times=1e4))


def test_a_rate_too_high_breaks_its_own_heads_only(tmp_path: Path, lab: Lab, large: Weights) -> None:
    """Invariant: next to heads that overflow, the others are what they are alone; the run ends well and takes one."""
    results = {
        name: lab.probe(tmp_path / name, large, norm="raw", solver="sgd", sgd={"rates": rates}, test=False)
        for name, rates in (("alone", [1e-7, 1e-6]), ("beside", [1e38, 1e-7, 1e-6]))
    }
    trained, expected = heads(tmp_path / "beside"), heads(tmp_path / "alone")
    assert not trained["weights.0"].isfinite().any()
    for r in (0, 1):
        for kind in ("weights", "biases"):
            assert torch.allclose(trained[f"{kind}.{r + 1}"], expected[f"{kind}.{r}"], rtol=1e-4, atol=1e-9)
    assert train_losses(tmp_path / "beside") == pytest.approx(train_losses(tmp_path / "alone"), rel=1e-5)
    for name in ("probe/rate", "probe/layer", "val/accuracy"):
        assert results["beside"].numbers[name] == results["alone"].numbers[name]


def test_all_rates_too_high(tmp_path: Path, lab: Lab, large: Weights) -> None:
    """Then nothing can be told, and that is said, with the setting that can be changed."""
    with pytest.raises(NonFiniteLossError, match=r"task\.sgd\.rates"):
        lab.probe(tmp_path / "run", large, norm="raw", solver="sgd", sgd={"rates": [1e38, 1e38]})


def test_in_turn_a_rate_too_high_is_passed_over(tmp_path: Path, lab: Lab, large: Weights) -> None:
    """Where no head of a rate is finite, the next one is tried; where none of any is, that is an error."""

    def search(name: str, rates: list[float]) -> Result:
        sgd = {"rates": rates, "search": "in_turn"}
        found: Result = lab.probe(tmp_path / name, large, norm="raw", solver="sgd", sgd=sgd, test=False)
        return found

    results = [search(f"{len(rates)}", rates) for rates in ([1e38, 1e-7], [1e-7])]
    assert results[0].provenance["rates"] == [1e38, 1e-7]
    for name in ("probe/rate", "probe/layer", "val/accuracy"):
        assert results[0].numbers[name] == results[1].numbers[name]
    with pytest.raises(NonFiniteLossError, match=r"task\.sgd\.rates"):
        search("none", [1e38, 1e37])


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


def test_the_loss_of_a_batch_is_the_mean(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Independent source: after one step, the loss that is shown is the least cross-entropy of all heads."""
    lab.probe(tmp_path, ar, solver="sgd", sgd={"steps": 2, "checkpoint_every": 1, "val_every": 2}, test=False)
    data = lab.tokens(plan=BatchPlan(50, 50))
    batches = [batch for _, batch in zip(range(2), data.train_dataloader(), strict=False)]
    net, losses = ar.net(), []
    with torch.no_grad():
        for layer in range(3):
            first, second = (layer_features(net, data.encode(batch.tokens))[layer] for batch in batches)
            error = torch.full((50, 10), 0.1) - F.one_hot(batches[0].labels, 10)
            for rate in (0.1, 1.0):
                w, b = -rate * error.T @ first / 50, -rate * error.mean(dim=0)
                losses.append(float(F.cross_entropy(second @ w.T + b, batches[1].labels)))
    assert train_losses(tmp_path)[1] == pytest.approx(min(losses), abs=1e-5)
