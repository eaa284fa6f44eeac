"""The page of a run: what is in it, that it needs nothing else, and how a browser shows it."""

import base64
import functools
import io
import json
import logging
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from igpt.metric.result import Curve, Grid, Number, Result
from igpt.report import page as page_module
from igpt.report.facts import data_overrides, describe_images, next_commands, repeat_command, train_command
from igpt.report.folder import RunFolder
from igpt.report.page import render_page, write_page
from igpt.report.pictures import Picture, embed
from igpt.report.plots import MOST_POINTS, build_plots, thin
from igpt.report.runs import read_run
from igpt.report.style import css_variables
from igpt.report.summary import summarize
from igpt.report.sweep_report import write_comparison as sweep_page
from igpt.run.arguments import check_overrides
from igpt.run.launch import launch
from igpt.utils import files
from tests.app.test_compare import loss, made
from tests.test_conf import CONF

WEB = Path(page_module.__file__).parent / "web"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'single' & {{ 7 * 7 }}"
LINKING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "background"}


class Page(HTMLParser):
    """The tags of a page with their attributes, and all its text outside of script and style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text, self.inside = "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def finished(path: Path, result: Result, config: dict[str, Any] | None = None, task: str = "sample") -> RunFolder:
    """A run folder as a run that found `result` leaves it."""
    folder = RunFolder(path)
    plain: dict[str, Any] = {
        "seed": 0,
        "model": {"name": "igpt_nano"},
        "data": {"name": "digits", "resolution": 8},
        "objective": {"name": "ar"},
        "task": {"name": task, "requires": ["tokens"], "count": 4},
    }
    folder.start(plain | (config or {}), [f"task={task}", "seed=0"], {})
    folder.finish(task, result, seconds=235.6)
    return folder


def noise(path: Path, side: int) -> Path:
    """A picture that no compression makes small."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)
    return path


@pytest.fixture(scope="session")
def pipeline(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished quickstart, copied, to be written to."""
    place = tmp_path_factory.mktemp("pages") / quickstart.name
    shutil.copytree(quickstart, place, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    return place


ROW = re.compile(
    r'<tr><th scope="row">([^<]+)<code>(.+?)</code></th><td class="value">(.+?)</td><td class="value">(.+?)</td>'
)


def test_every_number_and_every_point_of_a_curve_is_there(quickstart: Path) -> None:
    """Independent source: result.json: values to four digits, intervals to three, shares in percent; each with a name.

    Every run and stage has left its page.
    """
    for folder in (quickstart, *quickstart.glob("[1-8]_*")):
        record = json.loads((folder / "result.json").read_text())
        page = Page(folder / "report.html")
        rows = {key: of for *of, key in map(_read_row, ROW.findall((folder / "report.html").read_text()))}
        assert rows.keys() == record["numbers"].keys()
        for key, number in record["numbers"].items():
            name, (value, *ends), n = rows[key]
            assert name not in key
            scale = 100 if number["unit"] == "share" else 1
            assert value == pytest.approx(scale * number["value"], rel=5e-4, abs=0.051 if scale > 1 else 5.1e-5)
            interval = number["interval"]
            if interval is None and number["stderr"] is not None:
                interval = [number["value"] + side * 1.96 * number["stderr"] for side in (-1, 1)]
            assert ends == pytest.approx([scale * end for end in interval or ()], rel=5.1e-3, abs=0.051)
            assert n == number["n"]
            assert number["features"] in page.text
        lines = {tag["data-key"]: tag for tag in page.all("g")}
        drawn = {key: curve for key, curve in record["curves"].items() if key in lines}
        assert {key for key, curve in record["curves"].items() if len(curve["x"]) > 1} <= drawn.keys()
        for key, curve in drawn.items():
            assert [float(x) for x in lines[key]["data-x"].split()] == pytest.approx(curve["x"])
            assert [float(y) for y in lines[key]["data-y"].split()] == pytest.approx(curve["y"], rel=1e-5)
        assert record["versions"]["torch"] in page.text
        assert record["commit"].removesuffix("-dirty") in page.text


def _read_row(cells: tuple[str, ...]) -> tuple[str, list[float], int, str]:
    """(name, value and ends of its interval, n, key) of a row of numbers."""
    name, key, value, n = cells
    figures = re.findall(r"-?[\d,]*\.?\d+(?:e[+-]?\d+)?", value)
    plain = [float(figure.replace(",", "")) for figure in figures]
    return name, plain if "[" in value else plain[:1], int(n.replace(",", "")), key.replace("<wbr>", "")


def test_part_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", Result()).path
    (part := folder / ".report.html.abcdefgh.part").touch()
    render_page(folder)
    assert not part.exists()


def test_fits_that_did_not_converge_are_shown(tmp_path: Path) -> None:
    """Invariant: a probe's page names them, escaped; a page without any has no such line."""
    text = "probe, layer 3, C = 100: up to 2.1e-04 nats"
    results = Result(provenance={"not_converged": [text, "<b>"]}), Result(provenance={"suboptimality": 1e-7})
    runs = (finished(tmp_path / str(i), result, task="probe") for i, result in enumerate(results))
    shown, plain = (Page(render_page(run.path)) for run in runs)
    assert f"Not fitted to their optimum: {text}; <b>." in shown.text
    assert "b" not in {tag for tag, _ in shown.tags}
    assert "Not fitted" not in plain.text


def test_lines_go_through_their_points() -> None:
    """By hand: the drawing is 1,000 wide and high from the top left, with 2 % and 6 % of room on each side."""
    (plot,) = build_plots(
        {"a": Curve([0.0, 50.0, 100.0], [1.0, 2.0, 1.5], "step", "nats"), "b": Curve([0.0], [1.0], "s", "")}
    )
    x = [1000 * (place + 0.02) / 1.04 for place in (0, 0.5, 1)]
    y = [1000 * (1 - (place + 0.06) / 1.12) for place in (0, 1, 0.5)]
    assert np.asarray(plot.lines[0].points) == pytest.approx(np.transpose([x, y]), abs=0.06)
    assert plot.x_ticks[0] == (pytest.approx(100 * 0.02 / 1.04, abs=0.01), "0")
    assert plot.rows == [("0", ["1"]), ("50", ["2"]), ("100", ["1.5"])]


def test_a_long_curve_keeps_its_ends_and_extremes(tmp_path: Path) -> None:
    """Invariant: what is left out is said, and no peak is."""
    y = np.random.default_rng(0).normal(size=30_000).tolist()
    y[12_345], y[20_001] = 9.0, -9.0
    kept = thin(y, MOST_POINTS)
    assert {0, 12_345, 20_001, 29_999} <= set(kept)
    assert len(kept) <= MOST_POINTS + 2
    curve = Curve([float(step) for step in range(30_000)], y, "step", "nats")
    page = Page(render_page(finished(tmp_path / "run", Result(curves={"train/loss_gen": curve})).path))
    assert f"({len(kept):,} of 30,000 points drawn)" in page.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # 99 names below a plot
def test_many_curves_leave_the_page_small(tmp_path: Path) -> None:
    """Invariant: below 5 MB, however many there are."""
    x = [float(step) for step in range(3000)]
    curves = {
        f"run {i}": Curve(x, np.random.default_rng(i).normal(size=3000).tolist(), "step", "nats") for i in range(99)
    }
    assert render_page(finished(tmp_path / "run", Result(curves=curves)).path).stat().st_size < 5_000_000


def test_whatever_it_is_given_comes_out_as_text(tmp_path: Path) -> None:
    """Invariant: names and values from config and result are shown as they are, and make no tag and no attribute."""
    result = Result(
        numbers={HOSTILE: Number(1.5, HOSTILE, 3, features=HOSTILE)},
        curves={HOSTILE: Curve([0.0, 1.0], [0.0, 1.0], HOSTILE, HOSTILE)},
        files={HOSTILE: Path(f"{HOSTILE.replace('/', '')}.png")},
        provenance={HOSTILE: HOSTILE},
    )
    config: dict[str, Any] = {
        "data": {"name": HOSTILE, "resolution": 8, "path": HOSTILE},
        "published": [HOSTILE],
        "init": HOSTILE,
        "task": {"name": "pipeline", "requires": [], "stages": {"a": {"run": "gone", HOSTILE: HOSTILE}}},
        HOSTILE: {HOSTILE: HOSTILE},
    }
    path = render_page(finished(tmp_path / "run", result, config, task="pipeline").path)
    plain = render_page(finished(tmp_path / "plain", Result(curves=result.curves)).path)
    page = Page(path)
    assert page.text.count(HOSTILE) >= 12
    assert not page.all("img")
    assert len(page.all("script")) == 1
    known = {key for tag in Page(plain).tags for key in tag[1]} | {"open", "class", "href", "id"}
    assert {key for tag in page.tags for key in tag[1]} <= known
    numbers = {HOSTILE: Number(1.5, HOSTILE, 3)}
    runs = [made(tmp_path / name, numbers, model__name=name) for name in ("<b>", "&lt;")]
    compared = Page(sweep_page(tmp_path / "c.html", [summarize([*runs, tmp_path / "<i>"], HOSTILE)], command=HOSTILE))
    assert compared.text.count(HOSTILE) == 2 + 2 + 1 + 1  # title and heading, table, picture, command
    assert all(compared.text.count(name) for name in ("model=<b>", "model=&lt;", "<i>"))
    assert len(compared.all("script")) == 1
    assert not compared.all("img")


NAMES = (HOSTILE, "כלב", "two\nlines", "\u202eevil", "x" * 300, "👩\u200d🌾", "\udcff", "$x$")


def classified(path: Path, names: tuple[str, ...] | None) -> RunFolder:
    """A run that took 8 · (row + 1) + column images of each class of eight for each other."""
    result = Result()
    result.add_confusion(8 * np.arange(1, 9)[:, None] + np.arange(8), names)
    return finished(path, result, task="evaluate")


def test_cells_of_a_confusion_matrix_have_names(tmp_path: Path) -> None:
    """Round trip: names and counts of every cell are those of the result. Invariant: names are text, one line each."""
    page = Page(render_page(classified(tmp_path / "run", NAMES).path))
    (figure,) = (of for of in page.all("figure") if "data-k" in of)
    assert figure["data-k"] == "8"
    cells = [[cell.split(":") for cell in row.split(",")] for row in figure["data-counts"].split(";")]
    rows = [{int(column): int(count) for column, count in row} for row in cells]
    assert rows == [{column: 8 * (row + 1) + column for column in range(8)} for row in range(8)]
    shown = [HOSTILE[:39] + "…", "כלב", "two lines", "\ufffdevil", "x" * 39 + "…", "👩\u200d🌾", "\ufffd", "$x$"]
    assert "Classes" + "".join(shown) in page.text
    assert (len(page.all("bdi")), len(page.all("script")), len(page.all("img"))) == (
        8 + 16,
        1,
        1,
    )  # and the table of classes
    unnamed = Page(render_page(classified(tmp_path / "unnamed", None).path))
    assert len([of for of in unnamed.all("figure") if "data-k" in of]) == 1
    assert "class 0" in unnamed.text


@pytest.mark.parametrize("fault", ["gone", "text", "cut", "zip", "shape", "number", "older"])
def test_a_picture_is_shown_without_its_counts(tmp_path: Path, fault: str) -> None:
    """Invariant: whatever lies in their place, the page is written, with the picture alone."""
    folder = classified(tmp_path / "run", NAMES).path
    place = folder / "confusion_counts.npy"
    if fault == "gone":
        place.unlink()
    elif fault == "text":
        place.write_text("no array")
    elif fault == "cut":
        place.write_bytes(place.read_bytes()[:-8])
    elif fault == "zip":
        with place.open("wb") as file:
            np.savez(file, counts=np.eye(8))
    elif fault == "older":  # a picture that does not say where its cells are
        Image.new("RGB", (50, 50)).save(folder / "confusion.png")
    else:
        np.save(place, np.zeros((8, 7), np.int64) if fault == "shape" else np.float64(1.0))
    page = Page(render_page(folder))
    assert len(page.all("img")) == 1
    assert not [of for of in page.all("figure") if "data-k" in of]


@pytest.mark.slow
def test_many_classes_leave_the_page_small(tmp_path: Path) -> None:
    """Invariant: below 5 MB with 1,000 long names and every cell taken; then no counts are told."""
    result = Result()
    result.add_confusion(np.ones((1000, 1000), np.int64), tuple(f"{i} {'<' * 300}" for i in range(1000)))
    path = render_page(finished(tmp_path / "run", result).path)
    assert path.stat().st_size < 5_000_000
    (figure,) = (of for of in Page(path).all("figure") if "data-k" in of)
    assert (figure["data-k"], figure["data-counts"]) == ("1000", "")


def test_a_page_needs_nothing_but_itself(pipeline: Path) -> None:
    """Invariant: pictures are in it; links lead within it, or to other pages of the run, which are there."""
    page = Page(pipeline / "report.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [(tag, value) for tag, attributes in page.tags for key, value in attributes.items() if key in LINKING]
    for tag, value in links:
        if tag == "img":
            assert value.startswith("data:image/png;base64,")
        elif value.startswith("#"):
            assert value[1:] in ids
        else:
            assert tag == "a"
            assert (pipeline / unquote(value)).is_file()
    assert {value for tag, value in links if tag == "a" and not value.startswith("#")} == {
        f"{stage.name}/report.html" for stage in pipeline.glob("[1-8]_*")
    }
    for stage in pipeline.glob("[1-8]_*"):
        assert {tag["href"] for tag in Page(stage / "report.html").all("a")} == {"../report.html"}
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "form", "audio", "video"}
    style = (WEB / "style.css").read_text() + (WEB / "hover.js").read_text()
    assert not re.search(r"url\(|@import|https?:|fetch|XMLHttp|import\(|innerHTML", style)
    assert all(tag["alt"] for tag in page.all("img"))
    assert len(page.all("h1")) == 1


def test_the_pictures_of_a_run_are_in_its_page(pipeline: Path) -> None:
    """Round trip: the data of every picture is the file's, but for the curves, which are drawn anew."""
    record = json.loads((pipeline / "result.json").read_text())
    expected = {path for path in record["files"].values() if path.endswith(".png") and "curves" not in path}
    shown = [base64.b64decode(tag["src"].partition(",")[2]) for tag in Page(pipeline / "report.html").all("img")]
    assert sorted(shown) == sorted((pipeline / path).read_bytes() for path in expected)
    pretrained = Page(pipeline / "2_pretrain" / "report.html")
    samples = [*(pipeline / "2_pretrain" / "samples").glob("step_*.png")]
    by_position = [*(pipeline / "2_pretrain" / "loss_by_position").glob("step_*.png")]
    assert (len(pretrained.all("img")), len(samples), len(by_position)) == (3, 2, 1)


def test_large_pictures_are_shrunk_and_that_is_said(tmp_path: Path) -> None:
    """Invariant: below 5 MB; what is shown smaller or left out is named; a picture keeps its shape."""
    folder = finished(tmp_path / "run", Result(files={f"samples_{i}": Path(f"{i}.png") for i in range(4)})).path
    for i in range(4):
        noise(folder / f"{i}.png", 1100 + i)
    path = render_page(folder)
    assert 1_000_000 < path.stat().st_size < 5_000_000
    page = Page(path)
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(tag["src"].partition(",")[2]))).size for tag in page.all("img")
    ]  # fmt: skip
    assert len(sizes) == 4
    assert all(
        width == height and width in {(1100 + i) // 2**n for i in range(4) for n in (0, 1, 2)}
        for width, height in sizes
    )
    assert page.text.count("is shown smaller than it is") == sum(width < 1100 for width, _ in sizes) >= 3
    (left_out,) = embed([Picture("Samples", "", folder / "0.png", "0.png")], budget=1000)
    assert left_out.png == b""
    assert "left out" in left_out.note


def test_missing_and_damaged_pictures_are_named(tmp_path: Path) -> None:
    """Invariant: the page is written with what there is."""
    grid = Grid(np.zeros((2, 2, 4, 4, 3), np.uint8))
    folder = finished(tmp_path / "run", Result(grids={"samples": grid, "completions": grid, "more_samples": grid}))
    (folder.path / "samples.png").unlink()
    body = (folder.path / "completions.png").read_bytes()
    (folder.path / "completions.png").write_bytes(body[: len(body) // 2])
    page = Page(render_page(folder.path))
    assert "samples.png is not there any more." in page.text
    assert re.search(r"completions\.png cannot be read \(\w+\): it is damaged\.", page.text)
    assert len(page.all("img")) == 1


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"version": 1, "task": "sample"}', None, "names"],
    ids=["cut short", "a list", "without numbers", "curves of text", "classes of numbers"],
)
def test_a_damaged_result_is_an_error_and_no_end_of_a_run(
    content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished(tmp_path / "run", Result(curves={"a": Curve([1.0, 2.0], [1.0, 2.0], "x", "y")}))
    place = folder.path / "result.json"
    if content in (None, "names"):
        record = folder.read_result()
        record["curves"]["a"]["y"] = ["1", "2"] if content is None else [1, 2]
        record["class_names"] = {"confusion": [1, 2] if content == "names" else ["a", "b"]}
        content = json.dumps(record)
    place.write_text(content)
    with pytest.raises(ValueError, match=r"result\.json.*(damaged|another version)"):
        render_page(folder.path)
    with caplog.at_level(logging.WARNING):
        write_page(folder.path)
    assert "report.html: " in caplog.text


def test_what_was_not_written_is_on_the_page(tmp_path: Path) -> None:
    """Invariant: the file and the error, as text, under their heading; no heading where all was written."""
    grids = {"<b>": Grid(np.zeros(3)), "samples": Grid(np.zeros((1, 1, 4, 4, 3), np.uint8))}
    text = render_page(finished(tmp_path / "run", Result(grids=grids)).path).read_text()
    section = text.partition('<section id="not-written">')[2].partition("</section>")[0]
    assert re.search(r"&lt;b&gt;.*png", section)
    assert "ValueError" in section
    assert "<b>" not in text
    grids.pop("<b>")
    assert "not-written" not in render_page(finished(tmp_path / "other", Result(grids=grids)).path).read_text()


def test_a_run_ends_well_without_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: whatever happens while it is written, only that is logged; an older page stays as it was."""
    folder = finished(tmp_path / "run", Result(numbers={"a": Number(1.0, "b", 1)}))
    before = render_page(folder.path).read_bytes()
    monkeypatch.setattr(page_module, "embed", lambda *_, **__: [].pop())
    with caplog.at_level(logging.WARNING):
        write_page(folder.path)
    assert "report.html: " in caplog.text
    assert (folder.path / "report.html").read_bytes() == before
    assert not list(folder.path.glob(".*.part"))


def report_task(*runs: Path) -> Result:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["task=report", f"task.runs=[{','.join(map(str, runs))}]"])
    return launch(cfg, choices={}, overrides=[])


def test_pages_of_old_runs_are_written_anew(pipeline: Path, tmp_path: Path) -> None:
    """Invariant: task=report leaves the page that the run left, also of each stage, and no folder of its own."""
    place = tmp_path / pipeline.name
    shutil.copytree(pipeline, place)
    before = {path: path.read_text() for path in place.rglob("report.html")}
    assert len(before) == 9
    for path in before:
        path.unlink()
    report_task(place)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    for path, text in before.items():  # told from where each was written
        texts = [of.replace(str(place), "RUN").replace(f"runs/{place.name}", "RUN") for of in (path.read_text(), text)]
        assert texts[0] == texts[1]


def test_task_report_names_every_bad_run(tmp_path: Path) -> None:
    """Invariant: nothing is written when one of them is none."""
    good = finished(tmp_path / "good", Result()).path
    files.write_json(finished(tmp_path / "old", Result()).path / "result.json", {"version": 99})
    with pytest.raises(ValueError, match=r"nowhere: this is no run folder; .*old.*another version"):
        report_task(good, tmp_path / "nowhere", tmp_path / "old")
    assert not (good / "report.html").exists()
    with pytest.raises(ValueError, match=r"task\.runs=\[RUN_FOLDER"):
        report_task()


def test_what_to_type_next_is_understood(pipeline: Path) -> None:
    """Round trip: every command of the pages composes, and reads the run's own data."""
    seen, requested = set[str](), set[tuple[str, ...]]()
    for folder in (pipeline, *pipeline.glob("[1-8]_*")):
        run = read_run(folder)
        for _, text in next_commands(run):
            overrides = text.removeprefix("python train.py ").split()
            seen.add(overrides[0])
            requested.add(tuple(override for override in overrides if not override.startswith(("init=", "resume="))))
        assert repeat_command(run).startswith("python train.py experiment=quickstart data=digits model.n_layer=2")
    for overrides in map(list, requested):
        check_overrides(overrides, [CONF])
    assert {"task=sample", "task=complete", "task=probe", "task=finetune", "task=evaluate"} < seen
    (pipeline_resumes,) = (text for text in seen if text.startswith("resume="))
    assert pipeline_resumes == f"resume={pipeline}"
    assert train_command("a=b c", "d=[1]") == "python train.py 'a=b c' 'd=[1]'"


def test_a_network_of_masked_pixels_is_asked_for_no_images(tmp_path: Path) -> None:
    """Invariant: it draws none; other data come with the run's own settings."""
    folder = finished(tmp_path / "r-igpt_micro-cifar1016-bert-s0-12345678", Result(), task="pretrain")
    begun = json.loads((folder.path / "run.json").read_text())
    begun["overrides"] = ["data=cifar10", "data.path='/my data'", "data.labels_per_class=25"]
    begun["of"] = {"model": "igpt_micro", "data": "cifar1016", "objective": "bert", "data_option": "cifar10"}
    files.write_json(folder.path / "run.json", begun)
    record = folder.read_result()
    record["config"]["data"] = {"name": "cifar10", "resolution": 16, "path": "/my data"}
    files.write_json(folder.path / "result.json", record)
    files.write_json(folder.path / "model" / "config.json", {})
    run = read_run(folder.path)
    assert not any("task=sample" in text or "task=complete" in text for _, text in next_commands(run))
    assert data_overrides(run) == [
        "data=cifar10",
        "data.resolution=16",
        "data.path='/my data'",
        "data.labels_per_class=25",
    ]
    assert "cifar10 at 16×16" in describe_images(run)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (
            {"name": "pretrain", "steps": 12_345, "batch_size": 128},
            "igpt_nano learns to predict the next pixel of digits at 8×8, in 12,345 steps of 128 images.",
        ),
        (
            {"name": "finetune", "steps": 200, "batch_size": 64},
            "igpt_nano learns the classes of digits at 8×8, in at most 200 steps of 64 images.",
        ),
        ({"name": "sample", "count": 2000}, "2,000 images drawn from igpt_nano, which was trained on digits."),
        ({"name": "pretrain"}, "A run of task=pretrain."),  # settings of another release
        ({"name": "later"}, "A run of task=later."),
    ],
)  # fmt: skip
def test_a_run_in_a_sentence(tmp_path: Path, task: dict[str, Any], sentence: str) -> None:
    """By hand."""
    folder = finished(tmp_path / "run", Result(), {"task": {"requires": [], **task}}, task["name"])
    assert sentence in Page(render_page(folder.path)).text


def test_what_is_predicted(tmp_path: Path) -> None:
    """By hand: of a palette's tokens pixels, of others what they stand for."""
    task = {"name": "pretrain", "requires": [], "steps": 2, "batch_size": 8}
    for target, objective, predicted in (
        ("igpt.tokens.vqvae_tokenizer.VQVAESettings", "ar", "the next code of a VQ-VAE of digits"),
        ("igpt.tokens.patches.PatchSettings", "bert", "masked patches of digits"),
        ("igpt.tokens.palette_tokenizer.PaletteSettings", "bert", "masked pixels of digits"),
    ):
        config = {"task": task, "tokens": {"_target_": target}, "objective": {"name": objective}}
        folder = finished(tmp_path / f"{target}-{objective}", Result(), config, "pretrain").path
        assert f"learns to predict {predicted}" in Page(render_page(folder)).text


def test_numbers_to_be_seen_first(tmp_path: Path) -> None:
    """By hand: shares as percent, with their interval or deviation; what it was measured on."""
    for number, text in (
        (Number(0.917, "share", 1300, 0.01, (0.9, 0.95)), "91.7%test accuracy95 %: 90.0 to 95.0, n = 1,300"),
        (Number(0.5, "share", 3, deviation=0.02), "50.0%test accuracy± 2.0 (std), n = 3"),
        (
            Number(0.5, "nats", 9, 0.01, features="layer 3"),
            "0.5000natstest accuracy95 %: 0.480 to 0.520, n = 9layer 3",
        ),
        (Number(400_640, "weights", 1), "400,640weightstest accuracy\n"),
    ):
        page = render_page(finished(tmp_path / number.unit / text[:3], Result(numbers={"test/accuracy": number})).path)
        assert text in Page(page).text


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    result = Result(numbers={"test/accuracy": Number(0.471, "share", 10_000, 0.005, (0.4612, 0.4808))})
    config = {"published": ["test/accuracy 0.963: iGPT-L (Chen et al. 2020)", "BERT: below AR"]}
    page = Page(render_page(finished(tmp_path / "run", result, config).path))
    assert "test/accuracy 0.963: iGPT-L (Chen et al. 2020)47.1 % [46.1, 48.1]" in page.text
    assert "BERT: below AR–" in page.text


def test_colours_are_told_apart_in_light_and_dark() -> None:
    """Independent source: WCAG 2.2, 1.4.3 and 1.4.11: 4.5 to 1 for text, 3 to 1 for lines."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", css_variables(theme))) for theme in ("light", "dark"))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for scheme in (light, dark):
        for name in ("ink", "muted", "link", *(f"c{i}" for i in range(8))):
            for behind in ("paper", "card"):
                high, low = sorted((luminance(scheme[name]), luminance(scheme[behind])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= (3 if name.startswith("c") else 4.5)


LOOK = """
<body><script>
const frames = [...document.querySelectorAll("iframe")];
const addresses = %s;
const found = {};
let left = 0;
for (const [name, sandbox] of [["plain", null], ["no_script", "allow-same-origin"]])
  for (const [i, address] of addresses.entries()) {
    const frame = document.createElement("iframe");
    left++;
    frame.width = 375;
    frame.height = 800;
    if (sandbox) frame.setAttribute("sandbox", sandbox);
    frame.onload = async () => {
      const page = frame.contentDocument, root = page.documentElement;
      for (const details of page.querySelectorAll("details")) details.open = true;
      const images = [...page.images];
      await Promise.all(images.map((image) => image.decode().catch(() => {})));
      const area = page.querySelector(".area"), box = area && area.getBoundingClientRect();
      if (area) {
        area.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", {clientX: box.right - 1}));
        area.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {key: "ArrowLeft"}));
      }
      const tip = page.querySelector(".area .tip:not([hidden])");
      const cells = page.querySelector(".cells"), place = cells && cells.getBoundingClientRect();
      if (cells) {
        const at = {clientX: place.left + 0.25 * place.width, clientY: place.top + 0.75 * place.height};
        cells.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
        cells.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {key: "ArrowDown"}));
      }
      const cell = page.querySelector(".cells .tip:not([hidden])");
      found[`${name} ${i}`] = {
        images: images.length, loaded: images.filter((image) => image.naturalWidth > 0).length,
        room: root.clientWidth, wide: root.scrollWidth, height: root.scrollHeight,
        crisp: images.filter((image) => getComputedStyle(image).imageRendering === "pixelated").length,
        tip: tip && tip.innerText, cell: cell && cell.innerText,
      };
      if (--left === 0) {
        const said = document.createElement("pre");
        said.textContent = JSON.stringify(found);
        document.body.replaceChildren(said);
      }
    };
    frame.src = address;
    document.body.append(frame);
  }
</script>
"""


@functools.cache
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("needs a headless Chromium, which is not there: apt-get install chromium (Debian's package)")


def test_a_browser_shows_it_on_a_phone(pipeline: Path, tmp_path: Path) -> None:
    """Invariant: at 375 pixels nothing is wider than the page, pictures load, hovering says values, no errors.

    The same without JavaScript, but for the hovering.
    """
    runs = [made(tmp_path / name, loss(2.0), model__name=f"{name}{'0123456789' * 4}") for name in "ab"]
    compared = sweep_page(tmp_path / "comparison.html", [summarize(runs, "val/loss_gen")], command="again " * 99)
    named = render_page(classified(tmp_path / "named", NAMES).path)
    shown = [pipeline / "report.html", *sorted(pipeline.glob("[267]_*/report.html")), compared, named]
    look = tmp_path / "look.html"
    look.write_text(LOOK % json.dumps([path.as_uri() for path in shown]))
    done = subprocess.run(
        [
            chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--allow-file-access-from-files", "--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}", look.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if "sandboxed" not in line]  # that scripts were blocked, where asked for
    match = re.search(r"<pre>(\{.*\})</pre>", done.stdout)
    assert match, done.stdout[-2000:]
    found = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert len(found) == 2 * len(shown)
    for name, seen in found.items():
        assert seen["wide"] == seen["room"] == 375, name
        assert seen["loaded"] == seen["images"], name
        assert seen["height"] > 300, name
    assert found["plain 0"]["images"] == found["no_script 0"]["images"] == 8
    assert found["plain 0"]["crisp"] == 4  # samples, completions, palette; confusion matrices are diagrams
    record = json.loads((pipeline / "2_pretrain" / "result.json").read_text())
    last = record["curves"]["train/loss_gen"]
    assert f"training loss\n{last['y'][-2]:.6g}" in found["plain 1"]["tip"].replace("\n\n", "\n")
    assert f"optimiser step {last['x'][-2]:.0f}" in found["plain 1"]["tip"]
    assert found["no_script 1"]["tip"] is None
    assert found["plain 5"]["cell"].split("\n") == [
        "class", "$x$", "taken for", "two lines", "images", "66 of 540, 12.2 %",
    ]  # fmt: skip
    assert found["no_script 5"]["cell"] is None
