"""`task=compare`: tables of many runs, against published numbers and against each other, grouped over seeds.

For use from Python: `igpt.report.summary.summarize(folders, metric)` returns the rows; in `igpt.report.summary_table`,
`tabulate_summary` their text, and `draw_summary` writes their picture.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from igpt.app.against import compare_with_paper
from igpt.app.comparison_tables import ComparisonText
from igpt.distributed import ranks
from igpt.metric.result import Number, Result, find_key
from igpt.report.bystanders import Bystander
from igpt.report.groups import TABLES, group_by_data
from igpt.report.runs import RunRecord
from igpt.report.summary import Summary, find_common_metric, summarize_runs
from igpt.report.summary_table import draw_summary
from igpt.report.sweep_pictures import Draw
from igpt.run.components import Components
from igpt.settings.reading import CompareSettings
from igpt.utils import files

log = logging.getLogger(__name__)


def run(components: Components, settings: CompareSettings) -> Result:
    """Writes `compare.txt` (also logged), `compare.md`, `compare.csv`, and pictures for each table of several rows.

    Runs of one task (probes: of our networks and of other encoders) on the same images and labels are a table; nothing
    is ranked across tables. Unreadable runs are
    listed and counted. Against the paper each stage of a pipeline is a run of its own; against other runs the pipeline
    is one.

    Raises:
        ValueError: no readable run, or none with `metric`.
    """
    finished, folder, runs = components.run.finished_runs, components.run_dir, settings.runs
    if not finished.runs and not settings.all:
        where = ", ".join([runs] if isinstance(runs, str) else runs) or "paths.runs"
        first = [f"{path}: {why}" for path, why in list(finished.problems.items())[:5]]
        raise ValueError("; ".join([f"there is no finished run to compare in {where}", *first]))
    single, problems_of_stages = split_comparable(finished.runs)
    beside = compare_with_paper(single, every=settings.all)
    summaries = summarize_groups(finished.runs, settings.metric, settings.numbers, settings.reference)
    each = {path.resolve(): (path, why) for path, why in (finished.problems | problems_of_stages).items()}
    problems = dict(each.values())  # a stage may be named as a run, too
    text = ComparisonText(finished.runs, problems, beside, summaries)
    result = Result(
        numbers={
            "compare/runs": Number(len(finished.runs), "runs", len(finished.runs)),
            "compare/left_out": Number(len(text.problems), "folders", len(text.problems)),
            "compare/published": Number(sum(bool(row.runs) for row in beside), "rows beside the paper", len(beside)),
        },
        provenance={"runs": [str(other.folder) for other in finished.runs], "left_out": [*text.messages]},
    )
    for title, rows in summaries.items():
        if not rows.caution:  # no best one among rows that are not comparable
            best = rows.rows[0]
            result.numbers[f"best {title}/{rows.metric}"] = Number(
                best.mean, rows.unit, best.n, interval=best.interval, deviation=best.deviation
            )
    written = {"txt": text.plain(), "md": text.markdown(), "csv": text.csv()}
    drawn: dict[str, Draw] = {}
    for title, name in text.pictures.items():
        drawn[name] = partial(draw_summary, result=summaries[title])
        drawn |= {f"{name}_{kind}": write for kind, (write, _) in text.list_training_pictures(title).items()}
    result.files |= {f"compare_{suffix}": Path(f"compare.{suffix}") for suffix in written}
    if ranks.this_rank().is_first:
        for suffix, content in written.items():
            with files.atomic_write(folder / f"compare.{suffix}") as file:
                file.write(content.encode())
        for name, write in drawn.items():
            with Bystander(folder / f"{name}.png"):
                write(folder / f"{name}.png")
                result.files[name] = Path(f"{name}.png")
    return result


def split_comparable(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], dict[Path, str]]:
    """(runs, problems): every run once, a pipeline replaced by its stages; directory → reason of unreadable stages."""
    stages = [stage for other in runs for stage in other.stages]
    single = [
        each for other in runs for each in [stage.run for stage in other.stages if stage.run is not None] or [other]
    ]
    return list({each.folder.resolve(): each for each in reversed(single)}.values())[::-1], {
        stage.folder: stage.problem for stage in stages if stage.run is None
    }


def summarize_groups(
    runs: Sequence[RunRecord],
    metric: str | None,
    columns: Sequence[str] = (),
    reference: dict[str, Any] | None = None,
) -> dict[str, Summary]:
    """Task (and images, where its runs are on several) → summary by `metric`, or by the first number in common.

    `columns`, `reference`: as of `summarize`; summaries without a row of `reference` are without differences.

    Raises:
        ValueError: no run has `metric`, or `reference` names no row of any summary.
    """
    if metric is not None and runs:
        summarize_runs(runs, metric)  # raises, with the numbers there are
    summaries: dict[str, Summary] = {}
    unmatched: list[ValueError] = []
    tables = [TABLES.get(other.task, other.task) for other in runs]
    for task in dict.fromkeys(tables):
        of_table = [other for other, table in zip(runs, tables, strict=True) if table == task]
        for data, some in group_by_data(of_table).items():
            every = [key for other in some for key in other.result.numbers]
            chosen = metric or find_common_metric(some) or next(iter(every), None)
            if chosen is None or find_key(every, chosen) is None:
                continue
            try:
                result = summarize_runs(some, chosen, columns=columns, reference=reference)
            except ValueError as error:
                unmatched.append(error)
                result = summarize_runs(some, chosen, columns=columns)
            summaries[f"{task} {data}".strip()] = replace(result, data=data)
    if unmatched and len(unmatched) == len(summaries):
        raise ValueError(f"task.{unmatched[0]}")
    return summaries
