"""A run folder that was sent: what its records name outside of it is not opened, and nothing in it takes memory."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from igpt.app.against import compare_with_paper
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.resume import latest_checkpoint, read_best, read_latest
from igpt.metric.result import Number, Result
from igpt.report.closing_table import closing_table
from igpt.report.found_runs import FoundRuns
from igpt.report.page import render_page
from igpt.report.runs import read_run
from igpt.report.style import CELLS
from igpt.training import loggers
from igpt.utils.files import resolve_below
from tests.report.records import Page, finished

SECRET = "a secret of mine"


def test_a_path_below_a_folder(tmp_path: Path) -> None:
    """By hand: relative paths below it, also through `..` and links that stay; none that leave it."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    for place in (folder / "sub", outside):
        place.mkdir(parents=True)
    (folder / "out").symlink_to(outside)
    (folder / "in").symlink_to("sub")
    (folder / "loop").symlink_to("loop")
    for path in ("a.png", "sub/a.png", "sub/../a.png", "in/a.png", "../run/a.png", "."):
        assert resolve_below(folder, path) == folder / path
    for path in (
        "../a",
        "..",
        "out/a",
        "out",
        str(outside),
        str(folder / "a.png"),
        "loop/a",
        "a\0b",
        "/",
        "in/../../a",
    ):
        assert resolve_below(folder, path) is None, path
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be reached by a link
    assert resolve_below(tmp_path / "link", "a.png") == tmp_path / "link" / "a.png"


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A run folder with files that lie outside of it, by `..`, absolute and by links, beside one of its own."""
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "notes.txt").write_text(SECRET)
    (outside / "counts.npy").write_text(SECRET)
    picture = outside / "photo.png"
    info = PngInfo()
    info.add_text(CELLS, "0 0 1 1")
    Image.new("RGB", (8, 8), "red").save(picture, pnginfo=info)
    folder = tmp_path / "sent" / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "linked.txt").symlink_to(outside / "notes.txt")
    (folder / "samples" / "step_0000001.png").symlink_to(picture)
    (folder / "own.txt").write_text("my own words")
    names = {
        "a": "../../home/notes.txt", "b": str(outside / "notes.txt"), "c": "linked.txt", "d": "../../home/photo.png",
        "e": str(picture), "own": "own.txt",
    }  # fmt: skip
    finished(folder, Result(files={name: Path(path) for name, path in names.items()}))
    return folder


def test_no_file_outside_is_shown(sent: Path) -> None:
    """Invariant: neither content nor name, in page and closing table; that something is left out is said."""
    page = Page(render_page(sent))
    assert "my own words" in page.text
    assert "5 of the files that result.json names lie outside" in page.text
    assert not page.all("img")
    run = read_run(sent)
    for text in (page.text, closing_table(run.result, sent, 1.0)):
        assert "my own words" in text
        assert not any(word in text for word in (SECRET, "notes.txt", "linked.txt", "photo.png"))


def test_no_picture_outside_is_uploaded(sent: Path, caplog: Any) -> None:
    class Board:
        summary: dict[str, Any] = {}  # noqa: RUF012

        def log(self, shown: dict[str, Any]) -> None:
            raise AssertionError(f"{shown} was uploaded")

    other = MagicMock(spec=["log_metrics", "log_image"])
    loggers.show([MagicMock(spec=WandbLogger, experiment=Board()), other], read_run(sent).result, sent)
    assert "was uploaded" not in caplog.text
    other.log_image.assert_not_called()


def test_no_run_outside_is_read(tmp_path: Path) -> None:
    """Invariant: a pipeline's stages lie in its folder or beside it, initial weights beside the run.

    A stage that is the pipeline itself ends no loop.
    """
    secret = Result(numbers={"test/accuracy": Number(0.123, "share", 10)}, provenance={"init": {"model": SECRET}})
    outside = finished(tmp_path / "home" / "secret-run", secret, task="probe").path
    place = tmp_path / "sent" / "pipeline"
    (place / "2_b").parent.mkdir(parents=True)
    (place / "2_b").symlink_to(outside)
    beside = finished(tmp_path / "sent" / "beside", Result(), task="probe").path
    stages = {
        "a": {"run": str(outside)}, "b": {}, "../../../home/secret-run": {}, "c": {"run": "../home/secret-run"},
        "d": {"run": "gone/beside"}, "e": {"run": str(place)},
    }  # fmt: skip
    config = {
        "init": str(outside),
        "task": {"name": "pipeline", "requires": [], "stages": stages, "paper": "scaling", "runs": [str(outside)]},
    }
    run = read_run(finished(place, Result(), config, task="pipeline").path)
    assert [stage.folder if stage.run else None for stage in run.stages] == [None, None, None, None, beside, place]
    page = Page(render_page(place))
    assert page.text.count("it lies outside of the folder of runs") == 2
    assert page.text.count("this is no run folder") == 2  # beside it, where the others might have been moved
    assert "12.3" not in page.text
    assert not page.all("a")
    assert not list(outside.glob("report.html"))
    assert run.init_history.runs == ()
    assert "not beside the run" in run.init_history.unknown
    assert SECRET not in str(run.init_history)
    assert str(place) in FoundRuns([run]).input_hashes
    assert compare_with_paper([run]) == []


@pytest.mark.parametrize("name", ["../../home/step_0000001.ckpt", "/etc/passwd", "step_1.ckpt/../x", "a\0b", "x" * 999])
def test_pointers_are_names_of_checkpoints(tmp_path: Path, name: str) -> None:
    """Invariant: a pointer to anything else is none; checkpoints are found without it."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "latest").write_text(name)
    (folder / "best.json").write_text(json.dumps({"checkpoint": name, "step": 1, "name": "x", "value": 1.0}))
    assert read_latest(folder) is None
    assert read_best(folder.parent) is None
    with pytest.raises(ValueError, match="holds no checkpoint that is whole"):
        latest_checkpoint(folder.parent)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below
        find_weights(str(folder.parent))
    assert name not in str(error.value)
    (folder / "latest").write_text("step_0000001.ckpt\n")
    (folder / "best.json").write_text('{"checkpoint": "step_0000001.ckpt", "step": 1, "name": "x", "value": 1.0}')
    assert read_latest(folder) == folder / "step_0000001.ckpt"
    assert (read_best(folder.parent) or {})["step"] == 1


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"checkpoint": 5, "step": 1, "value": 1}',
        '{"checkpoint": "step_1.ckpt", "step": 2, "value": 1}',
        '{"checkpoint": "step_1.ckpt", "step": 1, "value": NaN}',
        "[" * 100_000,
    ],
    ids=range(6),
)
def test_a_damaged_record_of_the_best_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.json").write_text(content)
    assert read_best(tmp_path) is None


def test_no_file_takes_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: of a picture of 64 million pixels, counts of 2⁴⁰ cells, a long text and a pipe none is read."""
    names = {"big": "big.png", "big_counts": "big_counts.npy", "small": "s.png", "small_counts": "s.npy",
             "text": "t.txt", "pipe": "pipe.txt", "piped": "pipe.png"}  # fmt: skip
    folder = finished(tmp_path / "run", Result(files={name: Path(path) for name, path in names.items()})).path
    info = PngInfo()
    info.add_text(CELLS, "0 0 1 1")
    Image.new("1", (8000, 8000)).save(folder / "big.png", pnginfo=info)
    Image.new("1", (8, 8)).save(folder / "s.png", pnginfo=info)
    header = {"descr": "<i8", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
    for name in ("big_counts.npy", "s.npy"):
        with (folder / name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    with (folder / "t.txt").open("wb") as file:
        file.truncate(2_000_000_000)  # of no size on the disk
    for name in ("pipe.txt", "pipe.png"):
        os.mkfifo(folder / name)
    page = Page(render_page(folder))
    assert "big.png is too large to be shown" in page.text
    assert "t.txt is too long to be shown" in page.text
    assert "pipe.png is not there any more" in page.text
    assert len(page.all("img")) == 1
    assert not [of for of in page.all("figure") if "data-k" in of]
    assert "t.txt is too long to be shown" in closing_table(read_run(folder).result, folder, 1.0)
