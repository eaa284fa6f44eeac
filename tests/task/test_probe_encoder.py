"""Probes of encoders that are not ours: scikit-learn's accuracy, given features, the cache, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression

from igpt.encoder.backbones import Backbone
from igpt.encoder.find_encoder import find_encoder
from igpt.encoder.given_features import read_given_features
from igpt.metric.result import Result
from igpt.report.folder import RunFolder
from igpt.run.launch import build_components, run
from tests.configs import CONF, built
from tests.encoder.test_backbones import saved

C = 10.0
SETTINGS = (
    "task=probe_encoder", f"task.C_grid=[{C}]", "task.dtype=float32", "task.baselines=[]", "logger=none",
    "data.val_fraction=0.2", "data.test_fraction=0.2",
)  # fmt: skip
OF_TEST = 1.01 / 359  # one image: two solvers end a little apart


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    saved(folder / "resnet-tiny", "resnet")
    return folder


def probed(place: Path, encoder: str, *more: str) -> tuple[Result, Path]:
    given = (f"task.encoder={place / encoder}", f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}")
    result, folder = run(*SETTINGS, *given, *more, conf=CONF)
    assert folder is not None
    return result, folder


@pytest.fixture(scope="module")
def result(place: Path) -> tuple[Result, Path]:
    return probed(place, "resnet-tiny")


@pytest.fixture(scope="module")
def features(place: Path) -> dict[str, np.ndarray]:
    """Features of every split, in its order, as the documentation says to compute them."""
    encoder = find_encoder(str(place / "resnet-tiny"), device=torch.device("cpu"), resolution=8)
    source = build_components(*SETTINGS, conf=CONF).source
    splits = {name: source.split(name) for name in ("train", "val", "test")}
    return {
        name: encoder.encode(torch.from_numpy(split.read(range(len(split)), [0] * len(split)).pixels)).numpy()
        for name, split in splits.items()
    }


def test_accuracy_is_that_of_scikit_learn(result: tuple[Result, Path], features: dict[str, np.ndarray]) -> None:
    """Independent source: scikit-learn on the features of one pass; refitted on train and val before test."""
    source = build_components(*SETTINGS, conf=CONF).source
    y = {name: source.split(name).labels for name in features}
    numbers = {name: number.value for name, number in result[0].numbers.items()}
    fit = LogisticRegression(C=C, tol=1e-7, max_iter=20_000).fit(features["train"], y["train"])
    assert numbers["val/accuracy"] == pytest.approx(fit.score(features["val"], y["val"]), abs=OF_TEST)
    both = [np.concatenate([of["train"], of["val"]]) for of in (features, y)]
    fit = LogisticRegression(C=C, tol=1e-7, max_iter=20_000).fit(*both)
    assert numbers["test/accuracy"] == pytest.approx(fit.score(features["test"], y["test"]), abs=OF_TEST)
    assert 0.2 < numbers["test/accuracy"] < numbers["test/top_5"]
    assert result[0].numbers["test/accuracy"].features == "resnet-tiny"
    assert result[0].matrices["confusion"].sum() == len(y["test"])


def test_the_run_is_named_by_the_encoder(result: tuple[Result, Path]) -> None:
    """By hand; the record says which weights, what was resized, and how pixels were normalised."""
    assert result[1].name.startswith("probe_encoder-resnet-tiny-digits8-none-s0-")
    provenance = RunFolder(result[1]).read_result()["provenance"]
    assert provenance["input"] == "16×16, resized from 8×8, bicubic"
    assert (provenance["width"], provenance["pooling"]) == (12, "pooler")
    assert len(provenance["weights"]) == 64
    assert provenance["mean"] == pytest.approx([102, 127.5, 153])


def test_settings_of_networks_do_not_matter() -> None:
    """Invariant: tokens, model and objective are not read, so they make no other run; the encoder does."""
    name = built("task=probe_encoder").run.name
    assert name.startswith("probe_encoder-lite0-digits8-none-s0-")
    assert built("task=probe_encoder", "model=igpt_s", "objective=bert", "tokens=rgb").run.name == name
    assert built("task=probe_encoder", "task.input_size=64").run.name != name
    with pytest.raises(ValueError, match=r"reads no weights of ours, task\.encoder does: leave init=x out"):
        built("task=probe_encoder", "init=x")


def test_kept_features_are_read_again(
    place: Path, result: tuple[Result, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant: another probe of the same features encodes nothing; a subset of the labels reads its own images."""
    encoded = []
    encode = Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    again, _ = probed(place, "resnet-tiny", f"task.C_grid=[{C},100.0]")
    assert encoded == []
    assert again.numbers["val/accuracy"].value >= result[0].numbers["val/accuracy"].value
    few, _ = probed(place, "resnet-tiny", "data.labels_per_class=3", "task.baselines=[pixels]")
    assert sum(encoded) == 30
    assert {"cv/accuracy", "cv/raw_pixels", "test/accuracy"} <= few.numbers.keys()
    assert few.provenance["chosen_on"] == "3 folds of train"
    assert few.provenance["refitted_on_val"] is False


def test_given_features_give_the_encoders_numbers(
    place: Path, result: tuple[Result, Path], features: dict[str, np.ndarray]
) -> None:
    """Round trip: written from Python in the order of the splits, they give the same numbers."""
    (place / "mine").mkdir()
    for name, values in features.items():
        np.save(place / "mine" / f"{name}.npy", values)
    given, folder = probed(place, "mine")
    assert folder.name.startswith("probe_encoder-mine-digits8-")
    for name, number in result[0].numbers.items():
        assert given.numbers[name].value == pytest.approx(number.value, abs=OF_TEST), name


@pytest.mark.parametrize("kind", ["mine.npy", "mine.safetensors", "all.safetensors"])
def test_features_of_all_splits_in_a_file(tmp_path: Path, features: dict[str, np.ndarray], kind: str) -> None:
    """Round trip: of all splits in turn, or one tensor each."""
    full = np.concatenate(list(features.values()))
    if kind == "mine.npy":
        np.save(tmp_path / kind, full)
    else:
        save_file(features if kind == "mine.safetensors" else {"features": full}, tmp_path / kind)
    counts = {name: len(values) for name, values in features.items()}
    given = read_given_features(str(tmp_path / kind), counts, ["train", "test"])
    assert [*given] == ["train", "test"]
    assert all(np.array_equal(given[name], features[name]) for name in given)


COUNTS = {"train": 6, "val": 3, "test": 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val": np.zeros((4, 5))}, "val: 4 rows, but val has 3 images"),
        ({"test": np.full((2, 5), np.nan)}, "test: row 0 holds NaN or infinity"),
        ({"val": np.array([[0.0], [1e300], [0.0]])}, "val: row 1 holds NaN or infinity"),
        ({"val": np.zeros((3, 4))}, "several widths, {'train': 5, 'val': 4, 'test': 5}"),
        ({"val": np.zeros((3, 5, 1))}, r"val: float64 \(3, 5, 1\), expected numbers of shape \(images, width\)"),
        ({"val": np.array([["a"], ["b"], ["c"]])}, "expected numbers of shape"),
        ({"val": np.zeros((3, 5), ">f4")}, r"val: >f4 \(3, 5\), expected numbers .* in this machine's byte order"),
        ({"val": np.array([[{}], [1], [2]], dtype=object)}, "cannot be read .*Python objects"),
        ({"val": None}, "has no features of val: val.npy in the folder, or a tensor val"),
    ],
)
def test_features_that_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    """Both numbers of images are named, and the row of a NaN; nothing in a file is unpickled."""
    for name, count in COUNTS.items():
        if (values := changed.get(name, np.zeros((count, 5)))) is not None:
            np.save(tmp_path / f"{name}.npy", values)
    with pytest.raises(ValueError, match=message):
        read_given_features(str(tmp_path), COUNTS, list(COUNTS))


def test_one_file_of_all_splits_that_is_refused(tmp_path: Path) -> None:
    """By hand: 6 + 3 + 2 images."""
    np.save(tmp_path / "mine.npy", np.zeros((10, 5)))
    with pytest.raises(ValueError, match=r"10 rows, but train \+ val \+ test have 6 \+ 3 \+ 2 = 11 images"):
        read_given_features(str(tmp_path / "mine.npy"), COUNTS, list(COUNTS))
    np.savez(tmp_path / "arrays.npz", features=np.zeros((11, 5)))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.npy")
    with pytest.raises(ValueError, match=r"arrays\.npy cannot be read \(the magic string is not correct"):
        read_given_features(str(tmp_path / "arrays.npy"), COUNTS, list(COUNTS))
    with pytest.raises(ValueError, match=r"task\.encoder=.*none\.safetensors cannot be read \(there is no such file"):
        read_given_features(str(tmp_path / "none.safetensors"), COUNTS, list(COUNTS))
