"""`task=isoflop`: the fits of a scaling study from its finished runs, as numbers, tables and pictures."""

from collections.abc import Sequence
from pathlib import Path

from igpt.distributed import ranks
from igpt.metric.result import Result
from igpt.report.bystanders import Bystander
from igpt.report.closing_table import align_columns, format_markdown
from igpt.run.components import Components
from igpt.scaling_law.isoflop_figures import isoflop_figure
from igpt.scaling_law.study import Row, TargetFit, fit_study, list_exponents, list_minima, list_numbers
from igpt.scaling_law.study_points import TARGETS, StudyPoint, read_points
from igpt.settings.reading import IsoflopSettings
from igpt.utils import files

POINTS = "points.json"  # the runs of the study, for task=advise


def run(components: Components, settings: IsoflopSettings) -> Result:
    """Writes `isoflop.txt` (also logged), `isoflop.md`, POINTS, and `isoflop_<target>.png` for each target.

    Raises:
        ValueError: no finished pretraining, runs that cannot be compared, a budget of fewer than three sizes.
    """
    finished, folder = components.run.finished_runs, components.run_dir
    points = read_points(finished.runs)
    fits = fit_study(
        points, settings.targets, weights=settings.weights, width=settings.width, huber=settings.huber,
        bootstrap=settings.bootstrap, seed=components.seed,
    )  # fmt: skip
    result = Result(
        numbers=list_numbers(fits),
        files={"isoflop": Path("isoflop.txt"), "isoflop_md": Path("isoflop.md"), "points": Path(POINTS)},
        provenance={
            "runs": [point.folder for point in points],
            "left_out": {str(path): why for path, why in finished.problems.items()},
            "remarks": {fit.name: fit.remarks for fit in fits},
            "agreement": {fit.name: fit.agreement for fit in fits},
        },
    )
    if missing := list_missing(points, fits):
        result.provenance["warning"] = missing
    if ranks.this_rank().is_first:
        blocks = describe_fits(points, fits, settings.weights)
        texts = {
            "isoflop.txt": "\n\n".join(block if isinstance(block, str) else align_columns(block) for block in blocks),
            "isoflop.md": "\n\n".join(
                block if isinstance(block, str) else format_markdown(block) for block in blocks
            ).replace("*", "\\*"),
        }
        for name, text in texts.items():
            with files.atomic_write(folder / name) as file:
                file.write((text + "\n").encode())
        files.write_json(folder / POINTS, [point.to_dict() for point in points])
        for fit in fits:
            name = f"isoflop_{fit.name}"
            with Bystander(folder / f"{name}.png"):
                isoflop_figure(folder / f"{name}.png", fit, weights=settings.weights)
                result.files[name] = Path(f"{name}.png")
    return result


def list_missing(points: Sequence[StudyPoint], fits: Sequence[TargetFit]) -> str:
    """What some runs of the study have not measured, in a line; "" for nothing."""
    lacking = {fit.name: [point.name for point in points if fit.name not in point.targets] for fit in fits}
    return "; ".join(
        f"{len(names)} of {len(points)} runs lack {TARGETS[target].keys[0]} ({', '.join(dict.fromkeys(names))})"
        for target, names in lacking.items()
        if names
    )


def describe_fits(points: Sequence[StudyPoint], fits: Sequence[TargetFit], weights: str) -> list[str | list[Row]]:
    """Paragraphs and tables: the exponents, each target's minima, and the runs."""
    blocks: list[str | list[Row]] = [list_exponents(fits)]
    for fit in fits:
        title = f"{fit.name}: {fit.label}; N counts {'all' if weights == 'all' else 'non-embedding'} weights"
        blocks += [title, list_minima(fit), *filter(None, ["; ".join(fit.remarks), fit.agreement])]
    intervals = (
        "[…]: 95 % intervals of a residual bootstrap over runs; they do not hold what another seed or rate changes"
    )
    return [*blocks, intervals, list_runs(points, [fit.name for fit in fits])]


def list_runs(points: Sequence[StudyPoint], targets: Sequence[str]) -> list[Row]:
    """Rows of text, the heading first: each run's sizes, lengths and values."""
    rows: list[Row] = [("model", "weights", "non-embedding", "FLOP", "images", "tokens a weight", *targets)]
    for point in sorted(points, key=lambda point: (round(point.operations, -9), point.n_all)):
        values = (f"{point.targets[target]:.4f}" if target in point.targets else "–" for target in targets)
        counts = f"{point.n_all:,}", f"{point.n_non_embedding:,}", f"{point.operations:.4g}", f"{point.images:,}"
        rows.append((point.name, *counts, f"{point.tokens / point.n_all:.0f}", *values))
    return rows
