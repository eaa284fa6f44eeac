"""A scatter plot as PNG: points of a plane, coloured by class."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from igpt.metric.result import Scatter
from igpt.report.confusion_figure import fit_name
from igpt.report.style import LIGHT, save_figure, styled

MOST_COLOURS = 20  # classes that have a colour each; more cannot be told apart


@styled
def scatter_figure(path: Path, scatter: Scatter) -> None:
    """Writes the points, those of a class in its colour; all grey, which the title says, where colours do not suffice.

    Points are drawn in their order, so that no class lies on top of the others.
    """
    present = np.unique(scatter.classes[scatter.classes >= 0]).tolist()
    title, colours = scatter.title, {-1: LIGHT["muted"]}
    if len(present) > MOST_COLOURS:
        title = f"{title}\n{len(present)} classes: more than {MOST_COLOURS} colours cannot be told apart".strip()
    elif len(present) > 1:
        table = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20"]
        colours |= {of_class: table(i) for i, of_class in enumerate(present)}
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for of_class, colour in colours.items():
        if of_class >= 0:
            axes.scatter([], [], s=40, color=[colour], label=name_class(scatter, of_class))
    size = float(np.clip(12_000 / max(1, len(scatter.points)), 6, 40))  # square points
    inks = [colours.get(of_class, LIGHT["muted"]) for of_class in scatter.classes.tolist()]
    x, y = scatter.points.T
    axes.scatter(x, y, s=size, color=inks, alpha=0.75, linewidths=0)
    if len(colours) > 1:
        figure.legend(loc="outside right upper")
    axes.set(xlabel=scatter.x_label, ylabel=scatter.y_label, title=title)
    axes.set_aspect("equal", adjustable="datalim")
    save_figure(path, figure)


def name_class(scatter: Scatter, of_class: int) -> str:
    """The name of a class for the legend; "class 3" for one without."""
    names = scatter.class_names
    return fit_name(names[of_class], of_class) if of_class < len(names) else f"class {of_class}"
