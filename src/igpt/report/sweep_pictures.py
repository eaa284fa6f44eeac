"""Pictures of a comparison over training: curves of all settings, and the metric against the value that was swept."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from igpt.metric.result import Curve
from igpt.report.display_names import display_name, name_with_unit
from igpt.report.runs import RunRecord
from igpt.report.style import BAND, COLOURS, SMALL, save_figure, show_percent, styled
from igpt.report.summary import HIGHER, LOWER, SeedGroup, Summary
from igpt.report.summary_table import describe_direction
from igpt.report.swept_values import SweptValues, find_swept, warn_of_edges

STEPS, IMAGES = "optimiser step", "images seen"  # x units
WIDTH, HEIGHT = 5.6, 3.1  # inches of one plot: legible also on a phone
MOST_LINES, MOST_PLOTS = 10, 6
NAME_WIDTH, AXIS_WIDTH = 60, 44  # characters of a line of the legend, of the title of an axis
WARNING = COLOURS[1]  # colour of the warning in a picture

Draw = Callable[[Path], None]


def list_sweep_pictures(result: Summary) -> dict[str, tuple[Draw, str]]:
    """Kind → (writer, caption): `curves` if runs have curves over steps, `swept` if a numeric setting varies."""
    if result.caution:
        return {}
    pictures: dict[str, tuple[Draw, str]] = {}
    if keys := list_training_curves(result):
        caption = "curves of training and validation, means over seeds, with ± one standard deviation"
        pictures["curves"] = partial(draw_training, result=result, keys=keys), caption
    if (swept := find_swept(result)) is not None:
        caption = f"{display_name(result.metric)} against {swept.key}"
        pictures["swept"] = partial(draw_swept, result=result, swept=swept), caption
    return pictures


def list_training_curves(result: Summary) -> list[str]:
    """Names of the losses, accuracies … that the rows have over optimiser steps; those of the metric's stage first."""
    keys: dict[str, None] = {}
    for row in result.rows:
        for name, curve in row.runs[0].result.curves.items() if row.runs else ():
            is_judged = curve.y_unit.startswith((*LOWER, *HIGHER)) and not curve.y_unit.endswith("/s")
            if curve.x_unit == STEPS and is_judged and name.split("/")[-2:-1] in (["train"], ["val"]):
                keys[name] = None
    names = [name for name in keys if any(len(average_curves(row, name).x) > 1 for row in result.rows)]
    stage, what = result.metric.rpartition("/")[0].rpartition("/")[0], result.metric.rpartition("/")[2]
    names.sort(key=lambda name: (not name.startswith(stage), name.rpartition("/")[2] != what))
    return names[:MOST_PLOTS]


def average_curves(row: SeedGroup, name: str) -> Curve:
    """The mean over seeds at the steps that all have; `y_intervals`: ± one standard deviation, for several seeds."""
    curves = [run.result.curves[name] for run in row.runs if name in run.result.curves]
    values = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    x = sorted(set.intersection(*map(set, values))) if values else []
    y = np.array([[of[step] for step in x] for of in values])  # (seeds, steps)
    unit = curves[0].y_unit if curves else ""
    if len(y) < 2:
        return Curve(x, [float(value) for value in y.ravel()], STEPS, unit)
    mean, deviation = y.mean(axis=0), y.std(axis=0, ddof=1)
    band = [(float(low), float(high)) for low, high in zip(mean - deviation, mean + deviation, strict=True)]
    return Curve(x, mean.tolist(), STEPS, unit, y_intervals=band)


def read_batch_size(run: RunRecord, name: str) -> int | None:
    """Images of an optimiser step of a curve, `train/loss_gen`, or of a stage, `pretrain/train/loss_gen`; or None."""
    *stage, _, _ = name.split("/")
    task = run.config.get("task", {})
    of = (task.get("stages") or {}).get(stage[0]) if stage else task
    size = of.get("batch_size") if isinstance(of, dict) else None
    return size if type(size) is int else None


@styled
def draw_training(path: Path, result: Summary, keys: Sequence[str]) -> None:
    """Writes a plot of each curve: a line for each row, at most MOST_LINES, the best; a pale band over its seeds.

    Where batch sizes differ, a plot stands there twice, the second one over images. Losses are cut off that rise above
    their start by more than the plot shows below it.
    """
    rows = [row for row in result.rows if row.runs][:MOST_LINES]
    if (swept := _find_scale(result)) is not None:
        rows.sort(key=lambda row: float(row.settings[swept.key]))
    sizes = {key: {read_batch_size(row.runs[0], key) for row in rows} - {None} for key in keys}
    axes_of = [(key, unit) for key in keys for unit in ([STEPS, IMAGES] if len(sizes[key]) > 1 else [STEPS])]
    names = [textwrap.fill(row.name, NAME_WIDTH, break_on_hyphens=False) for row in rows]
    columns = 1 if max(map(len, names)) > NAME_WIDTH // 2 or len(names) < 3 else 2
    of_legend = 0.22 + 0.22 * -(-sum(1 + name.count("\n") for name in names) // columns)
    figure = Figure(figsize=(WIDTH, HEIGHT * len(axes_of) + of_legend), layout="constrained")
    plots = figure.subplots(len(axes_of), 1, squeeze=False)[:, 0]
    bright = [matplotlib.colormaps["viridis"](0.92 * i / max(1, len(rows) - 1)) for i in range(len(rows))]
    colours = [f"C{i}" for i in range(len(rows))] if swept is None else bright
    for axes, (key, unit) in zip(plots, axes_of, strict=True):
        _draw_curves(axes, rows, colours, key, unit)
    hidden = sum(bool(row.runs) for row in result.rows) - len(rows)
    title = f"the best {len(rows)} of {len(rows) + hidden}" if hidden else None
    lines = plots[0].get_legend_handles_labels()[0]
    handles = dict(zip([line.get_label() for line in lines], lines, strict=True))
    labels = [(name, handles[row.name]) for name, row in zip(names, rows, strict=True) if row.name in handles]
    figure.legend(
        [line for _, line in labels], [name for name, _ in labels],
        loc="outside upper center", fontsize=SMALL, ncols=columns, title=title,
    )  # fmt: skip
    save_figure(path, figure)


def _draw_curves(axes: Axes, rows: Sequence[SeedGroup], colours: Sequence[object], key: str, unit: str) -> None:
    starts, tops = [], []
    y_unit = ""
    for i, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        curve = average_curves(row, key)
        size = read_batch_size(row.runs[0], key) if unit == IMAGES else 1
        if not curve.x or size is None:
            continue
        x, y_unit = np.array(curve.x) * size, curve.y_unit
        marker = "o" if len(curve.x) <= 30 else None
        dash = "-" if i < len(COLOURS) else "--"
        axes.plot(x, curve.y, dash, color=colour, lw=1.5, marker=marker, ms=3, label=row.name)
        if curve.y_intervals is not None:
            low, high = np.array(curve.y_intervals).T
            axes.fill_between(x, low, high, color=colour, **BAND)
        starts.append(curve.y[0])
        tops.append(max(curve.y))
    most = 2 * max(starts, default=0.0) - axes.get_ylim()[0]
    if starts and y_unit.startswith(LOWER) and max(tops) > most:
        axes.set_ylim(top=most)
    axes.set(xlabel=unit, ylabel=_title_axis(key, y_unit))
    if y_unit == "share":
        show_percent(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))


def _find_scale(result: Summary) -> SweptValues | None:
    """The only setting that varies, if it is numeric, of several values: its lines go from dark to bright."""
    swept = find_swept(result)
    return None if swept is None or len(swept.lines) > 1 or len(swept.values) < 3 else swept


@styled
def draw_swept(path: Path, result: Summary, swept: SweptValues) -> None:
    """Writes the metric against the swept value, a line for each choice of other settings, the best one circled.

    Bars: ± one standard deviation over seeds, whose values are dots; of one seed the 95 % interval over images. The
    axis is logarithmic where the values are geometric. Warnings of `warn_of_edges` stand above.
    """
    lines = dict(list(swept.lines.items())[:MOST_LINES])
    warnings = [textwrap.fill(line, 84) for line in warn_of_edges(result)]
    height = HEIGHT + 0.6 + 0.2 * sum(1 + line.count("\n") for line in warnings)
    figure = Figure(figsize=(WIDTH, height + 0.2 * len(lines) * bool(len(lines) > 1)), layout="constrained")
    axes = figure.add_subplot()
    for i, (others, points) in enumerate(lines.items()):
        dash = "o-" if i < len(COLOURS) else "o--"
        x, y = [value for value, _ in points], np.array([row.mean for _, row in points])
        ends = np.array([_find_bar(row) for _, row in points])
        reach = np.abs(ends.T - y)
        axes.errorbar(x, y, reach, fmt=dash, ms=5, lw=1.5, elinewidth=1, capsize=3, color=f"C{i}", label=others)
        for value, row in points:
            if row.n > 1:
                axes.plot([value] * row.n, row.values, ".", ms=4, color="black", alpha=0.6, zorder=3)
    best = next(
        ((value, row) for line in lines.values() for value, row in line if row is result.rows[0]), None
    )  # not drawn if its line is one too many
    if best is not None:
        axes.plot(best[0], best[1].mean, "o", ms=13, mfc="none", mec="black", mew=1.2, label="the best")
    if swept.is_geometric:
        axes.set_xscale("log")
    if len(swept.values) <= 8:
        axes.set_xticks(swept.values, [f"{value:g}" for value in swept.values])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    bars = "± standard deviation over seeds" if result.rows[0].n > 1 else "95 % intervals over images"
    axes.set(xlabel=f"{swept.key}   (bars: {bars})", ylabel=_title_axis(result.metric, result.unit))
    if result.unit == "share":
        show_percent(axes.yaxis)
    axes.set_title(describe_direction(result), fontsize=SMALL, loc="left")
    if len(lines) > 1:
        figure.legend(loc="outside lower center", fontsize=SMALL)
    if warnings:
        figure.suptitle("\n".join(warnings), fontsize=9, color=WARNING)
    save_figure(path, figure)


def _title_axis(name: str, unit: str) -> str:
    return textwrap.fill(name_with_unit(name, unit, of_axis=True), AXIS_WIDTH)


def _find_bar(row: SeedGroup) -> tuple[float, float]:
    if row.deviation is not None:
        return row.mean - row.deviation, row.mean + row.deviation
    return row.interval or (row.mean, row.mean)
