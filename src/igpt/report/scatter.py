"""A scatter plot as PNG: points of a plane, coloured by class."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from igpt.metric.result import Scatter
from igpt.report.figures import fit_name
from igpt.utils import files

MOST_COLOURS = 20  # classes that have a colour each; more cannot be told apart
DPI = 130
GREY = "#7a828c"


@matplotlib.rc_context({"text.parse_math": False})  # a $ in a name is a dollar sign
def scatter_figure(path: Path, scatter: Scatter) -> None:
    """Writes the points, those of a class in its colour; all grey, which the title says, where colours do not suffice.

    Points are drawn in their order, so that no class lies on top of the others.
    """
    present = np.unique(scatter.classes[scatter.classes >= 0]).tolist()
    n = len(present)
    figure = Figure(figsize=(7, 5), layout="constrained", dpi=DPI)
    axes = figure.add_subplot()
    size = float(np.clip(12_000 / max(1, len(scatter.points)), 6, 40))  # square points
    colours = [GREY] * len(scatter.points)
    title = scatter.title
    if n > MOST_COLOURS:
        title = f"{title}\n{n} classes: more than {MOST_COLOURS} colours cannot be told apart".strip()
    elif n > 1:
        table = matplotlib.colormaps["tab10" if n <= 10 else "tab20"].colors  # type: ignore[attr-defined]  # listed
        colour = {c: table[i] for i, c in enumerate(present)}
        colours = [colour.get(c, GREY) for c in scatter.classes.tolist()]
        for c in present:
            name = fit_name(scatter.class_names[c], c) if c < len(scatter.class_names) else f"class {c}"
            axes.scatter([], [], s=40, color=[colour[c]], linewidths=0, label=name)
        figure.legend(loc="outside right upper", frameon=False, ncols=1)
    axes.scatter(*scatter.points.T, s=size, color=colours, alpha=0.75, linewidths=0)
    axes.set(xlabel=scatter.x_label, ylabel=scatter.y_label)
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
