"""One look for all charts: the PNGs that Matplotlib draws, and the SVG of the pages, read it here.

A new figure:

    @styled                                     # colours, fonts, grid; a $ in a name is a dollar sign
    def points_figure(path: Path, …) -> None:
        figure = Figure(figsize=(7, 4), layout="constrained")  # inches: WIDTH is that of one plot
        axes = figure.add_subplot()
        axes.plot(x, y, label=…)                # the next of COLOURS
        axes.fill_between(x, low, high, **BAND)  # its 95 % interval
        axes.axhline(y, **REFERENCE)            # what lines are compared with: chance, a baseline
        show_percent(axes.yaxis)                # of shares
        save_figure(path, figure)

On a page `--c0` … `--c7` are the same colours, `--ink`, `--muted`, `--rule`, `--card`, `--paper` the others, light or
dark as the reader's system is: `css_variables`. PNGs are light; a page inverts them where it is dark.
"""

from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ticker import FuncFormatter
from PIL import ImageFont

from igpt.utils import files

LIGHT = {"paper": "#ffffff", "card": "#f5f6f8", "rule": "#d9dde3", "ink": "#1b1f24", "muted": "#57606a"}
DARK = {"paper": "#14171b", "card": "#1d2127", "rule": "#363c45", "ink": "#e6e9ed", "muted": "#a3acb7"}
LINKS = {"light": "#0550ae", "dark": "#79b8ff"}
# of lines, bars and points, in this order; each at least 4.5 : 1 against the paper
COLOURS = ("#1d5fd1", "#c2410c", "#047857", "#9d1fb0", "#946200", "#0b7285", "#c01048", "#57606a")
DARK_COLOURS = ("#6cb0ff", "#ff9a57", "#3ddc97", "#e58cf5", "#f2c14e", "#3bc9db", "#ff8095", "#a3acb7")
SHARES = "Blues"  # colour map of shares from 0 to 1, as in a confusion matrix

WIDTH, HEIGHT = 7.0, 4.0  # inches of one plot
DPI = 130
SMALL = 8.5  # points: text beside marks, long legends
BAND: dict[str, Any] = {"alpha": 0.16, "linewidth": 0}  # a 95 % interval around a line
REFERENCE: dict[str, Any] = {"color": LIGHT["muted"], "linestyle": (0, (4, 3)), "linewidth": 1.1}
RC: Any = {
    "text.parse_math": False,  # a $ in a name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
    "text.color": LIGHT["ink"],
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
LOG_UNITS = ("labels per class",)  # of x, shown on a logarithmic axis
CELLS = "cells"  # PNG metadata of a matrix: left, top, width, height of its cells, as shares of the picture

# decorator of a function that draws a figure; a matplotlibrc of the user changes nothing
styled = matplotlib.style.context(["default", RC])


def show_percent(axis: Axis) -> None:
    """Ticks of shares in percent; with as many decimals as they need."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6) + 0.0:g} %"))


@cache
@styled
def find_font() -> str:
    """The file of the charts' font."""
    return findfont(FontProperties())


@cache
def image_font(size: int = 12) -> ImageFont.FreeTypeFont:
    """The charts' font, in pixels, for texts of images that Pillow draws."""
    return ImageFont.truetype(find_font(), size)


def save_figure(path: Path, figure: Figure, *, cells: Axes | None = None) -> None:
    """Writes a figure as PNG, whole or not at all; the position of the axes `cells` goes into its metadata."""
    figure.set_dpi(DPI)
    if figure.axes and (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)  # fixes the layout: `savefig` would find it by drawing the figure once more
    metadata = {}
    if cells is not None:
        box = cells.get_position()
        metadata = {CELLS: f"{box.x0:.6f} {1 - box.y1:.6f} {box.width:.6f} {box.height:.6f}"}
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata=metadata)


def css_variables(theme: str) -> str:
    """The colours of a theme, `light` or `dark`, as declarations of CSS variables."""
    colours = {"light": COLOURS, "dark": DARK_COLOURS}[theme]
    named = {**{"light": LIGHT, "dark": DARK}[theme], "link": LINKS[theme]}
    named |= {f"c{i}": colour for i, colour in enumerate(colours)}
    return " ".join(f"--{name}: {colour};" for name, colour in named.items())
