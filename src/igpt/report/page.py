"""One self-contained page: of a run (`report.html` in its folder), or of several side by side."""

import base64
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from igpt import files
from igpt.metric.result import Curve, Number, Result
from igpt.report import facts
from igpt.report.cells import Cells, read_cells
from igpt.report.facts import OTHER, kind_of
from igpt.report.pictures import Picture, embedded
from igpt.report.plots import plots
from igpt.report.runs import RunRecord, flat, read_run
from igpt.report.table import REPORT, shown

log = logging.getLogger(__name__)

LARGEST = 4_900_000  # bytes of a page: below 5 MB, pictures included
WHILE = "Samples while it trained"
ORDER = ("Samples", "Completions", OTHER[0], WHILE, "Confusion matrix", "Palette")
FIRST = ORDER[:3]  # above the curves
TRAINING_SAMPLES = 8  # pictures of that, at most


@dataclass(frozen=True)
class Row:
    """A line of a comparison's table, and the run it is about: its first cell links to that run's page."""

    cells: Sequence[str | Number]  # a Number is shown with its interval and unit
    run: Path | None = None  # the run's folder


@dataclass(frozen=True)
class Table:
    """A table of a comparison, each row as long as `columns`."""

    columns: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    note: str = ""  # below it


def write_page(folder: Path) -> None:
    """`page_of`, at the end of a run, which has its result by then: a page that cannot be written is only logged."""
    try:
        page_of(folder)
    except Exception:  # whatever it is: the run has ended well
        log.warning("%s was not written (log.txt says why); the result is whole", folder / REPORT)
        log.debug("traceback", exc_info=True)


def page_of(folder: Path) -> Path:
    """Writes `report.html` of a finished run, from its result.json, run.json and pictures; its path.

    Raises:
        ValueError: no finished run is there, or its result.json is damaged or of another version.
    """
    run, path = read_run(folder), folder / REPORT
    found = [_picture(run, key, file) for key, file in facts.pictures_of(run).items()]
    return _write(
        path,
        "report.html",
        pictures=[*found, *_training_samples(folder)],
        cells=_cells(run),
        run=run,
        stages=[(stage, _link(path, stage.folder)) for stage in run.stages],
        above=f"../{REPORT}" if run.is_stage else None,  # there once the pipeline has ended
        plots=plots(run.result.curves),
        texts={key: _text(run.folder / file) for key, file in run.result.files.items() if file.suffix == ".txt"},
        configuration={group: typed(of, group) for group, of in run.config.items()},
        provenance=typed(run.result.provenance),
    )


def comparison_page(
    path: Path,
    title: str,
    tables: Sequence[Table],
    *,
    summary: str = "",
    pictures: Sequence[tuple[str, Path]] = (),
    curves: Mapping[str, Curve] | None = None,
    commands: Sequence[tuple[str, str]] = (),
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a page about several runs at `path`, as `page_of` writes that of one; its path.

    `summary` is one or a few sentences below the title. `pictures` are (caption, PNG file): a missing or damaged one is
    named as such. `curves` are drawn as in a run's page, one plot for each pair of units. `commands` are (what it does,
    command). `environment` is what `report.folder.environment()` gives. A row whose run has no page is not a link.

    Raises:
        ValueError: a row with another number of cells than its table has columns.
    """
    for table in tables:
        for row in table.rows:
            if len(row.cells) != len(table.columns):
                raise ValueError(
                    f"a row of {table.title or title!r} has {len(row.cells)} cells, its table {len(table.columns)}"
                )
    found = [Picture(OTHER[0], caption, file, _relative(path, file)) for caption, file in pictures]
    links = {str(row.run): _link(path, row.run) for table in tables for row in table.rows if row.run is not None}
    return _write(
        path,
        "comparison.html",
        pictures=found,
        title=title,
        summary=summary,
        tables=tables,
        links=links,
        plots=plots(curves or {}),
        commands=commands,
        environment=typed(dict(environment)) if environment else [],
    )


def check(*, runs: list[str]) -> None:
    """Raises ValueError, naming every one of them, when some are no finished runs; nothing is written then."""
    if not runs:
        raise ValueError("task=report writes the pages of finished runs anew: task.runs=[RUN_FOLDER,RUN_FOLDER]")
    said = []
    for run in runs:
        try:
            read_run(Path(run))
        except (ValueError, OSError) as error:
            said.append(f"{run}: {error}")
    if said:
        raise ValueError(f"task.runs: {'; '.join(said)}")


def run(*, runs: list[str]) -> Result:
    """Writes the page of every run anew, of a pipeline's own stages first."""
    for folder in map(Path, runs):
        for stage in read_run(folder).stages:
            if stage.run is not None and stage.folder.parent == folder:
                page_of(stage.folder)
        log.info("%s", page_of(folder))
    return Result()


def _write(path: Path, template: str, *, pictures: Sequence[Picture], **known: Any) -> Path:
    """Renders a page twice: without pictures, to know what room they have, and with them."""
    page = templates().get_template(template)
    room = LARGEST - len(page.render(blocks=_blocks(pictures), **known).encode(errors="backslashreplace"))
    whole = page.render(blocks=_blocks(embedded(pictures, budget=max(0, room))), **known)
    with files.atomic_write(path) as file:
        file.write(whole.encode(errors="backslashreplace"))
    return path


@cache
def templates() -> Environment:
    """The templates, which escape whatever they are given."""
    made = Environment(
        loader=PackageLoader("igpt.report", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    web = resources.files("igpt.report") / "web"
    script = (web / "hover.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals.update(
        style=Markup((web / "style.css").read_text(encoding="utf-8").strip()),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )
    made.filters.update(shown=shown, duration=duration, large=large, anchor=anchor, breakable=breakable)
    for of_run in (facts.names_of, facts.names_of_stages, facts.images_of, facts.describe, facts.main_numbers,
                   facts.pictures_of, facts.published_numbers, facts.repeat_command, facts.next_commands):  # fmt: skip
        made.filters[of_run.__name__] = of_run
    made.globals["first"] = FIRST
    made.filters["heading"] = lambda key: kind_of(key)[0]
    made.tests["numeric"] = lambda value: isinstance(value, Number)
    return made


def typed(settings: Any, group: str = "") -> list[tuple[str, str]]:
    """Every setting by its full key, values as they would be typed."""
    values = flat(settings, group).items()
    return [(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for key, value in values]


def duration(seconds: float) -> str:
    """`3 min 56 s`, `2 h 5 min`, `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def large(number: Number) -> tuple[str, str, str]:
    """Value, unit and how sure it is, to be shown large: shares as percent."""
    value, share = number.value, number.unit == "share"
    scale, digits = (100, 1) if share else (1, 4)
    digits = 0 if not share and (float(value).is_integer() or abs(value) >= 1e4) else digits
    text = f"{scale * value:,.{digits}f}"
    if number.interval is not None:
        low, high = (f"{scale * end:.{digits}f}" for end in number.interval)
        sure = f"95 %: {low} to {high}"
    elif number.deviation is not None or number.stderr is not None:
        spread = number.stderr if number.deviation is None else number.deviation
        sure = f"± {scale * (spread or 0):.{digits}f}" + (" (std)" if number.deviation is not None else "")
    else:
        sure = ""
    return text, "%" if share else number.unit, sure


def breakable(key: str) -> Markup:
    """A key that may go over to the next line after each of its parts."""
    return Markup("<wbr>").join(part for part in re.split(r"(?<=[/_.])", key) if part)


def anchor(title: str) -> str:
    """The name that a link on the page uses for a heading."""
    return title.lower().replace(" ", "-")


def _blocks(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """The pictures under their headings, what a network draws first."""
    titles = sorted(dict.fromkeys(picture.title for picture in pictures), key=ORDER.index)
    return {title: [picture for picture in pictures if picture.title == title] for title in titles}


def _picture(run: RunRecord, key: str, file: Path) -> Picture:
    title, seen = kind_of(key)
    stage = key.rpartition("/")[0]
    caption = f"{stage}: {seen}" if stage and seen else seen or key
    return Picture(title, caption, run.folder / file, str(file), whole=key.endswith(("completions", "images")))


def _cells(run: RunRecord) -> dict[str, Cells]:
    """What lies under the pointer on each picture of a confusion matrix, by the picture's path as the page names it."""
    found = {}
    for key, file in facts.pictures_of(run).items():
        counts = run.result.files.get(f"{key}_counts")
        if counts is not None:
            found[str(file)] = read_cells(run.folder / file, run.folder / counts, run.result.class_names.get(key))
    return {path: cells for path, cells in found.items() if cells is not None}


def _training_samples(folder: Path) -> list[Picture]:
    """What the network drew while it trained: the first grid, the last, and some between."""
    found = sorted((folder / "samples").glob("step_*.png"))
    some = min(len(found), TRAINING_SAMPLES)
    kept = [found[i * (len(found) - 1) // max(1, some - 1)] for i in range(some)]
    return [
        Picture(WHILE, f"step {int(path.stem.removeprefix('step_')):,}", path, str(path.relative_to(folder)))
        for path in kept
    ]  # fmt: skip


def _text(file: Path) -> str:
    """What a task has written to be read, or that it is gone."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").rstrip()
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"


def _link(page: Path, run: Path) -> str | None:
    """The address of a run's page from another page, where there is one."""
    target = run / REPORT
    return quote(os.fsencode(_relative(page, target))) if target.is_file() else None


def _relative(page: Path, target: Path) -> str:
    return Path(os.path.relpath(target.absolute(), page.absolute().parent)).as_posix()
