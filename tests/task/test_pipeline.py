"""The pipeline: which weights each stage starts from, and what its numbers are called at the end."""

from pathlib import Path
from typing import Any

import pytest

from igpt.metric.result import Curve, Number, Result, find_key
from igpt.report.facts import find_number
from igpt.report.runs import read_run
from igpt.report.summary import summarize
from igpt.run.jobs import Job
from igpt.run.targets import task_settings
from igpt.task.pipeline import run
from igpt.utils import files
from tests.conftest import parts_of_run
from tests.report.records import finished


class Stages:
    """Stages that note what they were started from; those named `train…` leave weights, `tokenize…` a tokenizer."""

    def __init__(self, results: dict[str, Result]) -> None:
        self.results, self.started, self.tokenizers = results, {}, {}

    started: dict[str, Any]
    tokenizers: dict[str, str | None]

    def __call__(self, name: str, *, folder: Path, init: Any, tokenizer: str | None) -> tuple[Result, Path]:
        self.started[name], self.tokenizers[name] = init, tokenizer
        if name.startswith("train"):
            (folder / "model").mkdir(parents=True)
        if name.startswith("tokenize"):
            files.write_json(folder / "model" / "tokenizer.json", {})
        return self.results.get(name, Result()), folder


def pipeline(stage: Stages, folder: Path, *, init: str | None = None, **settings: Any) -> Result:
    components = parts_of_run(run_stage=stage, run_dir=folder, init=init)
    return run(components, parse(**settings))


def parse(**settings: Any) -> Any:
    return task_settings("igpt.task.pipeline.run", {"bars": {}, "curves": {}, **settings})


def test_each_stage_starts_from_the_weights_it_names(tmp_path: Path) -> None:
    """Invariant: unsaid, the last that left some; null, none; a list, all of them; a stage that is null is left out.

    `init` is a stage's own; from a stage that left none, those that it was started from.
    """
    stages = Stages({})
    listed: dict[str, Any] = {
        "first": {},
        "train_a": {},
        "probe_a": {},
        "train_b": {"from": None},
        "probe_b": {"from": "train_b"},
        "left_out": None,
        "compared": {"from": ["train_a", "train_b"]},
        "last": {},
        "own": {"init": "elsewhere"},
        "as_own": {"from": "own"},
        "as_last": {"init": None},
        "as_probe_b": {"from": "probe_b"},
    }
    pipeline(stages, tmp_path, init="given", stages=listed, bars={})
    a, b = str(tmp_path / "2_train_a"), str(tmp_path / "4_train_b")
    assert stages.started == {
        "first": "given",
        "train_a": "given",
        "probe_a": a,
        "train_b": None,
        "probe_b": b,
        "compared": [a, b],
        "last": a,
        "own": "elsewhere",
        "as_own": "elsewhere",
        "as_last": a,
        "as_probe_b": b,
    }


def test_stages_take_the_last_tokenizer(tmp_path: Path) -> None:
    """Invariant: of the stages before; it is no weights to start from."""
    stages = Stages({})
    pipeline(stages, tmp_path, stages={name: {} for name in ("train_a", "tokenize", "train_b", "probe")}, bars={})
    tokenizer = str(tmp_path / "2_tokenize")
    assert stages.tokenizers == {"train_a": None, "tokenize": None, "train_b": tokenizer, "probe": tokenizer}
    assert stages.started["train_b"] == str(tmp_path / "1_train_a")


def test_everything_is_named_by_its_stage(tmp_path: Path) -> None:
    """Invariant: whatever the values are, alike in all stages or in one alone."""
    loss, other, share = Number(1.5, "nats/token", 9), Number(1.6, "nats/token", 9), Number(0.5, "share", 4)
    results = {
        "train": Result(numbers={"val/loss": loss, "alone": other}, curves={"c": Curve([1], [2], "x", "y")}),
        "evaluate": Result(numbers={"val/loss": loss}),
        "probe": Result(numbers={"val/accuracy": share}, files={"picture": Path("a.png")}),
        "fine": Result(
            numbers={"val/accuracy": share}, files={"picture": Path("a.png")}, class_names={"picture": ("a", "b")}
        ),
    }
    bars = {"both": {"group": {"A": "probe/val/accuracy", "B": "fine/val/accuracy"}}}
    full = pipeline(Stages(results), tmp_path, stages={name: {} for name in results}, bars=bars)
    assert full.numbers == {
        "train/val/loss": loss,
        "train/alone": other,
        "evaluate/val/loss": loss,
        "probe/val/accuracy": share,
        "fine/val/accuracy": share,
    }
    assert full.files == {"probe/picture": Path("3_probe/a.png"), "fine/picture": Path("4_fine/a.png")}
    assert full.class_names == {"fine/picture": ("a", "b")}
    assert list(full.curves) == ["train/c"]
    assert full.bars["both"].heights == {"group": {"A": share, "B": share}}
    assert full.bars["both"].y_unit == "share"


def test_pictures_of_a_stage_elsewhere_are_copied(tmp_path: Path) -> None:
    """Invariant: the pipeline names only files of its own folder; of a stage elsewhere, none outside of that."""
    elsewhere, here = tmp_path / "other", tmp_path / "pipeline"
    elsewhere.mkdir()
    (elsewhere / "a.png").write_bytes(b"picture")
    (tmp_path / "secret.txt").write_text("secret")
    paths = {"picture": "a.png", "secret": "../secret.txt", "full": str(tmp_path / "secret.txt"), "gone": "b.png"}
    result = Result(files={key: Path(path) for key, path in paths.items()} | {"model": Path("model")})
    components = parts_of_run(run_stage=lambda *_, **__: (result, elsewhere), run_dir=here, init=None)
    merged = run(components, parse(stages={"probe": {}}))
    assert merged.files == {"probe/picture": Path("1_probe/a.png")}
    assert [path.read_bytes() for path in here.rglob("*") if path.is_file()] == [b"picture"]


def test_a_name_may_be_shortened_where_one_stage_has_it() -> None:
    """By hand."""
    keys = ["probe/val/accuracy", "tune/val/accuracy", "tune/val/loss", "loss"]
    names = ("tune/val/accuracy", "val/accuracy", "val/loss", "loss", "al/loss", "gone")
    assert [find_key(keys, name) for name in names] == ["tune/val/accuracy", None, "tune/val/loss", "loss", None, None]


def test_sweeps_and_pages_find_a_number_by_its_short_name(tmp_path: Path) -> None:
    """Invariant: a job's metric, a row of a comparison and a published number are those of the stage that has it."""
    numbers = {"tune/val/loss": Number(1.5, "nats/token", 9), "probe/val/accuracy": Number(0.25, "share", 4)}
    folders = [finished(tmp_path / name, Result(numbers=numbers), task="pipeline").path for name in "ab"]
    job = Job(0, [], folder=str(folders[0]))
    assert job.read_result("val/accuracy")
    assert job.value == 0.25
    compared = summarize(folders, "val/accuracy")
    assert (compared.metric, compared.rows[0].mean) == ("probe/val/accuracy", 0.25)
    assert find_number(read_run(folders[0]), "val/loss") == numbers["tune/val/loss"]


@pytest.mark.parametrize(
    ("stages", "bars", "message"),
    [
        ({"probe": {"from": "pretrain"}, "pretrain": {}}, {}, "no stage 'pretrain' before it"),
        ({"a": {}, "b": {"from": ["a", "c"]}}, {}, "no stage 'c' before it, but a"),
        ({"a": None, "b": {"from": "a"}}, {}, "no stage 'a' before it, but none"),
        ({"a": {}}, {"picture": {"group": {"A": "b/val/accuracy"}}}, "is to begin with the name of a stage: a"),
        ({"a": {}}, {"picture": {"group": {"A": ["a/x", "b/x"]}}}, "is to begin with the name of a stage: a"),
        ({"a": {"init": 5}}, {}, r"task\.stages\.a\.init must be a path to weights, or null, got 5"),
        ({"a": {}, "b": {"init": "x", "from": "a"}}, {}, r"task\.stages\.b has weights of its own, init=x, and from=a"),
    ],
)
def test_a_stage_that_is_not_there(stages: dict[str, Any], bars: dict[str, Any], message: str) -> None:
    """Invariant: found before the first stage begins."""
    with pytest.raises(ValueError, match=message):
        parse(stages=stages, bars=bars)


def test_a_bar_of_a_number_that_was_not_found(tmp_path: Path) -> None:
    """Invariant: the error lists the numbers there are."""
    results = {"a": Result(numbers={"val/loss": Number(1.0, "nats/token", 1)})}
    bars = {"picture": {"group": {"A": "a/val/accuracy"}}}
    with pytest.raises(ValueError, match=r"stage a has found no val/accuracy, but val/loss"):
        pipeline(Stages(results), tmp_path, stages={"a": {}}, bars=bars)


def test_curves_of_several_stages_in_one_plot(tmp_path: Path) -> None:
    """Invariant: each is that of its stage under the plot's own name; stages that are left out are in no picture."""
    depths = {
        name: Curve([0.0, 1.0], [0.1, y], "layer", "accuracy", best=(1, 1)) for name, y in (("a", 0.5), ("b", 0.4))
    }
    share, one = Number(0.5, "share", 4), Number(0.25, "share", 4)
    results = {
        name: Result(curves={"probe, val": of}, numbers={"test/accuracy": share, "test/accuracy_one_mask": one})
        for name, of in depths.items()
    }
    keys = {name: f"{name}/test/accuracy" for name in "abc"}
    bars = {"figure4": {"AR": {"probe": keys["a"]}, "BERT": {"probe": [keys["b"], "b/test/accuracy_one_mask"]},
                        "other": {"probe": keys["c"]}}, "gone": {"other": {"probe": keys["c"]}}}  # fmt: skip
    lines = {"figure2": {"A": "a/probe, val", "B": "b/probe, val", "C": "c/probe, val"}, "none": {"C": "c/probe, val"}}
    merged = pipeline(Stages(results), tmp_path, stages={"a": {}, "b": {}, "c": None}, bars=bars, curves=lines)
    assert merged.charts == {"figure2": {"A": depths["a"], "B": depths["b"]}}
    found = merged.bars.pop("figure4")
    assert found.heights == {"AR": {"probe": share}, "BERT": {"probe": share}}
    assert (found.parts, found.part_name) == ({"BERT": {"probe": one}}, "accuracy one mask")
    assert merged.bars == {}
    with pytest.raises(ValueError, match=r"task\.curves: stage a has found no probe, test, but probe, val"):
        pipeline(Stages(results), tmp_path, stages={"a": {}}, curves={"p": {"A": "a/probe, test"}})
    with pytest.raises(ValueError, match=r"task\.curves: d/x is to begin with the name of a stage: a"):
        parse(stages={"a": {}}, curves={"p": {"A": "d/x"}})
