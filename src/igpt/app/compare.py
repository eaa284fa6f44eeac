"""Many runs, one table: beside the published numbers, and among themselves, grouped over seeds.

For sweeps: `summary(folders, metric)` gives the rows, `table` their text and `draw` their picture.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from igpt import files, ranks
from igpt.app.against import compare_with_paper
from igpt.app.summary import SeedGroup, Summary, draw, first_in_all, over_seeds, summary, summary_of, table
from igpt.app.tables import ComparisonText
from igpt.metric.result import Number, Result
from igpt.report.runs import Found, RunRecord

__all__ = ["SeedGroup", "Summary", "draw", "over_seeds", "run", "summary", "summary_of", "table"]

log = logging.getLogger(__name__)


def check(*, runs: list[str] | str, numbers: list[str], **_: object) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is read."""
    if not isinstance(runs, str | list) or not all(isinstance(place, str) for place in runs):
        raise ValueError(f"task.runs lists run folders, globs, or folders that hold runs, got {runs!r}")
    if not isinstance(numbers, list):
        raise ValueError(f"task.numbers is a list, as [val/loss_gen,val/accuracy], got {numbers!r}")


def run(
    *, folder: Path, found: Found, runs: list[str] | str, metric: str | None, numbers: list[str], all: bool
) -> Result:
    """Writes `compare.txt`, which is shown, `compare.md`, `compare.csv`, and a picture for each task of several rows.

    Runs that cannot be read are named and counted. The runs of a pipeline stand beside the paper each for itself, and
    among themselves as one.

    Raises:
        ValueError: no run is left, or none has the number that was asked for.
    """
    if not found.runs and not all:
        where = ", ".join([runs] if isinstance(runs, str) else runs) or "paths.runs"
        problems = [f"{path}: {why}" for path, why in list(found.problems.items())[:5]]
        raise ValueError("; ".join([f"there is no finished run to compare in {where}", *problems]))
    for path, why in found.problems.items():
        log.warning("left out %s: %s", path, why)
    single, problems_of_stages = apart(found.runs)
    beside = compare_with_paper(single, every=all)
    summaries = among_themselves(found.runs, metric)
    text = ComparisonText(len(found.runs), found.problems | problems_of_stages, beside, summaries, numbers, found.runs)
    result = Result(
        numbers={
            "compare/runs": Number(len(found.runs), "runs", len(found.runs)),
            "compare/left_out": Number(len(text.problems), "folders", len(text.problems)),
            "compare/published": Number(sum(bool(row.runs) for row in beside), "rows beside the paper", len(beside)),
        },
        provenance={"runs": [str(of.folder) for of in found.runs], "left_out": [*text.said]},
    )
    for task, rows in summaries.items():
        if not rows.caution:  # there is no best among rows that do not compare
            best = rows.rows[0]
            result.numbers[f"best {task}/{rows.metric}"] = Number(
                best.mean, rows.unit, best.n, interval=best.interval, deviation=best.deviation
            )
    written = {"txt": text.plain(), "md": text.markdown(), "csv": text.csv()}
    drawn = {task: rows for task, rows in summaries.items() if len(rows.rows) > 1}
    result.files |= {f"compare_{task}": Path(f"compare_{task}.png") for task in drawn}
    result.files |= {f"compare_{suffix}": Path(f"compare.{suffix}") for suffix in written}
    if ranks.this_rank().first:
        for suffix, content in written.items():
            with files.atomic_write(folder / f"compare.{suffix}") as file:
                file.write(content.encode())
        for task, rows in drawn.items():
            draw(folder / f"compare_{task}.png", rows)
    return result


def apart(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], dict[Path, str]]:
    """Every run once, of a pipeline its stages instead; and stages that could not be read."""
    stages = [stage for of in runs for stage in of.stages]
    single = [each for of in runs for each in [stage.run for stage in of.stages if stage.run is not None] or [of]]
    return list({each.folder.resolve(): each for each in reversed(single)}.values())[::-1], {
        stage.folder: stage.problem for stage in stages if stage.run is None
    }


def among_themselves(runs: Sequence[RunRecord], metric: str | None) -> dict[str, Summary]:
    """Task → its runs by `metric`, or by the first number that all of that task have.

    Raises:
        ValueError: a metric was asked for and no run has it.
    """
    if metric is not None and runs:
        summary_of(runs, metric)  # says which numbers there are, where it is none of them
    summaries = {}
    for task in dict.fromkeys(of.task for of in runs):
        some = [of for of in runs if of.task == task]
        chosen = metric or first_in_all(some) or next((key for of in some for key in of.result.numbers), None)
        if chosen is not None and any(chosen in of.result.numbers for of in some):
            summaries[task] = summary_of(some, chosen)
    return summaries
