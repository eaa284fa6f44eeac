"""`task=predict`: the run's own accuracy again, photographs by class name, and heads and files that are refused."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import igpt
from igpt.checkpoint.classifier import find_class_head
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.probe_files import save_probe
from igpt.metric.result import Result
from igpt.objective.bert import BERT
from igpt.report.captions import read_captions
from igpt.run.launch import run
from igpt.settings.reading import PredictSettings
from igpt.task import predict
from igpt.task.prediction_table import disarm
from tests.conftest import ROOT
from tests.task.conftest import Arrays, Lab, Palette, drawn

MASKED = BERT(mask_probability=0.15)


@pytest.fixture
def lab(few: Arrays, palette: Palette) -> Lab:
    return Lab(few, palette)


@pytest.fixture(scope="module")
def probe(quickstart: Path) -> Path:
    return quickstart / "6_probe"


def predicted(place: Path, *overrides: str) -> tuple[Result, Path]:
    """`task=predict` as from the command line, with runs and cache below `place`."""
    paths = (f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}")
    result, folder = run("task=predict", "trainer=cpu", *paths, *overrides, conf=ROOT / "conf")
    assert folder is not None
    assert result.files["table"] == Path("predictions.csv")  # named at the end of the run, beside the pictures
    return result, folder


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stage", ["6_probe", "7_finetune"])
def test_the_accuracy_of_the_run(quickstart: Path, stage: str, tmp_path: Path) -> None:
    """Independent source: result.json and the confusions of the run that made the head; the table, counted by hand."""
    result, folder = predicted(tmp_path, f"init={quickstart / stage}")
    record = json.loads((quickstart / stage / "result.json").read_text())
    assert result.numbers["test/accuracy"].value == record["numbers"]["test/accuracy"]["value"]
    assert np.array_equal(result.matrices["confusion"], np.load(quickstart / stage / "confusion_counts.npy"))
    table = read_table(folder)
    assert [row["file"] for row in table] == [f"test/{i}" for i in range(300)]
    right = [row["is_right"] == "true" for row in table]
    assert np.mean(right) == result.numbers["test/accuracy"].value
    assert right == [row["class"] == row["true_class"] for row in table]
    of_five = [row["true_class"] in (row["class"], *(row[f"class_{i}"] for i in range(2, 6))) for row in table]
    assert np.mean(of_five) == pytest.approx(result.numbers["test/top_5"].value)
    shares = np.array([[float(row[key]) for key in row if key.startswith("probability")] for row in table])
    assert (np.diff(shares, axis=1) <= 0).all()
    assert (shares.sum(axis=1) <= 1 + 1e-5).all()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("ar", {"concat_layers": 3, "dtype": "float16"}),
        ("ar", {"solver": "sgd", "refit": False}),
        ("bert", {"layer": 1, "seed": 5, "dtype": "float16"}),
        ("bert", {"norm": "raw", "layer": 2, "eval_masks": 2}),
    ],
)
def test_probes_of_every_kind(kind: str, how: dict[str, Any], tmp_path: Path, lab: Lab, palette: Palette) -> None:
    """Independent source: the confusions of the probe's own test; of BERT by vote, whatever the seed of this run."""
    objective = MASKED if kind == "bert" else None
    weights = drawn(tmp_path / "weights", palette, objective)
    truth = lab.probe(tmp_path, weights, objective=objective, C_grid=[1.0], **how)
    again = predict_test(lab, tmp_path, weights, objective, tmp_path)
    assert np.array_equal(again.matrices["confusion"], truth.matrices["confusion"])
    assert again.numbers["test/accuracy"].value == truth.numbers["test/accuracy"].value
    model = igpt.load(weights.folder.parent, head=tmp_path)
    if objective is not None:  # whose settings `drawn` does not save
        model.metadata = replace(model.metadata, objective={"name": "bert", "mask_probability": 0.15})
    images = lab.digits.split("test")
    assert np.mean([each.label for each in model.predict(images.pixels)] == images.labels) == (
        truth.numbers["test/accuracy"].value
    )


def test_a_fine_tuned_vote(tmp_path: Path, lab: Lab, palette: Palette) -> None:
    """Independent source: the run's own test, of three masks drawn by its seed, which the head remembers."""
    truth = lab.finetune(tmp_path, drawn(tmp_path / "weights", palette, MASKED), objective=MASKED, seed=3, steps=2)
    again = predict_test(lab, tmp_path / "again", find_weights(str(tmp_path)), MASKED)
    assert again.numbers["test/accuracy"].value == truth.numbers["test/accuracy"].value
    assert np.array_equal(again.matrices["confusion"], truth.matrices["confusion"])
    assert again.provenance["masks"] == 3


def predict_test(lab: Lab, folder: Path, weights: Any, objective: Any, probe: Path | None = None) -> Result:
    """`task=predict` of the test split, with a probe or the weights' own head."""
    components = lab.components(folder, weights, objective=objective)
    vars(components)["classifier"] = find_class_head(weights, None if probe is None else str(probe))
    folder.mkdir(exist_ok=True)
    settings = PredictSettings(head=None, split="test", batch_size=64, eval_masks=None, count=4, mistakes=0)
    return predict.run(components, settings)


@pytest.fixture
def photographs(tmp_path: Path, lab: Lab) -> Path:
    """Digits as files: two of the ten classes in folders, one unknown class, one file that is no image."""
    folder, images = tmp_path / "photos", lab.digits.split("test")
    for label, name, count in ((7, "7", 3), (3, "3", 4), (1, "cow", 2)):
        (folder / name).mkdir(parents=True)
        for i in np.flatnonzero(images.labels == label)[:count].tolist():
            Image.fromarray(images.pixels[i]).save(folder / name / f"{i}.png")
    (folder / "3" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    return folder


def test_photographs_by_class(probe: Path, photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Independent source: `igpt.load` on the same files. Invariant: labels are matched by name, nothing is lost."""
    result, folder = predicted(
        tmp_path, f"init={probe}", "data=folder", f"data.path={photographs}", "data.resolution=8", "task.mistakes=3"
    )
    table = read_table(folder)
    names = sorted(str(path.relative_to(photographs)) for path in photographs.rglob("*.*"))
    assert [row["file"] for row in table] == names
    assert "cow" in caplog.text
    model = igpt.load(probe)
    right = []
    for row in table:
        if row["file"] == "3/broken.jpg":
            assert (row["class"], row["is_right"], row["true_class"]) == ("", "", "3")
            assert "no image" in row["error"]
            continue
        (expected,) = model.predict(photographs / row["file"])
        assert (row["class"], row["error"]) == (expected.name, "")
        assert float(row["probability"]) == pytest.approx(expected.probability, abs=2e-5)
        label = row["file"].split("/")[0]
        assert row["true_class"] == ("" if label == "cow" else label)
        right += [expected.name == label] if label != "cow" else []
    accuracy = result.numbers["all/accuracy"]
    assert (accuracy.value, accuracy.n) == (np.mean(right), 7)
    assert result.numbers["predict/unreadable"].value == 1
    assert "3/broken.jpg" in result.warnings[0]
    with Image.open(folder / "mistakes.png") as picture:
        captions = read_captions(picture)
    wrong = sorted((row for row in table if row["is_right"] == "false"), key=lambda row: -float(row["probability"]))
    shown = [f"{row['class']}, {100 * float(row['probability']):.0f} % true: {row['true_class']}" for row in wrong[:3]]
    assert list(captions) == shown
    page = (folder / "report.html").read_text()
    assert all(f"<bdi>{caption}</bdi>" in page for caption in captions)


def test_a_flat_folder(probe: Path, photographs: Path, tmp_path: Path) -> None:
    """Invariant: every image is predicted, none is held out; a name is neither a formula nor two lines of the table."""
    flat = tmp_path / "flat"
    flat.mkdir()
    hostile = ["=1+1.png", "@a.png", 'a\nb,"c".png', "-\udcff.png"]
    for name, image in zip([*hostile, "x.png"], sorted(photographs.rglob("*.png")), strict=False):
        shutil.copy(image, flat / name)
    result, folder = predicted(tmp_path, f"init={probe}", "data=folder", f"data.path={flat}", "data.resolution=8")
    assert [row["file"] for row in read_table(folder)] == [
        "./-\\udcff.png",
        "./=1+1.png",
        "./@a.png",
        hostile[2],
        "x.png",
    ]
    assert list(result.numbers) == ["predict/images"]
    assert "true_class" not in read_table(folder)[0]
    assert disarm("+1") == "'+1"


def copied(probe: Path, place: Path, **changed: Any) -> Path:
    """The probe's file, with changes to what it says."""
    with safe_open(probe / "probe.safetensors", "pt") as file:
        record = json.loads(file.metadata()["probe"]) | changed
    save_file(load_file(probe / "probe.safetensors"), place / "probe.safetensors", {"probe": json.dumps(record)})
    return place / "probe.safetensors"


def test_heads_that_are_refused(quickstart: Path, probe: Path, tmp_path: Path) -> None:
    """Invariant: one line, before anything is read with them; no run folder is left."""
    begun = f"init={quickstart / '2_pretrain'}"
    other = f"init={quickstart / '7_finetune'}"
    encoder = tmp_path / "encoder" / "probe.safetensors"
    encoder.parent.mkdir()
    save_probe(encoder, torch.zeros(10, 4), torch.zeros(10), [], None)
    weights = find_weights(str(quickstart / "2_pretrain"))
    for init, head, message in (
        (begun, [], r"has no class head: init=RUN of task=finetune or task=probe"),
        (other, [f"task.head={probe}"], r"is a probe of other weights than"),
    ):
        with pytest.raises(ValueError, match=message):
            predicted(tmp_path, init, *head)
    with pytest.raises(ValueError, match=r"holds no probe\.safetensors"):
        find_class_head(weights, str(quickstart / "2_pretrain"))
    for changed, message in [
        ({"layers": [3]}, r"reads layers \[3\], the network has 0 … 2"),
        ({"layers": [0, 1]}, r"reads 16 features of 2 layer\(s\)"),
        ({"format": 2}, "later release"), ({"layers": ["x"]}, "list of numbers"), ({"dtype": "int8"}, "dtype"),
        ({"class_names": ["a"]}, "1 names"), ({"eval_masks": 0}, "eval_masks"), ({"seed": "0"}, "seed"),
        ({"resolution": 16}, "16×16"), ({"more": 1}, "more"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            find_class_head(weights, str(copied(probe, tmp_path, **changed)))
    with pytest.raises(ValueError, match="probe of an encoder"):
        find_class_head(weights, str(encoder))
    encoder.write_bytes((probe / "probe.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        find_class_head(weights, str(encoder))
    assert not list((tmp_path / "runs").glob("predict-*"))


def test_a_probe_of_an_older_release(tmp_path: Path) -> None:
    """Independent source: the accuracy in its result.json. Its file has the layers alone; its records the rest."""
    (kept,) = (ROOT / "tests" / "older_runs" / "2dc1449" / "finished").glob("pipeline-*")
    probe = shutil.copytree(kept, tmp_path / "runs" / kept.name) / "4_probe"
    with safe_open(probe / "probe.safetensors", "pt") as file:
        assert list(file.metadata()) == ["layers"]
    result, _ = predicted(tmp_path, f"init={probe}")
    then = json.loads((probe / "result.json").read_text())["numbers"]["test/accuracy"]
    assert result.numbers["test/accuracy"].n == then["n"]
    assert result.numbers["test/accuracy"].value == pytest.approx(
        then["value"], abs=2.01 / then["n"]
    )  # other CPUs round
    assert igpt.load(probe).predict(np.zeros((8, 8, 3), np.uint8))[0].name.startswith("class ")  # it names none
    shutil.rmtree(probe.parent / "2_pretrain")
    with pytest.raises(ValueError, match=r"the weights that it probed, .* are not there: init=WEIGHTS with task.head="):
        find_weights(str(probe))


def test_no_image(probe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    chosen = (f"init={probe}", "data=folder", f"data.path={folder}", "data.resolution=8")
    with pytest.raises(ValueError, match="there is no image in it"):
        predicted(tmp_path, *chosen)
    (folder / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"none of the 1 images can be read, as .*a\.png"):
        predicted(tmp_path, *chosen)
    with pytest.raises(ValueError, match=r"no images in its test split: task\.split=all"):
        predicted(tmp_path, *chosen, "task.split=test")
    assert not list((tmp_path / "runs").glob("predict-*"))
