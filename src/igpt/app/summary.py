"""One number over many runs: mean and spread over seeds, the best first, beside what sets the runs apart."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from igpt.app.groups import differing, grouped, settings_of
from igpt.metric.result import Number
from igpt.report.figures import Point, points_figure
from igpt.report.runs import Run, objective_of, read_run
from igpt.spelling import suggestion

LOWER = ("nats", "bits", "grey levels")  # how units begin of which less is better
HIGHER = ("share", "dB", "Spearman", "images/s", "tokens/s", "pixels/s")  # more
MOST = 40  # rows that a picture shows


class NothingFoundError(ValueError):
    """No finished run has the number that was asked for."""


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed."""

    settings: dict[str, str]  # what not all rows have alike, as one would type it
    mean: float
    deviation: float | None  # standard deviation over seeds, n - 1 in its denominator; None: one seed
    interval: tuple[float, float] | None  # 95 %: Student's over seeds; of one seed, over its images where that is known
    values: tuple[float, ...]  # of each seed
    folders: list[Path]  # in the same order

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
    rows: list[Row]
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


def summary_of(runs: Sequence[Run], metric: str, left_out: dict[Path, str] | None = None) -> Summary:
    """The same for runs that have been read."""
    left_out = dict(left_out or {})
    having = [run for run in runs if metric in run.numbers]
    known = list(dict.fromkeys(key for run in runs for key in run.numbers))
    left_out |= {run.folder: f"it has no {metric}" for run in runs if metric not in run.numbers}
    if not having:
        why = "; ".join(f"{folder.name}: {reason}" for folder, reason in list(left_out.items())[:3])
        there = f"{suggestion(metric, known)}; there are {', '.join(known)}" if known else f" ({why})" if why else ""
        raise NothingFoundError(f"no finished run has {metric}{there}")
    groups, repeated = grouped(having)
    left_out |= {older.folder: f"{run.folder.name} is the same run" for older, run in repeated.items()}
    apart = differing([settings_of(group[0]) for group in groups])
    unit = having[0].numbers[metric].unit
    lower = lower_is_better(metric, unit)
    rows = [_row(group, metric, settings) for group, settings in zip(groups, apart, strict=True)]
    return Summary(metric, unit, lower, sorted(rows, key=lambda row: row.mean if lower else -row.mean),
                   left_out, caution(having, unit))  # fmt: skip


def _tokenizer_hash(run: Run) -> str:
    """The hash of a run's tokenizer; older results say that of their palette, which is the same in raster order."""
    found = run.result.provenance
    return str(found.get("tokenizer", found.get("palette")))


def caution(runs: Sequence[Run], unit: str) -> str:
    """What keeps losses per token of several runs from being compared: they are of other tokens, or of other tasks."""
    if not unit.endswith("/token"):
        return ""
    of_what = {
        "objectives": {objective_of(run) for run in runs},
        "datasets": {run.config["data"].get("name") for run in runs},
        "resolutions": {run.config["data"].get("resolution") for run in runs},
        "tokenizers": {_tokenizer_hash(run) for run in runs},
    }
    several = [name for name, kinds in of_what.items() if len(kinds) > 1]
    return f"these are of several {' and '.join(several)}: such losses do not compare" if several else ""


def _row(group: list[Run], metric: str, settings: dict[str, str]) -> Row:
    number = over_seeds([run.numbers[metric] for run in group])
    values = tuple(run.numbers[metric].value for run in group)
    deviation = number.deviation if len(values) > 1 else None
    return Row(settings, number.value, deviation, number.interval, values, [run.folder for run in group])


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


def first_in_all(runs: Sequence[Run]) -> str | None:
    """The first loss or accuracy that all runs have; where there is none, the first number.

    None: they have no number in common.
    """
    common = [key for key in runs[0].numbers if all(key in run.numbers for run in runs)]
    judged = [key for key in common if runs[0].numbers[key].unit.startswith(("nats", "bits", "share"))]
    return next(iter([*judged, *common]), None)


def headings(found: Summary) -> tuple[str, ...]:
    """The first row of `table`."""
    return "settings", f"{found.metric}, {found.unit} ({better(found)})", "seeds", "run"


def better(found: Summary) -> str:
    """Which of its values are the better ones, in words; of a count, how it is sorted."""
    word = _word(found.metric, found.unit)
    return f"{word} is better" if word else "from the highest"


def _word(metric: str, unit: str) -> str:
    return "lower" if lower_is_better(metric, unit) else "higher" if unit.startswith(HIGHER) else ""


def table(found: Summary) -> list[tuple[str, ...]]:
    """A row of text for each row: settings, mean with its spread, seeds, folder."""
    return [(row.name, spread(row), str(row.n), shortened(row.folders)) for row in found.rows]


def spread(row: Row) -> str:
    """The mean ± its deviation over seeds; of one seed the value and its interval."""
    if row.deviation is not None:
        return f"{row.mean:.4f} ± {row.deviation:.4f} (std)"
    return f"{row.mean:.4f}" + (f" [{row.interval[0]:.4f}, {row.interval[1]:.4f}]" if row.interval else "")


def shortened(folders: Sequence[Path]) -> str:
    """The first of some folders as one would type it here, and how many more there are."""
    first, *more = folders
    shown = os.path.relpath(first) if first.absolute().is_relative_to(Path.cwd()) else first.name
    return shown + (f" and {len(more)} more" if more else "")


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
