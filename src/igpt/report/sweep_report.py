"""The comparison at the end of a sweep: its runs as a table, a picture and a page."""

import logging
from collections.abc import Sequence
from pathlib import Path

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
    try:
        result = summarize(list(dict.fromkeys(folders)), metric)
        if sum(row.n for row in result.rows) < 2:
            return
        draw(place / PICTURE, result)
        write_comparison(place / PAGE, result, command=command)
        rows = [{key: getattr(row, key) for key in KEPT} | {"folders": [*map(str, row.folders)]} for row in result.rows]
        files.write_json(place / ROWS, {"metric": metric, "unit": result.unit, "rows": rows})
    except NothingFoundError as error:
        log.info("nothing to compare: %s", error)
    except Exception:  # the sweep has succeeded, whatever happens here
        log.warning("the comparison of this sweep could not be written")
        log.debug("traceback", exc_info=True)
    else:
        caution = f"\n{result.caution}" if result.caution else ""
        log.info("%s%s\n%s\n%s", align_columns(table(result)), caution, place / PICTURE, place / PAGE)


def write_comparison(path: Path, result: Summary, *, command: str) -> Path:
    """Writes the page of a sweep, each row linked to the page of its first run; returns its path."""
    rows = [(row, link_to(path, row.folders[0])) for row in result.rows]
    picture = Picture("Pictures", f"{result.metric} of each setting", path.parent / PICTURE, PICTURE)
    return write_html(path, "comparison.html", [picture], found=result, rows=rows, command=command)
