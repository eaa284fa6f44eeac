"""Runs side by side: made-up run folders, whose numbers and settings are known."""

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import initialize_config_dir
from PIL import Image

from igpt.app import compare
from igpt.app.against import compare_with_paper
from igpt.metric.result import Number, Result
from igpt.report.figures import Point, points_figure
from igpt.report.found_runs import find_runs
from igpt.report.runs import read_run
from igpt.report.summary import summarize
from igpt.report.summary_table import draw_summary, tabulate_summary
from igpt.run.launch import launch
from tests.app.test_against import beside, large, probe
from tests.configs import CONF, built
from tests.report.records import RUNS, loss, made


def test_summary_groups_seeds_and_sorts(tmp_path: Path) -> None:
    """By hand: means, deviations with n - 1, Student's interval (4.303 for three); the lower loss comes first."""
    folders = []
    for rate, values in ((0.01, (2.0, 2.2, 2.4)), (0.003, (1.0, 1.1, 1.2)), (0.001, (3.0,))):
        for seed, value in enumerate(values):
            folder = tmp_path / f"{rate}-{seed}"
            folders.append(made(folder, loss(value, 0.1), seed=seed, task__learning_rate=rate))
    of_loss = summarize(folders, "val/loss_gen")
    assert [row.settings for row in of_loss.rows] == [{"task.learning_rate": f"{r}"} for r in (0.003, 0.01, 0.001)]
    assert [row.mean for row in of_loss.rows] == pytest.approx([1.1, 2.2, 3.0])
    assert [row.deviation for row in of_loss.rows] == [pytest.approx(0.1), pytest.approx(0.2), None]
    around = 4.303 * 0.1 / 3**0.5
    assert of_loss.rows[0].interval == pytest.approx((1.1 - around, 1.1 + around), abs=1e-4)
    assert of_loss.rows[2].interval == pytest.approx((3 - 0.196, 3 + 0.196))
    assert [row.n for row in of_loss.rows] == [3, 3, 1]
    assert of_loss.rows[0].folders == folders[3:6]
    assert of_loss.lower_is_better
    assert "1.10 ± 0.10 (std)" in tabulate_summary(of_loss)[1][1]
    of_accuracy = summarize(folders, "val/accuracy")
    assert not of_accuracy.lower_is_better
    assert [row.mean for row in of_accuracy.rows] == sorted((row.mean for row in of_accuracy.rows), reverse=True)
    draw_summary(tmp_path / "few.png", summarize(folders[:4], "val/loss_gen"))
    draw_summary(tmp_path / "more.png", of_loss)
    assert Image.open(tmp_path / "few.png").height < Image.open(tmp_path / "more.png").height


def test_a_repetition_is_no_further_seed(tmp_path: Path) -> None:
    """Invariant: the same run twice adds nothing to n; the newest counts."""
    folders = [made(tmp_path / name, loss(value)) for name, value in (("a", 1.0), ("a-2", 1.5))]
    os.utime(folders[0] / "result.json", (0, 0))
    found_rows = summarize(folders, "val/loss_gen")
    assert [(row.mean, row.n) for row in found_rows.rows] == [(1.5, 1)]
    assert found_rows.left_out == {folders[0]: "a-2 is the same run"}


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    """Invariant: what follows from a name is not repeated, seeds and what is alike are not shown."""
    sizes = {"igpt_nano": 64, "igpt_micro": 128}
    folders = [
        made(tmp_path / f"{name}{seed}", loss(width + seed), seed=seed, model__name=name, model__n_embd=width)
        for name, width in sizes.items()
        for seed in (0, 1)
    ]
    assert [row.settings for row in summarize(folders, "val/loss_gen").rows] == [{"model": name} for name in sizes]
    wide = made(tmp_path / "wide", loss(9), model__name="igpt_nano", model__n_embd=96)
    settings = [row.settings for row in summarize([*folders, wide], "val/loss_gen").rows]
    assert {"model": "igpt_nano", "model.n_embd": "96"} in settings


def test_probes_of_weights_that_differ_in_seed_are_one(tmp_path: Path) -> None:
    """Invariant: seeds of the weights count as seeds; other weights set runs apart, by what they are."""
    for rate in (0.01, 0.003):
        for seed in (0, 1):
            name = f"pretrain-{rate}-{seed}"
            made(tmp_path / name, loss(2.0), seed=seed, task__learning_rate=rate)
            given = {"task.name": "probe", "init": str(tmp_path / name)}
            made(tmp_path / f"probe-{rate}-{seed}", loss(1 + rate + seed), seed=seed, **given)
    found_rows = summarize(sorted(tmp_path.glob("probe-*")), "val/loss_gen")
    assert [row.settings for row in found_rows.rows] == [{"init.task.learning_rate": f"{r}"} for r in (0.003, 0.01)]
    assert [row.n for row in found_rows.rows] == [2, 2]


def test_losses_of_other_tokens_do_not_compare(tmp_path: Path) -> None:
    folders = [made(tmp_path / name, loss(1.0), objective__name=name) for name in ("ar", "bert")]
    of_losses = summarize(folders, "val/loss_gen")
    assert of_losses.caution == "not comparable: these are of several objectives"
    assert tabulate_summary(of_losses)[0][1] == "validation loss, nats per token (in no order)"
    assert summarize(folders, "val/accuracy").caution == ""


def test_bits_per_dimension_of_other_sizes_do_not_compare(tmp_path: Path) -> None:
    """By hand: a density is one in any order of the tokens, not at any size; bits per pixel depend on the tokens."""
    numbers = {f"val/{name}": Number(3.0, unit, 9) for name, unit in (("dim", "bits/dim"), ("pixel", "bits/pixel"))}
    folders = [
        made(tmp_path / f"{side}-{order}", numbers, provenance={"tokenizer": order}, data__resolution=side,
             tokens__order=order)
        for side, order in ((8, "raster"), (8, "random"), (16, "raster"))
    ]  # fmt: skip
    assert summarize(folders, "val/dim").caution == "not comparable: these are of several resolutions"
    assert summarize(folders[:2], "val/dim").caution == ""
    assert summarize(folders[:2], "val/pixel").caution == "not comparable: these are of several tokenizers"


def run_compare(tmp_path: Path, *overrides: str) -> tuple[Result, Path]:
    build = built("task=compare", *overrides, f"paths.runs={tmp_path / RUNS}", "trainer=cpu")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        result = launch(build.run.cfg, choices=build.run.choices, overrides=[*overrides])
    return result, tmp_path / RUNS / build.run.name


BROKEN = {
    "cut": ('{"version": 1, "numb', "it is damaged"),
    "list": ("[1, 2]", "another version"),
    "old": ('{"version": 0, "numbers": {}}', "another version than 1"),
    "empty": ('{"version": 1}', "damaged"),
    "nan": ('"value": NaN', "damaged"),
    "binary": ("\0\1", "it is damaged"),
    "foreign": (
        '{"version": 1, "task": "x", "numbers": {}, "curves": {}, "files": {}, "provenance": {}, "config": {}}',
        "damaged",
    ),
}


def test_broken_and_unfinished_runs_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is named with its reason, none is fatal; the same again is not computed again, a new run is seen."""
    place = tmp_path / RUNS
    for seed in (0, 1):
        made(place / f"good-{seed}", loss(1.0 + seed), seed=seed)
    made(place / "other", loss(3.0), model__name="igpt_micro")
    full = (place / "good-0" / "result.json").read_text()
    for name, (content, _) in BROKEN.items():
        made(place / name, loss(1.0), seed=9)
        text = full.replace('"value": 1.0', content) if name == "nan" else content
        (place / name / "result.json").write_text(text)
    (made(place / "unfinished", loss(1.0)) / "result.json").unlink()
    with caplog.at_level(logging.INFO):
        result, folder = run_compare(tmp_path)
    assert result.numbers["compare/runs"].value == 3
    assert result.numbers["compare/left_out"].value == len(BROKEN) + 1
    text = (folder / "compare.txt").read_text()
    for name, (_, why) in {**BROKEN, "unfinished": ("", "it is not finished")}.items():
        assert [line for line in text.splitlines() if f"{name}: " in line and why in line], (name, text)
    assert caplog.text.count("cut: ") == 1  # also in the terminal, each folder once
    assert "1.50 ± 0.71 (std)" in caplog.text  # the table is what one sees
    rows_of_csv = list(csv.DictReader((folder / "compare.csv").open()))
    assert [float(row["ours"]) for row in rows_of_csv] == [1.5, 3.0]
    assert "| model=igpt_nano | 1.50 ± 0.71 (std) | 2 |" in (folder / "compare.md").read_text()
    assert (folder / "compare_pretrain.png").is_file()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again, same = run_compare(tmp_path)
    assert (same, again.numbers) == (folder, result.numbers)
    assert "1.50 ± 0.71 (std)" in caplog.text
    made(place / "new", loss(0.5), model__name="igpt_mini")
    columns = ("task.metric=val/accuracy", "task.numbers=[val/loss_gen]", "task.reference={model:igpt_mini}")
    newer, another = run_compare(tmp_path, *columns)
    assert another != folder
    assert newer.numbers["compare/runs"].value == 4
    assert newer.numbers["best pretrain/val/accuracy"].value == 2.0
    text = (another / "compare.txt").read_text()
    assert "validation loss, nats per token  " in text
    assert "[low, high]: 95 % confidence interval; difference: from model=igpt_mini, with the 95 % interval" in text
    with pytest.raises(ValueError, match=r"^task.reference: no row has model=mini; there are model=igpt_mini"):
        run_compare(tmp_path, "task.reference={model:mini}")


def test_a_picture_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: the tables and numbers are there, and the picture is not among the files."""

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    for seed in (0, 1):
        made(tmp_path / RUNS / str(seed), loss(1.0 + seed), model__name=f"size {seed}")
    monkeypatch.setattr(compare, "draw_summary", fail)
    result, folder = run_compare(tmp_path)
    assert result.numbers["best pretrain/val/loss_gen"].value == 1.0
    assert result.files.keys() == {"compare_txt", "compare_md", "compare_csv"}
    assert all((folder / path).is_file() for path in result.files.values())


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    place = tmp_path / RUNS
    (made(place / "unfinished", loss(1.0)) / "result.json").unlink()
    with pytest.raises(
        ValueError, match=r"no finished run to compare in paths\.runs; .*unfinished: it is not finished"
    ):
        run_compare(tmp_path)
    with pytest.raises(ValueError, match=r"there is nothing at .*typo: give run folders"):
        run_compare(tmp_path, f"task.runs=[{tmp_path / 'typo'}]")
    made(place / "good", loss(1.0))
    with pytest.raises(ValueError, match=r"no finished run has val/loss_gn, did you mean val/loss_gen\?"):
        run_compare(tmp_path, "task.metric=val/loss_gn")


def test_runs_by_folder_glob_and_name_are_each_once(tmp_path: Path) -> None:
    """Invariant: also below folders of folders; a comparison that was made before is no run."""
    place = tmp_path / RUNS
    for name in ("a", "b", "deep/er/c"):
        made(place / name, loss(1.0), model__name=name.replace("/", "_"))
    run_compare(tmp_path)
    for places in ([str(tmp_path)], [f"{place}/*"], [str(place / "a"), f"{place}/b/result.json", str(place / "deep")]):
        assert sorted(run.folder.name for run in find_runs([*places, *places]).runs) == ["a", "b", "c"]
    result, _ = run_compare(tmp_path, f"task.runs='{place}/[ab]'")
    assert result.numbers["compare/runs"].value == 2


def test_all_of_the_paper_without_any_run(tmp_path: Path) -> None:
    """Every table is there, nothing is said to have been run."""
    result, folder = run_compare(tmp_path, "task.all=true")
    text = (folder / "compare.txt").read_text()
    assert result.numbers["compare/published"].value == 0
    for line in ("96.3 %", "72.0 %", "88.61 %", "another method", "network of its VQ-VAE is not published", "RUN_L"):
        assert line in text
    assert "differs" not in text


def test_a_pipeline_is_taken_apart(quickstart: Path, tmp_path: Path) -> None:
    """A real run: its stages stand for themselves beside the paper, and know the pretraining they came from."""
    (run,) = find_runs([str(quickstart)]).runs
    stages = {stage.name: stage.run for stage in run.stages if stage.run is not None}
    assert {"pretrain", "probe", "finetune", "scratch"} <= stages.keys()
    for name in ("probe", "finetune", "evaluate"):
        start = stages[name].init_history
        assert start.pretraining is not None
        assert start.pretraining.folder.name == "2_pretrain"
        assert start.unknown == ""
        assert start.metadata["network"]["n_layer"] == 2  # also in the run's own record, should the folder go
        assert stages[name].result.provenance["init"]["network"] == start.metadata["network"]
    assert stages["scratch"].init_history.runs == ()
    assert compare_with_paper(list(stages.values())) == []  # they name none


def test_the_pictures_of_a_figure_are_its_numbers(tmp_path: Path) -> None:
    """By hand: samples at the first version's temperature have no number; their picture stands beside the figure."""
    folder = made(tmp_path / RUNS / "sample", {}, **{"task.name": "sample", "task.paper": "samples_vq96"})
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**record, "files": {"samples": "samples.png"}}))
    (row,) = beside(folder)
    assert row.ours == "samples.png"


def test_other_images_are_other_groups(tmp_path: Path) -> None:
    """Invariant: runs on other datasets, classes or labels are no rows of one table, nor points of one picture.

    Images are the same wherever they were moved.
    """
    place = tmp_path / RUNS
    for name, data in {
        "letters": {"data.name": "letters", "data.path": "/a/letters", "data.n_class": 26},
        "digits": {"data.name": "digits", "data.path": "/a/digits", "data.n_class": 10},
        "parity": {"data.name": "digits", "data.path": "/a/digits", "data.n_class": 2, "data.label_column": "odd"},
        "moved": {"data.name": "digits", "data.path": "/b/digits", "data.n_class": 10},
    }.items():
        for model, value in (("s", 2.0), ("l", 1.5)):
            folder = made(place / f"{name}-{model}", loss(value, 0.01), model__name=model, task__name="probe", **data)
            begun = json.loads((folder / "run.json").read_text())
            hashes = {"data.path": "h" * 64}  # of names and sizes, which may agree by chance
            (folder / "run.json").write_text(json.dumps(begun | {"files_sha256": hashes}))
    result, folder = run_compare(tmp_path, "task.metric=val/accuracy")
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    tables = {part: [row["runs"] for row in rows if row["part"] == part] for part in {row["part"] for row in rows}}
    assert sorted(sorted({Path(run).name[:-2] for run in runs}) for runs in tables.values()) == [
        ["digits", "moved"], ["letters"], ["parity"],
    ]  # fmt: skip
    assert all(float(row["ours"]) == 1 / 1.5 for i, row in enumerate(rows) if row["part"] != rows[i - 1]["part"])
    assert len([key for key in result.numbers if key.startswith("best probe")]) == 3
    pictures = sorted(folder.glob("*.png"))
    assert [path.name for path in pictures] == [f"compare_probe_{i}.png" for i in (1, 2, 3)]
    assert {path.name for path in pictures} <= {str(path) for path in result.files.values()}
    mixed = summarize([place / "digits-s", place / "letters-s"], "val/accuracy")
    assert mixed.caution == "not comparable: these are of several datasets"


def test_a_long_label_is_within_its_picture(tmp_path: Path) -> None:
    """Invariant: the words under a dot plot end before its edges, however long they and the names of its rows are."""
    points = [Point(f"data.path=/a/b model={i} {'x' * 40}", 1.0, (1.0,), (0.9, 1.1), "one seed") for i in range(2)]
    points_figure(
        tmp_path / "a.png", points, label=f"val/loss_gen, nats/token\nnot comparable: {'several things ' * 20}"
    )
    ink = np.asarray(Image.open(tmp_path / "a.png").convert("L")) < 128
    below = ink[int(0.6 * len(ink)) :]  # rows of the label
    assert below.any(axis=1).sum() > 40
    assert not below[:, :2].any()
    assert not below[:, -2:].any()


def test_a_stage_that_is_named_as_a_run_is_left_out_once(tmp_path: Path) -> None:
    """Invariant: also where it is reached by a pipeline and by its own path."""
    stages = {"task.name": "pipeline", "task.requires": ["stages"], "task.stages": {"probe": {}}}
    folder = made(tmp_path / RUNS / "pipeline", loss(1.0), **stages)
    (folder / "1_probe").mkdir()
    (folder / "1_probe" / "run.json").write_text("{}")
    result, compared = run_compare(tmp_path, f"task.runs=[{folder},{folder}/../pipeline/1_probe]")
    assert result.numbers["compare/left_out"].value == 1
    assert (compared / "compare.txt").read_text().count("it is not finished") == 1


def test_encoders_stand_in_the_table_of_probes(tmp_path: Path) -> None:
    """By hand: one table, the best first, each row by its network; beside the paper, as another network."""
    large(tmp_path)
    key = "val/accuracy"
    ours = probe(tmp_path, key=key)
    of_encoder = {
        "task.name": "probe_encoder", "task.requires": ["images"], "task.encoder": "lite0", "data.name": "cifar10",
        "data.resolution": 32, "data.palette_size": 512, "task.paper": "probe_cifar10",
    }  # fmt: skip
    for size, accuracy in ((96, 0.97), (64, 0.95)):
        number = {key: Number(accuracy, "share", 5000, 0.002)}
        of = {"model": "lite0", "data": "cifar10-32", "objective": "none"}
        made(tmp_path / RUNS / f"lite0-{size}", number, of=of, **of_encoder, task__input_size=size)
    runs = [read_run(folder) for folder in (ours, *sorted((tmp_path / RUNS).glob("lite0-*")))]
    (title,) = summaries = compare.summarize_groups(runs, key)
    assert title == "probe"
    rows = summaries[title].rows
    assert [row.mean for row in rows] == [0.97, 0.96, 0.95]
    assert [row.settings.get("task.input_size") for row in rows] == ["96", None, "64"]
    assert [row.settings["model"] for row in rows] == ["lite0", "checkpoint", "lite0"]
    differs = [row.differs for row in beside(*(run.folder for run in runs[1:]))]
    assert differs == [["measured on val, not test", "on 5,000 images (paper: 10,000)", "another network, lite0"]] * 2
