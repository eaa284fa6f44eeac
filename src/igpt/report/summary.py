"""One number over many runs: mean and spread over seeds, the best first, beside what sets the runs apart."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from igpt.metric.result import Number
from igpt.report.closing_table import shown
from igpt.report.figures import Point, points_figure
from igpt.report.groups import differing, grouped, settings_of
from igpt.report.runs import RunRecord, objective_of, read_run
from igpt.utils.overrides import suggestion

LOWER = ("nats", "bits", "grey levels")  # how units begin of which less is better
HIGHER = ("share", "dB", "Spearman", "images/s", "tokens/s", "pixels/s")  # more
MOST = 40  # rows that a picture shows


class NothingFoundError(ValueError):
    """No finished run has the number that was asked for."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but their seed."""

    settings: dict[str, str]  # what not all groups have alike, as one would type it
    number: Number  # the mean over seeds
    values: tuple[float, ...]  # of each seed
    folders: list[Path]  # in the same order

    @property
    def mean(self) -> float:
        return self.number.value

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds, n - 1 in its denominator; None: one seed."""
        return self.number.deviation if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %: Student's over seeds; of one seed, over its images where that is known."""
        return self.number.interval

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    @property
    def name(self) -> str:
        """The settings in a line."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items()) or "all alike"


@dataclass(frozen=True)
class Summary:
    """The runs that have a number, grouped over seeds, the best first; and those left out, with the reason."""

    metric: str
    unit: str
    lower_is_better: bool
    rows: list[SeedGroup]
    left_out: dict[Path, str]
    caution: str = ""  # why the rows do not compare, where they do not


def summary(folders: Sequence[Path], metric: str) -> Summary:
    """What the runs in some folders found for `metric`, a key of `numbers` in their result.json, as `val/loss_gen`.

    Raises:
        NothingFoundError: no run of them is finished and has that number; the message says what they have.
    """
    runs, left_out = [], {}
    for folder in folders:
        try:
            runs.append(read_run(Path(folder)))
        except ValueError as error:
            left_out[Path(folder)] = str(error)
    return summary_of(runs, metric, left_out)


def summary_of(runs: Sequence[RunRecord], metric: str, left_out: dict[Path, str] | None = None) -> Summary:
    """The same for runs that have been read."""
    left_out = (left_out or {}) | {
        run.folder: f"it has no {metric}" for run in runs if metric not in run.result.numbers
    }
    having = [run for run in runs if metric in run.result.numbers]
    if not having:
        known = list(dict.fromkeys(key for run in runs for key in run.result.numbers))
        why = "; ".join(f"{folder.name}: {reason}" for folder, reason in list(left_out.items())[:3])
        there = f"{suggestion(metric, known)}; there are {', '.join(known)}" if known else f" ({why})" if why else ""
        raise NothingFoundError(f"no finished run has {metric}{there}")
    groups, repeated = grouped(having)
    left_out |= {older.folder: f"{run.folder.name} is the same run" for older, run in repeated.items()}
    rows = []
    for group, settings in zip(groups, differing([settings_of(group[0]) for group in groups]), strict=True):
        numbers = [run.result.numbers[metric] for run in group]
        values = tuple(number.value for number in numbers)
        rows.append(SeedGroup(settings, over_seeds(numbers), values, [run.folder for run in group]))
    unit = rows[0].number.unit
    lower = lower_is_better(metric, unit)
    rows.sort(key=lambda row: row.mean if lower else -row.mean)
    return Summary(metric, unit, lower, rows, left_out, caution(having, unit))


def caution(runs: Sequence[RunRecord], unit: str) -> str:
    """What keeps losses per token of several runs from being compared: they are of other tokens, or of other tasks."""
    if not unit.endswith("/token"):
        return ""
    of_what: dict[str, set[Any]] = {
        "objectives": {objective_of(run) for run in runs},
        "datasets": {run.settings.get("data.name") for run in runs},
        "resolutions": {run.settings.get("data.resolution") for run in runs},
        # older results have the hash of their palette, which is the same in raster order
        "tokenizers": {str((of := run.result.provenance).get("tokenizer", of.get("palette"))) for run in runs},
    }
    several = [name for name, kinds in of_what.items() if len(kinds) > 1]
    return f"these are of several {' and '.join(several)}: such losses do not compare" if several else ""


def over_seeds(numbers: Sequence[Number]) -> Number:
    """The mean of a number over seeds with its deviation and 95 % interval (Student's); one alone as it is.

    One that has a standard error and no interval is given one, 1.96 standard errors to each side.
    """
    first = numbers[0]
    if len(numbers) == 1:
        if first.interval is not None or first.stderr is None:
            return first
        around = 1.96 * first.stderr
        return Number(first.value, first.unit, first.n, first.stderr, (first.value - around, first.value + around))
    values = np.array([number.value for number in numbers])
    mean, deviation, n = float(values.mean()), float(values.std(ddof=1)), len(values)
    around = float(student.ppf(0.975, n - 1)) * deviation / n**0.5
    return Number(mean, first.unit, n, deviation / n**0.5, (mean - around, mean + around), deviation)


def lower_is_better(metric: str, unit: str) -> bool:
    """Whether less of a number is better: of a loss, an error, a time."""
    return unit.startswith(LOWER) or any(word in metric for word in ("loss", "error", "seconds"))


def first_in_all(runs: Sequence[RunRecord]) -> str | None:
    """The first loss or accuracy that all runs have; where there is none, the first number.

    None: they have no number in common.
    """
    first, *others = (run.result.numbers for run in runs)
    common = [key for key in first if all(key in numbers for numbers in others)]
    judged = [key for key in common if first[key].unit.startswith(("nats", "bits", "share"))]
    return next(iter([*judged, *common]), None)


def better(found: Summary) -> str:
    """Which of its values are the better ones, in words; of a count, how it is sorted."""
    if not found.lower_is_better and not found.unit.startswith(HIGHER):
        return "from the highest"
    return f"{'lower' if found.lower_is_better else 'higher'} is better"


def table(found: Summary) -> list[tuple[str, ...]]:
    """A heading, then a row of text for each row: settings, mean with its spread, seeds, folder."""
    heading = ("settings", f"{found.metric}, {found.unit} ({better(found)})", "seeds", "run")
    return [heading, *((row.name, shown(row.number), str(row.n), shortened(row.folders)) for row in found.rows)]


def shortened(folders: Sequence[Path]) -> str:
    """The first of some folders as one would type it here, and how many more there are."""
    first, *more = folders
    place = os.path.relpath(first) if first.absolute().is_relative_to(Path.cwd()) else first.name
    return place + (f" and {len(more)} more" if more else "")


def draw(path: Path, found: Summary) -> None:
    """Writes the rows as a picture, the best on top: mean and deviation over seeds, with a point for each seed.

    Where there is one seed, its bar is the 95 % interval over its images, where that is known.
    """
    points = [
        Point(
            row.name, row.mean, row.values,
            (row.mean - row.deviation, row.mean + row.deviation) if row.deviation is not None else row.interval,
            "mean of seeds ± their standard deviation" if row.deviation is not None
            else "one seed, 95 % interval over images" if row.interval else "one seed",
        )
        for row in found.rows[:MOST]
    ]  # fmt: skip
    hidden = len(found.rows) - len(points)
    more = f"; {hidden} more rows are not drawn" if hidden else ""
    warned = f"\n{found.caution}" if found.caution else ""
    points_figure(path, points, label=f"{found.metric}, {found.unit} ({better(found)}{more}){warned}")
