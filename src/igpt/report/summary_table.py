"""A summary of runs as a table of text, and as a dot plot."""

import os
from collections.abc import Sequence
from pathlib import Path

from igpt.report.display_names import is_share, name_with_unit
from igpt.report.figures import Point, points_figure
from igpt.report.significant import format_measured
from igpt.report.summary import HIGHER, Summary

MOST = 40  # maximal rows of a picture


def describe_direction(result: Summary) -> str:
    """`lower is better` or `higher is better`; for other units the sort order; nothing where rows do not compare."""
    if result.caution:
        return "in no order"
    if not result.lower_is_better and not result.unit.startswith(HIGHER):
        return "from the highest"
    return f"{'lower' if result.lower_is_better else 'higher'} is better"


def tabulate_summary(result: Summary) -> list[tuple[str, ...]]:
    """Rows of text, the heading first: settings, mean with spread, further numbers, number of seeds, run directory.

    Beside a reference, the differences from it follow the numbers of which it is known what is better.
    """
    units, direction = {result.metric: result.unit, **result.units}, f" ({describe_direction(result)})"
    headings = ["settings"]
    for name, unit in units.items():
        headings += [name_with_unit(name, unit) + direction * (name == result.metric)]
        headings += ["difference"] * _has_difference(result, name)
    lines = [(*headings, "seeds", "run")]
    for row in result.rows:
        cells = [row.name]
        for name in units:
            number = row.number if name == result.metric else row.average(name)
            cells.append("–" if number is None else format_measured(result.with_interval(number)))
            if _has_difference(result, name):
                difference = result.differ(row, name)
                cells.append("reference" if row is result.reference else "–" if difference is None else difference.text)
        lines.append((*cells, str(row.n), shorten_folders(row.folders)))
    return lines


def _has_difference(result: Summary, name: str) -> bool:
    return result.reference is not None and name in result.judged


def shorten_folders(folders: Sequence[Path]) -> str:
    """The first path, relative to the working directory if it lies in it, and the number of others."""
    first, *more = folders
    place = os.path.relpath(first) if first.absolute().is_relative_to(Path.cwd()) else first.name
    return place + (f" and {len(more)} more" if more else "")


def draw_summary(path: Path, result: Summary) -> None:
    """Writes the rows as a dot plot, the best on top: mean and standard deviation over seeds, and each seed's value.

    For one seed the bar is the 95 % confidence interval over images, if known.
    """
    points = [
        Point(
            row.name, row.mean, row.values,
            (row.mean - row.deviation, row.mean + row.deviation) if row.deviation is not None else row.interval,
            "mean of seeds ± their standard deviation" if row.deviation is not None
            else "one seed, 95 % interval over images" if row.interval else "one seed",
        )
        for row in result.rows[:MOST]
    ]  # fmt: skip
    hidden = len(result.rows) - len(points)
    more = f"; {hidden} more rows are not drawn" if hidden else ""
    in_percent = is_share(result.unit)
    label = f"{name_with_unit(result.metric, result.unit, of_axis=True)} ({describe_direction(result)}{more})"
    label = "\n".join(filter(None, (label, result.data, result.caution)))
    points_figure(path, points, label=label, in_percent=in_percent)
