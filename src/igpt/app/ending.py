"""What a sweep ends in: its runs side by side as a table, a picture and a page."""

import logging
from collections.abc import Sequence
from pathlib import Path

from igpt import files
from igpt.app.summary import NothingFoundError, SeedGroup, Summary, draw, summary, table
from igpt.metric.result import Number
from igpt.report.page import Row, Table, comparison_page
from igpt.report.table import columns

log = logging.getLogger(__name__)

PICTURE, PAGE, ROWS = "comparison.png", "report.html", "comparison.json"


def side_by_side(place: Path, folders: Sequence[Path], *, metric: str, command: str) -> None:
    """Shows what some runs found for `metric`, over seeds, the best first, and leaves it in `place`.

    Runs without a result are left out, and named on the page. A sweep of fewer than two finished runs has nothing to
    compare. Nothing that goes wrong here ends a sweep: its runs are whole.
    """
    try:
        found = summary(list(dict.fromkeys(folders)), metric)
        if sum(row.n for row in found.rows) < 2:
            return
        draw(place / PICTURE, found)
        page(place / PAGE, found, command=command)
        record = {"metric": metric, "unit": found.unit, "rows": [_record(row) for row in found.rows]}
        files.write_json(place / ROWS, record)
    except NothingFoundError as error:
        log.info("nothing to compare: %s", error)
        return
    except Exception:  # whatever it is: the sweep has ended well
        log.warning("the comparison of this sweep could not be written")
        log.debug("traceback", exc_info=True)
        return
    caution = f"\n{found.caution}" if found.caution else ""
    log.info("%s%s\n%s\n%s", columns(table(found)), caution, place / PICTURE, place / PAGE)


def page(path: Path, found: Summary, *, command: str) -> Path:
    """The page of a comparison: a row for each setting, linked to its first run's page."""
    rows = [
        Row(
            (row.name, Number(row.mean, found.unit, row.n, interval=row.interval, deviation=row.deviation), str(row.n)),
            row.folders[0],
        )
        for row in found.rows
    ]
    left = [Row((folder.name, reason), None) for folder, reason in found.left_out.items()]
    tables = [Table(("settings", found.metric, "seeds"), rows, note=found.caution)]
    if left:
        tables.append(Table(("run", "why"), left, title="Left out"))
    best = found.rows[0]
    return comparison_page(
        path,
        f"Sweep: {found.metric}",
        tables,
        summary="" if found.caution or len(found.rows) == 1 else f"Best of {len(found.rows)}: {best.name}.",
        pictures=[(f"{found.metric} of each setting", path.parent / PICTURE)],
        commands=[("the sweep again, which goes on with what is left", command)],
    )


def _record(row: SeedGroup) -> dict[str, object]:
    keys = ("settings", "mean", "deviation", "interval", "values")
    return {key: getattr(row, key) for key in keys} | {"folders": [str(folder) for folder in row.folders]}
