"""Many runs, one table: beside the published numbers, and among themselves, grouped over seeds.

For sweeps: `summary(folders, metric)` gives the rows, `table` their text and `draw` their picture.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from igpt import files, ranks
from igpt.app import tables
from igpt.app.against import rows as paper_rows
from igpt.app.summary import Row, Summary, draw, first_in_all, headings, over_seeds, summary, summary_of, table
from igpt.components import Components
from igpt.metric.result import Number, Result
from igpt.report.runs import Found, Run
from igpt.settings.reading import CompareSettings

__all__ = ["Row", "Summary", "draw", "headings", "over_seeds", "run", "summary", "summary_of", "table"]

log = logging.getLogger(__name__)


def run(components: Components, settings: CompareSettings) -> Result:
    """Writes `compare.txt`, which is shown, `compare.md`, `compare.csv`, and a picture for each task of several rows.

    Runs that cannot be read are named and counted. The runs of a pipeline stand beside the paper each for itself, and
    among themselves as one.

    Raises:
        ValueError: no run is left, or none has the number that was asked for.
    """
    found, folder, runs = components.finished_runs, components.run_dir, settings.runs
    if not found.runs and not settings.all:
        where = ", ".join([runs] if isinstance(runs, str) else runs) or "paths.runs"
        raise ValueError("; ".join([f"there is no finished run to compare in {where}", *found.said[:5]]))
    for line in found.said:
        log.warning("left out %s", line)
    single, problems = apart(found)
    beside = paper_rows(single, every=settings.all)
    summaries = among_themselves(found.runs, settings.metric)
    text = tables.Text(len(found.runs), {**found.problems, **problems}, beside, summaries, settings.numbers, found.runs)
    result = Result(
        numbers={
            "compare/runs": Number(len(found.runs), "runs", len(found.runs)),
            "compare/left_out": Number(len(text.problems), "folders", len(text.problems)),
            "compare/published": Number(sum(bool(row.runs) for row in beside), "rows beside the paper", len(beside)),
        },
        provenance={"runs": [str(of.folder) for of in found.runs], "left_out": [*text.said]},
    )
    for task, rows in summaries.items():
        if rows.caution:  # there is no best among these
            continue
        best = rows.rows[0]
        result.numbers[f"best {task}/{rows.metric}"] = Number(
            best.mean, rows.unit, best.n, interval=best.interval, deviation=best.deviation
        )
    if ranks.this_rank().first:
        written = {"txt": text.plain(), "md": text.markdown(), "csv": text.csv()}
        for suffix, content in written.items():
            with files.atomic_write(folder / f"compare.{suffix}") as file:
                file.write(content.encode())
        for task, rows in summaries.items():
            if len(rows.rows) > 1:
                draw(folder / f"compare_{task}.png", rows)
                result.files[f"compare_{task}"] = Path(f"compare_{task}.png")
    result.files |= {f"compare_{suffix}": Path(f"compare.{suffix}") for suffix in ("txt", "md", "csv")}
    return result


def apart(found: Found) -> tuple[list[Run], dict[Path, str]]:
    """Every run once, of a pipeline its stages instead; and stages that could not be read."""
    here: dict[Path, Run] = {}
    problems: dict[Path, str] = {}
    for of in found.runs:
        stages = of.stages
        problems |= stages.problems
        for each in stages.runs or [of]:
            here.setdefault(each.folder.resolve(), each)
    return list(here.values()), problems


def among_themselves(runs: Sequence[Run], metric: str | None) -> dict[str, Summary]:
    """Task → its runs by `metric`, or by the first number that all of that task have.

    Raises:
        ValueError: a metric was asked for and no run has it.
    """
    if metric is not None and runs:
        summary_of(runs, metric)  # says which numbers there are, where it is none of them
    summaries = {}
    for task in dict.fromkeys(of.task for of in runs):
        some = [of for of in runs if of.task == task]
        chosen = metric or first_in_all(some) or next((key for of in some for key in of.numbers), None)
        if chosen is not None and any(chosen in of.numbers for of in some):
            summaries[task] = summary_of(some, chosen)
    return summaries
