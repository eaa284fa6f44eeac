"""Writes self-contained HTML pages, such as `report.html` in a run directory."""

import base64
import hashlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from igpt.metric.result import Result
from igpt.report import facts
from igpt.report.bystanders import Bystander
from igpt.report.class_table import SHOWN, find_matrices, rank_classes
from igpt.report.closing_table import (
    REPORT,
    describe_uncertainty,
    format_interval,
    format_readable,
    read_text,
)
from igpt.report.display_names import display_name, display_unit
from igpt.report.found_runs import read_runs
from igpt.report.pictures import Picture, data_uri, embed, read_cells
from igpt.report.plots import build_plots
from igpt.report.runs import RunRecord, flatten, read_run
from igpt.report.style import css_variables
from igpt.settings.reading import ReportSettings
from igpt.utils import files

log = logging.getLogger(__name__)

LARGEST = 4_900_000  # bytes of a page with its pictures: below 5 MB
# folder of pictures drawn during training → their heading
WHILE = {"samples": "Samples while it trained", "reconstructions": "Reconstructions while it trained"}
INSPECTED = ("Attention", "Loss per pixel", "Nearest training images", "Map of features")
ABOVE_CURVES = ("Samples", "Completions", "Reconstructions", *INSPECTED, "Pictures")  # headings, in page order
BELOW_CURVES = ("Loss by position", *WHILE.values(), "Confusion matrix", "Palette")
TRAINING_SAMPLES = 8  # maximal number of pictures under each heading of WHILE


def write_page(folder: Path) -> None:
    """`render_page` at the end of a run; an error is only logged, as the result is saved already."""
    with Bystander(folder / REPORT):
        render_page(folder)


def render_page(folder: Path) -> Path:
    """Writes `report.html` of a finished run from its result.json, run.json and pictures; returns its path.

    Raises:
        ValueError: no finished run, or a result.json that is damaged or of another version.
    """
    run, path = read_run(folder), folder / REPORT
    files.remove_parts(folder, f".{REPORT}.*.part")  # of killed writers: nothing else is written into a finished run
    texts = {key: read_text(folder, file) for key, file in run.files_inside.items() if file.suffix == ".txt"}
    links = {stage.name: link_to(path, stage.folder) if stage.run else None for stage in run.stages}
    pictures = [*_pictures(run), *_training_samples(folder)]
    matrices = find_matrices(run.files_inside, run.result.class_names, folder)
    classes = {key: rows for key, (matrix, names) in matrices.items() if (rows := rank_classes(matrix, names))}
    return write_html(path, "report.html", pictures, run=run, texts=texts, links=links, classes=classes)


def run(settings: ReportSettings) -> Result:
    """Rewrites the page of every run in `task.runs`; of a pipeline, those of its stages first.

    Raises:
        ValueError: no runs, or unreadable ones (all are listed); nothing is written then.
    """
    if not settings.runs:
        raise ValueError("task=report writes the pages of finished runs anew: task.runs=[RUN_FOLDER,RUN_FOLDER]")
    read = read_runs([Path(folder) for folder in settings.runs])
    if read.problems:
        raise ValueError(f"task.runs: {'; '.join(f'{folder}: {why}' for folder, why in read.problems.items())}")
    for each in read.runs:
        for stage in each.stages:
            if stage.run is not None and stage.folder.parent == each.folder:
                render_page(stage.folder)
        log.info("%s", render_page(each.folder))
    return Result()


def write_html(path: Path, template: str, pictures: Sequence[Picture], **known: Any) -> Path:
    """Renders a template with embedded pictures to `path`; returns it.

    Rendered first without the pictures, to find the bytes left for them.
    """
    page = templates().get_template(template)
    pictures = sorted(pictures, key=lambda picture: (*ABOVE_CURVES, *BELOW_CURVES).index(picture.title))
    free = LARGEST - len(page.render(pictures=pictures, **known).encode(errors="backslashreplace"))
    full = page.render(pictures=embed(pictures, budget=max(0, 3 * free // 4)), **known)  # 4 characters of 3 bytes
    with files.atomic_write(path) as file:
        file.write(full.encode(errors="backslashreplace"))
    return path


@cache
def templates() -> Environment:
    """The Jinja environment of `report/web`, with autoescape."""
    tiles = Environment(
        loader=PackageLoader("igpt.report", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    given = (
        format_readable,
        format_interval,
        display_name,
        display_unit,
        describe_uncertainty,
        sha256,
        data_uri,
        flatten,
        build_plots,
        facts.format_typed,
        facts.find_heading,
    )
    tiles.filters.update({function.__name__: function for function in given})
    tiles.globals.update(facts=facts, above_curves=ABOVE_CURVES, css_variables=css_variables, most_shown=SHOWN)
    return tiles


def sha256(text: str) -> str:
    """The SHA-256 of a text in base64, as a Content-Security-Policy expects it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _pictures(run: RunRecord) -> list[Picture]:
    """The pictures of a run's result; a confusion matrix with its counts, to show under the pointer."""
    items = []
    for key, file in facts.list_pictures(run).items():
        stage, (title, seen) = key.rpartition("/")[0], facts.find_heading(key)
        caption = f"{stage}: {seen}" if stage and seen else seen or key.replace("_", " ")
        counts, path = run.files_inside.get(f"{key}_counts"), run.folder / file
        cells = counts and read_cells(path, run.folder / counts, run.result.class_names.get(key))
        items.append(Picture(title, caption, path, str(file), cells or None))
    return items


def _training_samples(folder: Path) -> list[Picture]:
    """Grids drawn during training, of each kind at most TRAINING_SAMPLES, evenly spaced from first to last."""
    shown = []
    for kind, heading in WHILE.items():
        items = [
            path
            for path in (folder / kind).glob("step_*.png")
            if path.stem[5:].isdecimal() and files.resolve_below(folder, path.relative_to(folder)) is not None
        ]
        items.sort(key=_parse_step)
        kept = [items[i] for i in np.linspace(0, len(items) - 1, min(len(items), TRAINING_SAMPLES), dtype=int)]
        shown += [Picture(heading, f"step {_parse_step(path):,}", path, str(path.relative_to(folder))) for path in kept]
    return shown


def _parse_step(picture: Path) -> int:
    return int(picture.stem.removeprefix("step_"))


def link_to(page: Path, run: Path) -> str | None:
    """The relative URL from a page to a run's page; None if that does not exist."""
    target = run / REPORT
    relative = Path(os.path.relpath(target.absolute(), page.absolute().parent)).as_posix()
    return quote(os.fsencode(relative)) if target.is_file() else None
