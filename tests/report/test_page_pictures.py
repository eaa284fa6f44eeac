"""Pictures in the page of a run."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.metric.result import Grid, Result
from igpt.report.page import render_page
from igpt.report.pictures import Picture, embed
from tests.report.records import HOSTILE, NAMES, Page, classified, finished


def noise(path: Path, side: int) -> Path:
    """A picture that no compression makes small."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)
    return path


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
