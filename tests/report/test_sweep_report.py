"""What a sweep ends in, on made-up runs."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from igpt.metric.result import Number
from igpt.report import sweep_report
from igpt.report.page import render_page
from igpt.report.summary import summarize
from igpt.report.sweep_report import PAGE, PICTURE, ROWS, report_sweep
from tests.app.test_compare import loss, made


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
    assert "1.6000 ± 0.1414 (std)" in page
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
