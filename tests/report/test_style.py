"""Figures as files: the layout of Matplotlib's own `savefig`, found without drawing twice."""

from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from igpt.metric.result import Curve
from igpt.report.figures import curves_figure
from igpt.report.style import BAND, CELLS, DPI, find_font, save_figure, show_percent, styled


def draw_plots() -> Figure:
    """Two plots with all that decides a layout: ticks in percent, a legend at its best place, a text in the margin."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    for place, scale in ((1, 1.0), (2, 1e-3)):
        axes = figure.add_subplot(2, 1, place)
        x = np.arange(9.0)
        axes.plot(x, scale * np.sqrt(x), label="a probe of every layer", marker="o")
        axes.fill_between(x, scale * np.sqrt(x) - 0.1, scale * np.sqrt(x) + 0.1, **BAND)
        axes.annotate("chance 10.0 %", (1, 0.1 * scale), xycoords=("axes fraction", "data"))
        axes.set(xlabel="layer", ylabel="accuracy", title=f"times {scale}")
        show_percent(axes.yaxis)
        axes.legend()
    return figure


def draw_cells() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4, 4), layout="constrained", dpi=DPI)
    axes = figure.add_subplot()
    axes.imshow(np.eye(3))
    axes.set_yticks(range(3), ["aeroplane", "automobile", "bird"])
    return figure, axes


@styled
def test_a_figure_is_drawn_once_as_savefig_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an independent source: the pixels are those of `savefig`, which draws the figure twice for its layout."""
    draw_plots().savefig(tmp_path / "expected.png", dpi=DPI)
    draws, draw = [], Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: draws.append(draw(figure, renderer)))
    save_figure(tmp_path / "ours.png", draw_plots())
    assert len(draws) == 1
    ours, expected = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("ours", "expected"))
    assert np.array_equal(ours, expected)


@pytest.mark.filterwarnings("error")
def test_a_figure_without_axes_is_written_without_a_warning(tmp_path: Path) -> None:
    """By hand: a run of so few steps that no curve has two points has a blank picture."""
    save_figure(tmp_path / "blank.png", Figure(figsize=(2, 1), layout="constrained"))
    with Image.open(tmp_path / "blank.png") as picture:
        assert picture.size == (2 * DPI, DPI)


@styled
def test_the_place_of_cells_is_that_of_the_drawn_axes(tmp_path: Path) -> None:
    """Against an independent source: the axes' position after Matplotlib's own drawing without output."""
    figure, axes = draw_cells()
    figure.draw_without_rendering()
    drawn = axes.get_position()
    figure, axes = draw_cells()
    save_figure(tmp_path / "cells.png", figure, cells=axes)
    with Image.open(tmp_path / "cells.png") as picture:
        left, top, width, height = (float(share) for share in picture.info[CELLS].split())
    assert (left, 1 - top - height) == pytest.approx((drawn.x0, drawn.y0), abs=2e-6)
    assert (width, height) == pytest.approx((drawn.width, drawn.height), abs=2e-6)


def test_a_matplotlibrc_of_the_user_changes_no_picture(tmp_path: Path) -> None:
    """Invariant: the bytes of a chart, and the font of texts, under other settings of Matplotlib."""
    curves = {"probe, val": Curve([0, 1, 2], [0.2, 0.6, 0.5], x_unit="layer", y_unit="share of images")}
    others = {
        **matplotlib.style.library["dark_background"], "savefig.facecolor": "red", "savefig.bbox": "tight",
        "font.weight": "bold", "font.family": "serif", "axes.linewidth": 5,
    }  # fmt: skip
    for name, settings in (("plain", {}), ("others", others)):
        find_font.cache_clear()
        with matplotlib.rc_context(settings):
            curves_figure(tmp_path / f"{name}.png", curves)
            assert Path(find_font()).name == "DejaVuSans.ttf"
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "others.png").read_bytes()
