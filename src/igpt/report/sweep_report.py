"""The comparison at the end of a sweep: its runs as a table, a picture and a page."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from igpt.report.bystanders import Bystander
from igpt.report.closing_table import align_columns
from igpt.report.page import link_to, write_html
from igpt.report.pictures import Picture
from igpt.report.summary import NothingFoundError, Summary, draw, summarize, table
from igpt.utils import files

log = logging.getLogger(__name__)

PICTURE, PAGE, ROWS = "comparison.png", "report.html", "comparison.json"
KEPT = ("settings", "mean", "deviation", "interval", "values")  # fields of a row in ROWS


def report_sweep(place: Path, folders: Sequence[Path], *, metric: str, command: str) -> None:
    """Logs a table of the runs by `metric`, the best first; writes picture, page and JSON into `place`.

    Unfinished runs are left out and listed on the page. Does nothing for fewer than two finished runs. Errors are only
    logged, as the runs are saved.
    """
    with Bystander("the comparison of this sweep"):
        try:
            result = summarize(list(dict.fromkeys(folders)), metric)
        except NothingFoundError as error:
            log.info("nothing to compare: %s", error)
            return
        if sum(row.n for row in result.rows) < 2:
            return
        rows = [{key: getattr(row, key) for key in KEPT} | {"folders": [*map(str, row.folders)]} for row in result.rows]
        record = {"metric": metric, "unit": result.unit, "rows": rows}
        writers: dict[str, Callable[[Path], object]] = {
            PICTURE: partial(draw, result=result),
            PAGE: partial(write_comparison, result=result, command=command),
            ROWS: partial(files.write_json, value=record),
        }
        written = []
        for name, write in writers.items():
            with Bystander(place / name):
                write(place / name)
                written.append(name)
        to_open = [str(place / name) for name in (PICTURE, PAGE) if name in written]
        log.info("%s", "\n".join([align_columns(table(result)), *filter(None, [result.caution]), *to_open]))


def write_comparison(path: Path, result: Summary, *, command: str) -> Path:
    """Writes the page of a sweep, each row linked to the page of its first run; returns its path."""
    rows = [(row, link_to(path, row.folders[0])) for row in result.rows]
    picture = Picture("Pictures", f"{result.metric} of each setting", path.parent / PICTURE, PICTURE)
    return write_html(path, "comparison.html", [picture], found=result, rows=rows, command=command)
