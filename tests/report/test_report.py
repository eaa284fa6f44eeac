"""Pictures, tables and run folders."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt.metric.result import Bars, Curve, Grid, Number, Result
from igpt.report import folder as folder_module
from igpt.report.closing_table import closing_table, format_number
from igpt.report.confusion_figure import fit_name, matrix_figure
from igpt.report.figures import Point, bars_figure, curves_figure, points_figure
from igpt.report.folder import RunFolder, parse_result
from igpt.report.grid_pictures import AROUND_COLOURS, GAP, HEAD, WHITE, draw_grid, palette_picture
from igpt.report.identity import differences
from igpt.report.plots import build_plots
from igpt.report.style import CELLS, COLOURS
from igpt.utils import files


def test_the_log_is_utf_8_whatever_the_locale_is(tmp_path: Path) -> None:
    """By hand: in a C locale that Python is told to take seriously, signs beyond ASCII and a name that is no UTF-8."""
    script = f"""
import logging
from pathlib import Path
from igpt.run.logs import log_file, set_up_logging
set_up_logging()
with log_file(Path({str(tmp_path)!r}) / "log.txt"):
    logging.getLogger("igpt").info("写 ² → %s", "\\udcff")
"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, check=True)
    assert done.stderr == rb"\u5199 \xb2 \u2192 \udcff" + b"\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").rstrip().endswith("写 ² → \\udcff")


def test_every_image_of_a_grid_is_where_it_belongs() -> None:
    """Round trip: the pixels read back from the picture are the images', each enlarged to a square."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    picture = np.asarray(draw_grid(Grid(images, ("a", "b", "c"))))
    scale, head = 12, 22
    for row in range(2):
        for column in range(3):
            top, left = GAP + head + row * (96 + GAP), GAP + column * (96 + GAP)
            tile = picture[top : top + 96, left : left + 96]
            assert np.array_equal(tile[::scale, ::scale], images[row, column])
            assert np.array_equal(tile[scale - 1 :: scale, scale - 1 :: scale], images[row, column])
            assert picture[top - 1, left - 1].tolist() == [WHITE] * 3


@pytest.mark.parametrize("side", [8, 48, 64, 100])
def test_no_image_is_shown_too_small_to_see(side: int) -> None:
    """Invariant: at least 96 pixels a side, in enlargements that are whole at half the size, too."""
    picture = draw_grid(Grid(np.zeros((1, 2, side, side, 3), np.uint8)))
    cell = (picture.width - 3 * GAP) // 2
    assert cell >= 96
    assert cell % (2 * side) == 0


def test_curves_of_other_units_are_drawn_apart(tmp_path: Path) -> None:
    """Invariant: one plot for each pair of units, so twice as high; a single point makes no plot."""
    loss = Curve([1.0, 2.0], [3.0, 2.0], "step", "nats")
    heights = []
    for more in ({}, {"b": Curve([1.0, 2.0], [0.1, 0.2], "step", "share")}, {"c": Curve([1.0], [0.1], "step", "x")}):
        curves_figure(tmp_path / "c.png", {"a": loss, "same": loss, **more})
        heights.append(Image.open(tmp_path / "c.png").height)
    assert heights[1] == 2 * heights[0]
    assert heights[2] == heights[0]


def test_a_palette_picture_shows_every_colour(tmp_path: Path) -> None:
    """Round trip: five colours in a 3 × 2 block, row by row, and none in the last place."""
    colours = np.array([[0, 0, 0], [9, 9, 9], [80, 0, 0], [0, 90, 0], [0, 0, 255]], dtype=np.uint8)
    palette_picture(tmp_path / "p.png", colours)
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert picture[64::128, 64::128].reshape(-1, 3).tolist() == [*colours.tolist(), list(AROUND_COLOURS)]


NAMES = ("$x_1$ $", "two\nlines", "犬", "שלום", "😀 dog", "x" * 300, "\udcff", r"$\frac{$", "", "cat")


@pytest.mark.parametrize(("k", "names"), [(2, NAMES[:2]), (10, NAMES), (10, None), (40, NAMES * 4), (120, NAMES * 12)])
def test_a_confusion_matrix_says_where_its_cells_are(tmp_path: Path, k: int, names: tuple[str, ...] | None) -> None:
    """Round trip: the cell that the file says is there is blue where the class was found, white where it was not.

    Invariant: whatever classes are called, nothing is warned of.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix_figure(tmp_path / "m.png", np.eye(k, dtype=np.int64), names)
    picture = Image.open(tmp_path / "m.png")
    left, top, width, height = (float(share) for share in picture.info[CELLS].split())
    assert width * picture.width == pytest.approx(height * picture.height, abs=1)
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    middles = [(i + 0.25) / k for i in range(k)]  # beside the count
    rows = [round((top + height * middle) * picture.height) for middle in middles]
    columns = [round((left + width * middle) * picture.width) for middle in middles]
    blue = pixels[np.ix_(rows, columns)].sum(-1) < 400
    assert np.array_equal(blue, np.eye(k, dtype=bool))


@pytest.mark.parametrize("name", [r"$\frac{$", "$ and $", "a_$b$_c"])
def test_a_dollar_is_drawn_as_one(tmp_path: Path, name: str) -> None:
    """Invariant: no name is a formula, whichever figure it is in."""
    curve, number = Curve([1.0, 2.0], [3.0, 2.0], name, name), Number(0.5, "share", 9)
    curves_figure(tmp_path / "curves.png", {name: curve})
    bars_figure(tmp_path / "bars.png", Bars({name: {name: number}}, name))
    points_figure(tmp_path / "points.png", [Point(name, 0.5, (0.4, 0.6), (0.3, 0.7), name)], label=name)
    for file in ("curves.png", "bars.png", "points.png"):
        with Image.open(tmp_path / file) as picture:
            assert min(picture.size) > 200


def test_names_that_can_be_drawn() -> None:
    """By hand: DejaVu Sans has no Chinese, Matplotlib turns no text around; then the class is known as class 2."""
    drawn = ["$x_1$ $", "two lines", "class 2", "class 3", "😀 dog", "x" * 23 + "…", "\ufffd", r"$\frac{$", "''", "cat"]
    assert [fit_name(name, i) for i, name in enumerate(NAMES)] == drawn
    assert fit_name("犬 dog", 7) == "□ dog"


HOLDS = """
import sys, time
from pathlib import Path
from igpt.report.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("holds", flush=True)
    time.sleep(60)
"""


def test_one_process_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process is in it no other may enter; once that one is killed, the next one may."""
    monkeypatch.setattr(folder_module, "LOCK_SECONDS", 0.2)
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(ValueError, match="is in use by another process"), RunFolder(tmp_path / "run").lock():
            pass
        process.kill()
        process.wait()
        with RunFolder(tmp_path / "run").lock():
            pass


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"cannot be written .*paths.runs=FOLDER"),
        RunFolder(tmp_path / "file" / "run").lock(),
    ):
        pass


def test_differences_are_named() -> None:
    """By hand."""
    saved = {"task": {"steps": 5, "name": "pretrain"}, "seed": 0}
    requested = {"task": {"steps": 6, "name": "pretrain"}, "seed": 0, "extra": 1}
    assert differences(saved, requested) == ["task.steps 5 ≠ 6", "extra None ≠ 1"]
    assert differences(saved, saved) == []


def test_a_result_is_read_back(tmp_path: Path) -> None:
    """Round trip through result.json; the files it names are there."""
    folder = RunFolder(tmp_path / "run")
    folder.start({"seed": 0}, ["seed=0"], {})
    result = Result(
        numbers={"val/loss_gen": Number(1.25, "nats/token", 7, 0.1)},
        curves={"train/loss_gen": Curve([1.0, 2.0], [3.0, 2.5], "optimiser step", "nats/token")},
        grids={"samples": Grid(np.zeros((1, 1, 4, 4, 3), np.uint8))},
        arrays={"samples": np.arange(4)},
        provenance={"seed": 0},
    )
    result.add_confusion(np.eye(4, dtype=np.int64), NAMES[:4])
    assert not folder.is_finished
    folder.finish("sample", result, seconds=1.5)
    record = folder.read_result()
    again = parse_result(record)
    assert again.class_names == {"confusion": NAMES[:4]}
    assert parse_result({key: value for key, value in record.items() if key != "class_names"}).class_names == {}
    assert (again.numbers, again.curves, again.provenance) == (result.numbers, result.curves, result.provenance)
    assert {"task", "config", "seconds", "versions", "commit", "command"} <= record.keys()
    assert set(again.files) == {"samples", "samples_tokens", "curves", "confusion", "confusion_counts"}
    assert all((folder.path / path).is_file() for path in again.files.values())
    (folder.path / "report.html").touch()
    table = closing_table(result, folder.path, 1.5)
    assert "validation loss  1.2500 [1.05, 1.45] nats per token" in table  # ± 1.96 standard errors
    assert "[low, high]: 95 % confidence interval" in table
    assert "n = 7" in table
    assert [Path(line).name for line in table.splitlines()[4:6]] == ["report.html", "samples.png"]


def test_numbers_are_written_whatever_a_picture_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: a picture, an array, a matrix that fail are listed as not written, and nowhere as files."""
    folder = RunFolder(tmp_path / "run")
    folder.start({"seed": 0}, ["seed=0"], {})
    curve = Curve([1.0, 2.0], [3.0, 2.5], "optimiser step", "nats/token")
    result = Result(
        numbers={"val/loss_gen": Number(1.25, "nats/token", 7, 0.1)},
        curves={"train/loss_gen": curve},
        grids={"samples": Grid(np.zeros((1, 1, 4, 4, 3), np.uint8)), "broken": Grid(np.zeros(3))},
        arrays={"samples": np.arange(4), "objects": np.array([None])},
        matrices={"confusion": np.eye(4, dtype=np.int64)},
    )
    (folder.path / "confusion.png").mkdir()
    folder.finish("sample", result, seconds=1.5)
    record = folder.read_result()
    assert record["numbers"]["val/loss_gen"]["value"] == 1.25
    assert record["files"].keys() == result.files.keys() == {"samples", "samples_tokens", "confusion_counts", "curves"}
    assert record["not_written"].keys() == {"broken.png", "objects_tokens.npy", "confusion.png"}
    assert record["not_written"]["confusion.png"].startswith("IsADirectoryError: ")
    lines = [line for line in caplog.messages if line.endswith("; the run goes on")]
    assert [Path(line.partition(": ")[0]).name for line in lines] == [*record["not_written"]]
    assert "broken.png" not in closing_table(result, folder.path, 1.5)
    result.files["text"] = Path("gone.txt")
    assert "gone.txt is no file any more" in closing_table(result, folder.path, 1.5)


@pytest.mark.parametrize("content", [{"version": 99}, [1], {}])
def test_another_version_is_refused(tmp_path: Path, content: object) -> None:
    files.write_json(tmp_path / "result.json", content)
    with pytest.raises(ValueError, match="another version"):
        RunFolder(tmp_path).read_result()


def test_the_best_point_is_marked_with_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a star at the highest point, a bar from end to end of the interval; other curves have none."""
    drawn: list[Any] = []
    monkeypatch.setattr("igpt.report.figures.save_figure", lambda path, figure, **_: drawn.append(figure))
    x = [0.0, 1.0, 2.0, 3.0]
    plain, marked = Curve(x, [0.1, 0.2, 0.1, 0.1], "layer", "accuracy"), [0.1, 0.3, 0.5, 0.4]
    curves = {"plain": plain, "marked": Curve(x, marked, "layer", "accuracy", best=(1, 3))}
    curves_figure(tmp_path / "c.png", curves)
    (container,) = drawn[0].axes[0].containers
    star, _, (bar,) = container
    assert star.get_xydata().tolist() == [[2.0, 0.5]]
    assert bar.get_segments()[0].tolist() == [[1.0, 0.5], [3.0, 0.5]]
    (plot,) = build_plots(curves)
    assert [line.best and line.best[0] for line in plot.lines] == [None, plot.lines[1].points[1][0]]
    assert plot.lines[1].best == (*(plot.lines[1].points[i][0] for i in (1, 3)), plot.lines[1].points[2][1])


def test_layers_are_counted() -> None:
    """By hand: a layer and its interval are integers; a share is not."""
    assert format_number(Number(7.0, "of 0 … 8", 150, interval=(5, 8))) == "7 [5, 8]"
    assert format_number(Number(1.0, "share", 150, interval=(0.0, 1.0))) == "1.0000 [0, 1.00]"


def test_a_bars_part_is_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the part of one bar alone, over its own."""
    drawn: list[Any] = []
    monkeypatch.setattr("igpt.report.figures.save_figure", lambda path, figure, **_: drawn.append(figure))
    heights = {group: {"probe": Number(height, "share", 9)} for group, height in (("AR", 0.5), ("BERT", 0.4))}
    bars_figure(tmp_path / "b.png", Bars(heights, "share", {"BERT": {"probe": Number(0.3, "share", 9)}}, "one mask"))
    full, inside = (each for each in drawn[0].axes[0].containers if len(getattr(each, "patches", ())) == 2)
    assert [patch.get_height() for patch in full] == [0.5, 0.4]
    assert [patch.get_height() for patch in inside] == [0.0, 0.3]
    assert inside[1].get_x() == full[1].get_x()
    assert drawn[0].axes[0].get_legend().get_texts()[-1].get_text() == "pale: one mask"


def test_a_depth_curve_has_its_band_and_what_it_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 95 % intervals as a band, a near level as a line with its name, a far one in the legend, ticks in %.

    The same in the PNG and on the page.
    """
    drawn: list[Any] = []
    monkeypatch.setattr("igpt.report.figures.save_figure", lambda path, figure, **_: drawn.append(figure))
    intervals = [(0.8, 0.9), (0.85, 0.95), (0.7, 0.85)]
    curves = {
        "probe, val": Curve([0.0, 1.0, 2.0], [0.85, 0.9, 0.8], "layer", "accuracy", y_intervals=intervals, best=(0, 1)),
        "raw pixels, val": Curve([0.0, 2.0], [0.96, 0.96], "layer", "accuracy"),
        "chance": Curve([0.0, 2.0], [0.1, 0.1], "layer", "accuracy"),
    }
    curves_figure(tmp_path / "c.png", curves)
    (axes,) = drawn[0].axes
    ends = axes.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, pair in enumerate(intervals) for y in pair} <= {tuple(end) for end in ends.tolist()}
    assert [text.get_text() for text in axes.texts] == ["raw pixels, validation 96.0 %"]
    assert "chance 10.0 %, below" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert axes.lines[0].get_color() == COLOURS[0]
    low, high = axes.get_ylim()
    assert 0.6 < low < 0.7 < 0.96 < high <= 1.03
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "accuracy")
    assert axes.yaxis.get_major_formatter()(0.9, 0) == "90 %"
    (plot,) = build_plots(curves)
    probe, pixels, chance = plot.lines
    assert (probe.name, probe.best_at) == ("linear probe, validation", "1, 95 % interval 0 to 1")
    assert len(probe.band) == 2 * len(intervals)
    assert probe.band[0][1] > probe.points[0][1] > probe.band[-1][1]  # from the top
    assert (pixels.level, len(pixels.points)) == ("raw pixels, validation 96.0 %", 2)
    assert (chance.level, chance.points) == ("chance 10.0 %, below", [])
    assert all(text.endswith(" %") for _, text in plot.y_ticks)


def test_few_labels_stand_on_a_logarithmic_axis_with_their_deviations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 1, 10 and 1,000 labels lie at 0, 1/3 and all of the width; bars from y - deviation to y + deviation.

    The same in the PNG and on the page; also after the curve was read from a record.
    """
    drawn: list[Any] = []
    monkeypatch.setattr("igpt.report.figures.save_figure", lambda path, figure, **_: drawn.append(figure))
    y, deviations = [0.2, 0.3, 0.5], [0.05, 0.02, 0.01]
    curve = Curve([1.0, 10.0, 1000.0], y, "labels per class", "accuracy", y_deviations=deviations)
    curves = {"lite0, test": curve, "chance": Curve([1.0, 1000.0], [0.1, 0.1], "labels per class", "accuracy")}
    curves_figure(tmp_path / "c.png", curves)
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "10", "1000"]
    assert axes.get_ylabel() == "accuracy, ± standard deviation"
    (container,) = axes.containers
    ends = [segment[:, 1].tolist() for segment in container[2][0].get_segments()]
    assert ends == [pytest.approx([mean - of, mean + of]) for mean, of in zip(y, deviations, strict=True)]
    low, high = axes.get_ylim()
    assert low < 0.1
    assert high > 0.51
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    folder.start({}, [], {})
    folder.finish("low_data", Result(curves=curves), seconds=1.0)
    (plot,) = build_plots(parse_result(folder.read_result()).curves)
    x, marks = [mark[0] for mark in plot.lines[0].points], plot.lines[0].bars
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=1e-3)
    assert [text for _, text in plot.x_ticks] == ["1", "10", "1000"]
    for (place, middle), (at, bottom, top) in zip(plot.lines[0].points, marks, strict=True):
        assert (place, middle) == (at, pytest.approx((bottom + top) / 2, abs=0.11))
        assert bottom > middle > top  # from the top
    assert not build_plots({"a": Curve([0.0, 1.0], [0.1, 0.2], "labels per class", "accuracy")})[0].x_is_log


def test_rows_of_images_have_titles() -> None:
    """Round trip: below the title of each row are its images."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 48, 48, 3), dtype=np.uint8)
    picture = np.asarray(draw_grid(Grid(images, row_titles=("original", "palette: 17 colours, exact"))))
    step = len(picture) // 2
    for row in range(2):
        for column in range(3):
            top, left = row * step + HEAD + GAP, GAP + column * (96 + GAP)
            assert np.array_equal(picture[top : top + 96 : 2, left : left + 96 : 2], images[row, column])
        title = picture[row * step : row * step + HEAD]
        assert title.min() < 100 < title.max() == WHITE
