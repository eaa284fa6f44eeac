"""The comparison at the end of a sweep: its runs as tables, pictures and a page."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from igpt.metric.result import find_key
from igpt.report.bystanders import Bystander
from igpt.report.closing_table import align_columns
from igpt.report.page import link_to, write_html
from igpt.report.pictures import Picture
from igpt.report.runs import read_runs
from igpt.report.summary import NothingFoundError, Summary, draw, find_common_metric, summarize_by_data, table
from igpt.utils import files

log = logging.getLogger(__name__)

PICTURE, PAGE, ROWS = "comparison.png", "report.html", "comparison.json"
KEPT = ("settings", "mean", "deviation", "interval", "values")  # fields of a row in ROWS


def report_sweep(place: Path, folders: Sequence[Path], *, metric: str, command: str) -> None:
    """Logs tables of the runs by `metric`, the best first; writes pictures, page and JSON into `place`.

    Runs on other images or labels are another table. Unfinished runs are left out and listed on the page. Does nothing
    for fewer than two finished runs. Where none has `metric`, the first number in common (`find_common_metric`) stands
    for it. Errors are only logged, as the runs are saved.
    """
    with Bystander("the comparison of this sweep"):
        read = read_runs(list(dict.fromkeys(folders)))
        if read.runs and not any(find_key(run.result.numbers, metric) for run in read.runs):
            metric = find_common_metric(read.runs) or metric
        try:
            summaries = summarize_by_data(read.runs, metric, read.problems)
        except NothingFoundError as error:
            log.info("nothing to compare: %s", error)
            return
        if sum(row.n for result in summaries for row in result.rows) < 2:
            return
        rows = [
            {key: getattr(row, key) for key in KEPT} | {"data": result.data, "folders": [*map(str, row.folders)]}
            for result in summaries
            for row in result.rows
        ]
        record = {"metric": metric, "unit": summaries[0].unit, "rows": rows}
        pictures = dict(zip(_picture_names(summaries), summaries, strict=True))
        writers: dict[str, Callable[[Path], object]] = {
            **{name: partial(draw, result=result) for name, result in pictures.items()},
            PAGE: partial(write_comparison, summaries=summaries, command=command),
            ROWS: partial(files.write_json, value=record),
        }
        written = []
        for name, write in writers.items():
            with Bystander(place / name):
                write(place / name)
                written.append(name)
        for name, result in pictures.items():
            picture = str(place / name) if name in written else ""
            parts = (result.data, align_columns(table(result)), result.key, result.caution, picture)
            log.info("%s", "\n".join(filter(None, parts)))
        if PAGE in written:
            log.info("%s", place / PAGE)


def write_comparison(path: Path, summaries: Sequence[Summary], *, command: str) -> Path:
    """Writes the page of a sweep, each row linked to the page of its first run; returns its path."""
    rows = [[(row, link_to(path, row.folders[0])) for row in result.rows] for result in summaries]
    pictures = [
        Picture(
            "Pictures",
            ", ".join(filter(None, (f"{result.metric} of each setting", result.data))),
            path.parent / name,
            name,
        )
        for name, result in zip(_picture_names(summaries), summaries, strict=True)
    ]
    tables = [*zip(summaries, rows, strict=True)]
    return write_html(path, "comparison.html", pictures, tables=tables, command=command)


def _picture_names(summaries: Sequence[Summary]) -> list[str]:
    """`comparison.png`, `comparison_2.png` …."""
    return [PICTURE, *(f"comparison_{i}.png" for i in range(2, len(summaries) + 1))]
