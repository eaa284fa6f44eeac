"""The comparison at the end of a sweep: its runs as tables, pictures and a page."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from igpt.metric.result import find_key
from igpt.report.bystanders import Bystander
from igpt.report.closing_table import align_columns, format_markdown
from igpt.report.display_names import display_name, name_with_unit
from igpt.report.equal_loss import build_length_curves, list_answers
from igpt.report.figures import PlanePoint, curves_figure, plane_figure
from igpt.report.found_runs import read_runs
from igpt.report.groups import VARIANT
from igpt.report.page import link_to, write_html
from igpt.report.pictures import Picture
from igpt.report.reference import Settings, find_reference
from igpt.report.summary import NothingFoundError, Summary, find_common_metric, summarize_by_data
from igpt.report.summary_table import draw_summary, tabulate_summary
from igpt.report.sweep_pictures import list_sweep_pictures
from igpt.report.swept_values import warn_of_edges
from igpt.utils import files

log = logging.getLogger(__name__)

PICTURE, PAGE, ROWS = "comparison.png", "report.html", "comparison.json"
MARKDOWN = "comparison.md"
PLANE = "comparison_plane.png"  # the two first numbers that are judged, one against the other
TABLE = ("columns", "reference", "cost")  # arguments of `report_sweep` that have defaults
KEPT = ("settings", "mean", "deviation", "interval", "values")  # fields of a row in ROWS


def check_table(jobs: Sequence[Sequence[str]], *, columns: Any = (), reference: Any = None, cost: Any = None) -> None:
    """Checks the table's settings before the first job of a sweep; `jobs`: the overrides of each.

    Raises:
        ValueError: a setting of another type, a `reference` that no job has, or a `cost` without a reference.
    """
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise ValueError(f"hydra.launcher.columns must be a list of numbers, as [probe/val/accuracy], got {columns}")
    if not isinstance(reference, Mapping | None):
        raise ValueError(f"hydra.launcher.reference must be settings of a row, as {{variant: paper}}, got {reference}")
    if not isinstance(cost, str | None):
        raise ValueError(f"hydra.launcher.cost must be a number's name, as train/operations, got {cost}")
    if reference is None:
        if cost is not None:
            raise ValueError("hydra.launcher.cost is compared with that of a reference: hydra.launcher.reference=…")
        return
    settings = [dict(text.lstrip("+").partition("=")[::2] for text in overrides) for overrides in jobs]
    try:
        find_reference(reference, settings)
    except ValueError as error:
        raise ValueError(f"hydra.launcher.{error}") from error


def report_sweep(
    place: Path, folders: Sequence[Path], *, metric: str, command: str,
    columns: Sequence[str] = (), reference: Settings | None = None, cost: str | None = None,
    pages: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Logs tables of the runs by `metric`, the best first; writes pictures, page and JSON into `place`.

    Runs on other images or labels are another table. Unfinished runs are left out and listed on the page. Does nothing
    for fewer than two finished runs. Where none has `metric`, the first number in common (`find_common_metric`) stands
    for it. `columns`, `reference`: as of `summarize`; a reference that no run has is only logged. `cost`: a further
    number, of which the share that reaches the reference's metric is told (`igpt.report.equal_loss`). `pages`: run
    directories whose pages are linked, of what was made of these runs. Errors are only logged, as the runs are saved.
    """
    with Bystander("the comparison of this sweep"):
        read = read_runs(list(dict.fromkeys(folders)))
        if read.runs and not any(find_key(run.result.numbers, metric) for run in read.runs):
            metric = find_common_metric(read.runs) or metric
        columns = [*columns, *([] if cost is None else [cost])]
        summarize = partial(summarize_by_data, read.runs, metric, read.problems, columns=columns)
        try:
            summaries = summarize(reference=reference)
        except NothingFoundError as error:
            log.info("nothing to compare: %s", error)
            return
        except ValueError as error:
            log.warning("hydra.launcher.%s", error)
            summaries = summarize()
        if sum(row.n for result in summaries for row in result.rows) < 2:
            return
        answers = [[] if cost is None else list_answers(result, cost) for result in summaries]
        edges = [warn_of_edges(result) for result in summaries]
        record = {"metric": metric, "unit": summaries[0].unit, "rows": _list_rows(summaries), "equal_metric": answers}
        record["warnings"] = edges
        pictures = _list_pictures(summaries, cost)
        writers: dict[str, Callable[[Path], object]] = {
            **{name: writer for name, (_, writer, _) in pictures.items()},
            PAGE: partial(write_comparison, summaries=summaries, command=command, cost=cost, pages=pages),
            ROWS: partial(files.write_json, value=record),
            MARKDOWN: partial(_write_markdown, summaries=summaries, answers=answers),
        }
        written = []
        for name, write in writers.items():
            with Bystander(place / name):
                write(place / name)
                written.append(name)
        for result, answer, warnings in zip(summaries, answers, edges, strict=True):
            drawn = [str(place / name) for name, (of, _, _) in pictures.items() if of is result and name in written]
            parts = (result.data, align_columns(tabulate_summary(result)), result.key, result.caution, *warnings)
            log.info("%s", "\n".join(filter(None, (*parts, align_columns(answer) if answer else "", *drawn))))
        if PAGE in written:
            log.info("%s", place / PAGE)


def _list_rows(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """The rows for ROWS, with the means of the further numbers and the differences from the reference."""
    rows = []
    for result in summaries:
        for row in result.rows:
            averages = {name: number for name in result.columns if (number := row.average(name)) is not None}
            differences = {name: of for name in result.judged if (of := result.differ(row, name)) is not None}
            rows.append(
                {key: getattr(row, key) for key in KEPT}
                | {"data": result.data, "folders": [*map(str, row.folders)]}
                | {"numbers": {name: asdict(number) for name, number in averages.items()}}
                | {"differences": {name: asdict(of) | {"verdict": of.verdict} for name, of in differences.items()}}
            )
    return rows


def write_comparison(
    path: Path, summaries: Sequence[Summary], *, command: str, cost: str | None = None, pages: Sequence[Path] = ()
) -> Path:
    """Writes the page of a sweep with links to that of each row's first run and to `pages`; returns its path."""
    pictures = [
        Picture("Pictures", ", ".join(filter(None, (caption, result.data))), path.parent / name, name)
        for name, (result, _, caption) in _list_pictures(summaries, cost).items()
    ]
    links = [[link_to(path, row.folders[0]) for row in result.rows] for result in summaries]
    answers = [[] if cost is None else list_answers(result, cost) for result in summaries]
    made = {folder.name: link for folder in pages if (link := link_to(path, folder)) is not None}
    tables = [*zip(summaries, map(tabulate_summary, summaries), links, answers, strict=True)]
    warnings = [line for result in summaries for line in warn_of_edges(result)]
    return write_html(path, "comparison.html", pictures, tables=tables, command=command, pages=made, warnings=warnings)


def _write_markdown(path: Path, summaries: Sequence[Summary], answers: Sequence[Sequence[Sequence[str]]]) -> None:
    """Writes the tables without the run directories, for a document."""
    blocks = []
    for result, answer in zip(summaries, answers, strict=True):
        lines = [line[:-1] for line in tabulate_summary(result)]
        blocks += [result.data, format_markdown(lines), result.key, result.caution, *warn_of_edges(result)]
        blocks += [format_markdown(answer)] if answer else []
    with files.atomic_write(path) as file:
        file.write(("\n\n".join(filter(None, blocks)) + "\n").encode())


def draw_plane(path: Path, result: Summary) -> None:
    """Writes the two first judged numbers of each row, one against the other, with their 95 % intervals."""
    x_name, y_name = result.judged[:2]
    units = {result.metric: result.unit, **result.units}
    points = []
    for row in result.rows:
        x, y = (row.number if name == result.metric else row.average(name) for name in (x_name, y_name))
        if x is not None and y is not None:
            name = row.settings.get(VARIANT, row.name) if len(row.settings) == 1 else row.name
            points.append(PlanePoint(name, x.value, y.value, x.confidence_interval, y.confidence_interval))
    x_label, y_label = (name_with_unit(name, units[name], of_axis=True) for name in (x_name, y_name))
    in_percent = units[x_name] == "share", units[y_name] == "share"
    plane_figure(path, points, x_label=f"{x_label} (bars: 95 % intervals)", y_label=y_label, in_percent=in_percent)


def draw_lengths(path: Path, result: Summary, cost: str) -> None:
    """Writes the curves of `build_length_curves`."""
    curves_figure(path, build_length_curves(result, cost))


def _list_pictures(
    summaries: Sequence[Summary], cost: str | None
) -> dict[str, tuple[Summary, Callable[..., None], str]]:
    """Name → (summary, its writer, caption): `comparison.png`, `comparison_2.png` …, and `comparison_plane.png` ….

    The latter for two judged numbers and several rows; with a cost, the curves over it. `comparison_curves.png` and
    `comparison_swept.png`: those of `list_sweep_pictures`.
    """
    pictures: dict[str, tuple[Summary, Callable[..., None], str]] = {}
    for i, result in enumerate(summaries, 1):
        suffix = f"_{i}.png" if i > 1 else ".png"
        pictures[PICTURE.replace(".png", suffix)] = (
            result,
            partial(draw_summary, result=result),
            f"{display_name(result.metric)} of each setting",
        )
        plane = PLANE.replace(".png", suffix)
        if cost is not None:
            caption = f"{display_name(result.metric)} over {display_name(cost)}"
            pictures[plane] = result, partial(draw_lengths, result=result, cost=cost), caption
        elif len(result.judged) > 1 and len(result.rows) > 1 and not result.caution:
            pictures[plane] = (
                result,
                partial(draw_plane, result=result),
                f"{display_name(result.judged[1])} against {display_name(result.judged[0])}",
            )
        for kind, (write, caption) in list_sweep_pictures(result).items():
            pictures[PICTURE.replace(".png", f"_{kind}{suffix}")] = result, write, caption
    return pictures
