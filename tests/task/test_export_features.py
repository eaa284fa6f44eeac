"""Exported features: those that a probe reads, read back as features of an encoder."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from igpt.encoder.given_features import read_given_features
from igpt.probe.feature_files import Features
from igpt.run.launch import run
from igpt.task.export_features import write_layer
from tests.configs import CONF, built, save_small
from tests.data.conftest import class_folders
from tests.task.conftest import check_bad_settings

FEATURES = {"splits": ["val"], "layers": "all", "format": "npy", "norm": "ln_1", "dtype": "float16", "batch_size": 64}
FEW = ("data=digits", "data.val_fraction=0.2", "data.test_fraction=0.8", "trainer=cpu", "logger=none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("features") / "weights")


def execute(place: Path, *overrides: str) -> tuple[dict[str, float], Path]:
    paths = f"paths.runs={place.parent / 'runs'}", f"paths.cache={place.parent / 'cache'}"
    result, folder = run(*overrides, *paths, conf=CONF)
    assert folder is not None
    return {name: number.value for name, number in result.numbers.items()}, folder


def test_a_probe_of_exported_features_is_the_probe_of_the_network(place: Path) -> None:
    """Round trip: the accuracy of `task=probe` on this layer, and the same bits from either format."""
    init = f"init={place}"
    _, folder = execute(place, "task=features", init, *FEW, "task.layers=[2,last]")
    assert sorted(path.name for path in folder.glob("layer_*")) == ["layer_2", "layer_3"]
    how = "task.C_grid=[1.0]", "task.baselines=[]"
    probed, _ = execute(place, "task=probe", init, *FEW, *how, "task.layer=2")
    given, _ = execute(place, "task=probe_encoder", f"task.encoder={folder / 'layer_2'}", *FEW, *how)
    for name in ("val/accuracy", "test/accuracy"):
        assert given[name] == probed[name]
    source = built("task=features", init, *FEW).source
    counts = {split: len(source.split(split)) for split in ("train", "val", "test")}
    stored = {}
    for split in counts:
        with safe_open(folder / "layer_2" / f"features_{split}.safetensors", framework="np") as file:
            values, labels, about = file.get_tensor("features"), file.get_tensor("labels"), file.metadata()
        write_layer(place / "npy" / f"features_{split}.npy", Features(values[None], labels), 0, {}, source)
        stored[split] = values
        assert values.shape == (len(labels), 24)
        assert values.dtype == np.float16
        assert labels.tolist() == source.split(split).labels.tolist()
        assert json.loads(about["class_names"]) == [*"0123456789"]
        assert (about["layer"], about["norm"]) == ("2", "ln_1")
    of_npy = read_given_features(str(place / "npy"), counts, [*counts])
    assert all(np.array_equal(of_npy[split], values) for split, values in stored.items())
    lines = list(csv.reader((folder / "val.csv").open()))
    assert lines[0] == ["file", "label", "class"]
    assert [line[0] for line in lines[1:]] == [f"val/{i}" for i in range(len(lines) - 1)]  # no files: rows
    (folder / "layer_2" / "features_train.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"layer_2 cannot be read \(.*is damaged"):
        execute(place, "task=probe_encoder", f"task.encoder={folder / 'layer_2'}", *FEW, *how)


def test_files_are_named(place: Path, tmp_path: Path) -> None:
    """By hand: the names below data.path, in the order of the rows, with the folders' names as classes."""
    images = class_folders(tmp_path / "photographs", ["cat", "dog, wet"], 6)
    data = "data=folder", f"data.path={images}", "data.resolution=8", "data.val_fraction=0.5", "trainer=cpu"
    _, folder = execute(place, "task=features", f"init={place}", *data, "task.splits=[test,val]", "logger=none")
    lines = list(csv.DictReader((folder / "val.csv").open()))
    assert len(lines) == len(np.load(next((place.parent / "cache" / "features").glob("folder8-val-*.labels.npy"))))
    for line in lines:
        assert (images / line["file"]).is_file()
        assert (images / line["file"]).parent.name == line["class"] == ["cat", "dog, wet"][int(line["label"])]
    assert not (folder / "test.csv").exists()  # the folder has no test images
    assert [line["file"] for line in lines] == sorted(line["file"] for line in lines)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": [0.5, "first"]}, r"^task\.layers: each must be a layer's number \(0: the embedding\)"),
        ({"layers": []}, r"^task\.layers must be all, a layer or a list of layers, got none"),
        ({"format": "hdf5"}, r"^task\.format must be one of safetensors, npy, got 'hdf5'"),
        ({"splits": ["training"]}, r"^task\.splits\.0 must be one of train, val, test, got 'training'"),
    ],
)
def test_what_is_refused(changed: dict[str, object], message: str) -> None:
    check_bad_settings("export_features", FEATURES, changed, message)


def test_a_layer_that_is_not_there(place: Path) -> None:
    """By hand: refused before any image is read."""
    with pytest.raises(ValueError, match=r"^task\.layers: each must lie in 0 … 3 \(0: the embedding\).* got 4$"):
        execute(place, "task=features", f"init={place}", *FEW, "task.layers=[1,4]")
