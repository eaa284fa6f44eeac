"""What a sweep ends in, on made-up runs."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from igpt.metric.result import Curve, Number
from igpt.report import sweep_report
from igpt.report.page import render_page
from igpt.report.significant import format_measured
from igpt.report.summary import Summary, summarize
from igpt.report.sweep_pictures import average_curves, list_sweep_pictures
from igpt.report.sweep_report import MARKDOWN, PAGE, PICTURE, ROWS, report_sweep
from igpt.report.swept_values import find_swept, warn_of_edges
from tests.report.records import loss, made


def test_a_sweep_over_seeds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: means and deviations of two settings with two seeds each, the better first; a failed run is left out."""
    folders = [
        made(tmp_path / f"{model}-{seed}", loss(value), model__name=model, seed=seed)
        for model, seed, value in (("small", 0, 2.0), ("small", 1, 2.2), ("large", 0, 1.5), ("large", 1, 1.7))
    ]
    failed = tmp_path / "failed"
    failed.mkdir()
    place = tmp_path / "sweep"
    place.mkdir()
    with caplog.at_level("INFO"):
        report_sweep(place, [*folders, failed], metric="val/loss_gen", command="python train.py -m seed=0,1")
    rows = json.loads((place / ROWS).read_text())["rows"]
    assert [row["settings"] for row in rows] == [{"model": "large"}, {"model": "small"}]
    assert [row["mean"] for row in rows] == pytest.approx([1.6, 2.1])
    assert [row["deviation"] for row in rows] == pytest.approx([0.02**0.5, 0.02**0.5])
    page = (place / PAGE).read_text()
    assert "1.60 ± 0.14 (std)" in page
    assert "± … (std): standard deviation of the values whose mean this is" in page
    assert "failed" in page
    assert "python train.py -m seed=0,1" in page
    assert Image.open(place / PICTURE).size[0] > 300
    assert "model=large" in caplog.text


def test_other_images_are_another_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: each dataset has its best, table and picture; no row is ranked against one of the other."""
    folders = [
        made(tmp_path / f"{data}-{model}", loss(value), data__name=data, model__name=model)
        for data, model, value in (("a", "s", 2.0), ("b", "s", 1.0), ("a", "l", 1.5), ("b", "l", 1.2))
    ]
    lacking = made(tmp_path / "lacking", {})
    with caplog.at_level("INFO"):
        report_sweep(tmp_path, [*folders, lacking], metric="val/loss_gen", command="")
    rows = json.loads((tmp_path / ROWS).read_text())["rows"]
    assert [(row["data"], row["settings"]["model"], row["mean"]) for row in rows] == [
        ("data.name=a", "l", 1.5), ("data.name=a", "s", 2.0), ("data.name=b", "s", 1.0), ("data.name=b", "l", 1.2),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.glob("comparison*.png")} == {PICTURE, "comparison_2.png"}
    page = (tmp_path / PAGE).read_text()
    assert "Best of 2 on data.name=a: model=l." in page
    assert "Best of 2 on data.name=b: model=s." in page
    assert page.count("it has no val/loss_gen") == 1


def test_its_page_links_to_its_runs(tmp_path: Path) -> None:
    """Invariant: relative links, where there is a page; a picture that is gone is named."""
    folders = [made(tmp_path / "runs" / name, loss(value), model__name=name) for name, value in (("a b", 1), ("c", 2))]
    render_page(folders[0])
    path = sweep_report.write_comparison(
        tmp_path / "sweeps" / "x" / "report.html", [summarize(folders, "val/loss_gen")], command="again"
    )
    text = path.read_text()
    assert re.findall(r'href="(.*?)"', text) == ["../../runs/a%20b/report.html"]
    assert (path.parent / "../../runs/a b/report.html").is_file()
    assert "Best of 2: model=a b." in text
    assert "comparison.png is not there any more." in text


def test_a_picture_of_a_sweep_that_cannot_be_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: the page is there and says that the picture is not; the table is logged; a $ is drawn as such."""
    folders = [made(tmp_path / str(i), loss(value), model__name=f"$ {i} $") for i, value in enumerate((1.0, 2.0))]
    (tmp_path / PICTURE).mkdir()
    with caplog.at_level("INFO"):
        report_sweep(tmp_path, folders, metric="val/loss_gen", command="again")
    assert f"{tmp_path / PICTURE}: IsADirectoryError" in caplog.text
    assert "comparison.png is not there any more." in (tmp_path / PAGE).read_text()
    assert len(json.loads((tmp_path / ROWS).read_text())["rows"]) == 2
    (logged,) = [message for message in caplog.messages if "model=$ 0 $" in message]
    assert PICTURE not in logged
    (tmp_path / PICTURE).rmdir()
    report_sweep(tmp_path, folders, metric="val/loss_gen", command="again")
    assert Image.open(tmp_path / PICTURE).size[0] > 300


def test_a_metric_that_no_run_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: the first number in common stands for it, as of tokenizers, which have no loss per token."""
    numbers = [{"val/psnr": Number(value, "dB", 9), "parameters": Number(5, "weights", 1)} for value in (30.0, 31.0)]
    folders = [made(tmp_path / str(i), of, model__name=str(i)) for i, of in enumerate(numbers)]
    with caplog.at_level("INFO"):
        report_sweep(tmp_path, folders, metric="val/loss_gen", command="again")
    record = json.loads((tmp_path / ROWS).read_text())
    assert record["metric"] == "val/psnr"
    assert [row["mean"] for row in record["rows"]] == [31.0, 30.0]


def test_nothing_to_compare(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither one run nor none leaves anything; a page that cannot be written is only said."""
    one = made(tmp_path / "one", loss(2.0))
    with caplog.at_level("INFO"):
        for folders in ([one], [one, one], [tmp_path / "gone"], []):
            report_sweep(tmp_path, folders, metric="val/loss_gen", command="")
    assert not (tmp_path / PAGE).exists()
    other = made(tmp_path / "other", loss(1.0), model__name="b")
    (tmp_path / "no folder").write_text("")
    report_sweep(tmp_path / "no folder", [one, other], metric="val/loss_gen", command="")
    for name in (PICTURE, PAGE, ROWS):
        assert f"no folder/{name}: " in caplog.text
    assert sweep_report.PAGE == "report.html"


def curve(y: list[float], x: tuple[float, ...] = (10.0, 20.0)) -> Curve:
    return Curve(list(x), y, "optimiser step", "nats/token")


def sweep_rates(place: Path, losses: dict[float, float], **settings: object) -> Summary:
    """The summary of one run for each learning rate."""
    folders = [
        made(place / f"{rate}", loss(value), task__learning_rate=rate, **settings) for rate, value in losses.items()
    ]
    return summarize(folders, "val/loss_gen")


def test_a_rate_at_the_edge_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: of a geometric grid the largest is the best, then a larger one that broke down has been tried, too."""
    result = sweep_rates(tmp_path, {0.001: 2.0, 0.0003: 2.5, 0.003: 1.9})
    swept = find_swept(result)
    assert swept is not None
    assert (swept.key, swept.values, swept.is_geometric) == ("task.learning_rate", [0.0003, 0.001, 0.003], True)
    line = "the best task.learning_rate, 0.003, is the largest that was tried: try larger"
    assert warn_of_edges(result) == [line]
    folders = [row.folders[0] for row in result.rows]
    with caplog.at_level("INFO"):
        report_sweep(tmp_path, folders, metric="val/loss_gen", command="again")
    assert json.loads((tmp_path / ROWS).read_text())["warnings"] == [[line]]
    assert all(line in text for text in (caplog.text, (tmp_path / PAGE).read_text(), (tmp_path / MARKDOWN).read_text()))
    assert Image.open(tmp_path / "comparison_swept.png").size[0] > 300
    failed = made(tmp_path / "failed", loss(9.0), task__learning_rate=0.01)
    (failed / "result.json").unlink()
    assert warn_of_edges(summarize([*folders, failed], "val/loss_gen")) == []


def test_what_is_no_edge(tmp_path: Path) -> None:
    """By hand: one in the middle, what only costs, and 0, below which there is nothing; evenly spaced is linear."""
    assert warn_of_edges(sweep_rates(tmp_path / "a", {0.01: 2.0, 0.02: 1.0, 0.03: 2.0})) == []
    steps = [made(tmp_path / f"{n}", loss(1 / n), task__steps=n) for n in (1, 2, 3)]
    assert warn_of_edges(result := summarize(steps, "val/loss_gen")) == []
    assert (swept := find_swept(result)) is not None
    assert not swept.is_geometric
    decay = [made(tmp_path / f"d{n}", loss(1 + n), task__weight_decay=n) for n in (0.0, 0.1)]
    assert warn_of_edges(summarize(decay, "val/loss_gen")) == []


def test_curves_of_seeds_are_a_mean_and_a_band(tmp_path: Path) -> None:
    """By hand: ± the standard deviation at the steps that both have; over images, too, where batch sizes differ."""
    folders = [
        made(tmp_path / f"{size}-{seed}", loss(y), curves={"val/loss_gen": curve([y + 1, y])}, task__batch_size=size,
             seed=seed)
        for size, seed, y in ((8, 0, 1.0), (8, 1, 2.0), (16, 0, 1.4))
    ]  # fmt: skip
    result = summarize(folders, "val/loss_gen")
    (row,) = [row for row in result.rows if row.n == 2]
    mean = average_curves(row, "val/loss_gen")
    assert (mean.x, mean.y) == ([10, 20], [2.5, 1.5])
    assert mean.y_intervals is not None
    assert mean.y_intervals[1] == pytest.approx((1.5 - 0.5**0.5, 1.5 + 0.5**0.5))
    heights = []
    for some in (result, summarize(folders[:2], "val/loss_gen")):
        draw, _ = list_sweep_pictures(some)["curves"]
        draw(tmp_path / "curves.png")
        heights.append(Image.open(tmp_path / "curves.png").size[1])
    assert heights[0] > 1.7 * heights[1]  # a plot over steps and one over images
    no_curves = [made(tmp_path / model, loss(1.0), model__name=model) for model in "ab"]
    assert list_sweep_pictures(summarize(no_curves, "val/loss_gen")) == {}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number(1.86634, "nats/token", 2, deviation=0.02832), "1.866 ± 0.028 (std)"),
        (Number(6.210855, "nats/token", 9, interval=(6.210251, 6.211459)), "6.2109 [6.2103, 6.2115]"),
        (Number(0.58, "share", 150, interval=(0.5, 0.656)), "0.580 [0.500, 0.656]"),
        (Number(1.23456, "nats/token", 1), "1.23"),
        (Number(102016, "weights", 1), "102,016"),
        (Number(3, "layer", 1), "3"),
        (Number(0.0, "share", 1), "0"),
    ],
)
def test_digits_are_those_that_the_interval_supports(number: Number, text: str) -> None:
    """By hand: two digits of the uncertainty, at most four decimals; three of a number without one."""
    assert format_measured(number) == text


def test_a_pretrained_network_beside_one_from_scratch(quickstart: Path) -> None:
    """Invariant: their rows are told by one word each, and the page of a stage has the stage's name."""
    result = summarize([quickstart / "7_finetune", quickstart / "8_scratch"], "val/loss_clf")
    assert {row.name: row.folders[0].name for row in result.rows} == {
        "init=pretrain": "7_finetune", "init=scratch": "8_scratch",
    }  # fmt: skip
    page = (quickstart / "8_scratch" / "report.html").read_text()
    assert "<title>scratch · " in page
    assert "from weights that were never trained" in page
