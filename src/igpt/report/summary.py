"""Numbers over many runs: mean and spread over seeds, the best first, with the settings that differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from igpt.metric.result import Number, find_key
from igpt.report.closing_table import describe_uncertainty
from igpt.report.facts import find_number
from igpt.report.found_runs import read_runs
from igpt.report.groups import describe_groups, group_by_data, group_by_seed
from igpt.report.reference import WITHIN, Difference, Settings, compare_means, find_reference
from igpt.report.runs import RunRecord, read_objective
from igpt.utils.overrides import suggest_name

LOWER = ("nats", "bits", "grey levels", "MMD²", "squared distance")  # prefixes of units where lower is better
HIGHER = ("share", "dB", "SSIM", "Spearman", "images/s", "tokens/s", "pixels/s")  # where higher is better


class NothingFoundError(ValueError):
    """No finished run has the metric."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seed."""

    settings: dict[str, str]  # the settings that differ between groups, as on the command line
    number: Number  # mean over seeds
    values: tuple[float, ...]  # of each seed
    folders: list[Path]  # in the same order
    seeds: tuple[int, ...] = ()  # in the same order
    further: dict[str, tuple[Number, ...]] = field(default_factory=dict)  # number → that of each seed, if all have it
    runs: tuple[RunRecord, ...] = ()  # in the same order

    @property
    def mean(self) -> float:
        return self.number.value

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds, n - 1 in its denominator; None: one seed."""
        return self.number.deviation if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval: Student's t over seeds; for one seed over images, if known."""
        return self.number.interval

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def name(self) -> str:
        """The settings in a line."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items()) or "all alike"

    def average(self, name: str) -> Number | None:
        """The mean over seeds of a further number; None where not all have it."""
        return average_seeds(self.further[name]) if name in self.further else None


@dataclass(frozen=True)
class Summary:
    """The runs that have a metric, grouped over seeds, the best first; and those left out, with the reason.

    Rows that are not comparable (`caution`) are in the order of the runs.
    """

    metric: str
    unit: str
    lower_is_better: bool
    rows: list[SeedGroup]
    left_out: dict[Path, str]
    caution: str = ""  # reason why the rows are not comparable, if they are not
    data: str = ""  # the images, where there are summaries of several
    columns: tuple[str, ...] = ()  # further numbers
    reference: SeedGroup | None = None  # the row that the others are compared with

    @property
    def key(self) -> str:
        """The key to the uncertainties in `table`; "" if there are none."""
        numbers = [number for row in self.rows for number in (row.number, *map(row.average, self.columns)) if number]
        key = describe_uncertainty(map(self.with_interval, numbers))
        if self.reference is None:
            return key
        welch = f"difference: from {self.reference.name}, with the 95 % interval of Welch's t, for each row by itself"
        return f"{key}; {welch}; {WITHIN}: the interval holds 0"

    def with_interval(self, number: Number) -> Number:
        """A mean as `table` shows it: beside further columns with its interval, in place of the deviation."""
        if not (self.columns or self.reference) or number.deviation is None:
            return number
        return replace(number, deviation=None) if number.deviation else Number(number.value, number.unit, number.n)

    def differ(self, row: SeedGroup, name: str) -> Difference | None:
        """The difference of a row's number from the reference's; None for the reference itself, or without one."""
        if self.reference in (None, row):
            return None
        own, others = (
            group.values if name == self.metric else tuple(number.value for number in group.further.get(name, ()))
            for group in (row, self.reference)
        )
        lower = is_lower_better(name, self.unit if name == self.metric else self.units[name])
        return compare_means(own, others, lower_is_better=lower) if own and others else None

    @property
    def units(self) -> dict[str, str]:
        """Further number → its unit, "" where no row has it."""
        averages = {name: [row.further[name][0] for row in self.rows if name in row.further] for name in self.columns}
        return {name: numbers[0].unit if numbers else "" for name, numbers in averages.items()}

    @property
    def judged(self) -> list[str]:
        """The metric and the further numbers of which it is known whether lower or higher is better."""
        units = {self.metric: self.unit, **self.units}
        return [name for name, unit in units.items() if unit.startswith((*LOWER, *HIGHER))]


def summarize(
    folders: Sequence[Path], metric: str, *, columns: Sequence[str] = (), reference: Settings | None = None
) -> Summary:
    """The runs of some directories by `metric`, a key of `numbers` in result.json such as `val/loss_gen`.

    `columns`: further numbers. `reference`: settings of the row that the others are compared with, a value or
    several of each; of several such rows it is the best.

    Raises:
        NothingFoundError: no finished run has the metric; the message lists the ones they have.
        ValueError: no row has the settings of `reference`.
    """
    read = read_runs([Path(folder) for folder in folders])
    return summarize_runs(read.runs, metric, read.problems, columns=columns, reference=reference)


def summarize_runs(
    runs: Sequence[RunRecord], metric: str, left_out: dict[Path, str] | None = None, *,
    columns: Sequence[str] = (), reference: Settings | None = None,
) -> Summary:  # fmt: skip
    """`summarize` for runs that have been read; `left_out`: directory → reason for those that could not be.

    Of a pipeline, `metric` may be the `name` of a number `stage/name` that one stage alone has; `columns`, too.
    """
    names = {key for run in runs if (key := find_key(run.result.numbers, metric)) is not None}
    requested, metric = metric, names.pop() if len(names) == 1 else metric
    having = [run for run in runs if metric in run.result.numbers]
    left_out = (left_out or {}) | {run.folder: f"it has no {metric}" for run in runs if run not in having}
    if not having:
        metric = requested
        known = list(dict.fromkeys(key for run in runs for key in run.result.numbers))
        why = "; ".join(f"{folder.name}: {reason}" for folder, reason in list(left_out.items())[:3])
        there = f"{suggest_name(metric, known)}; there are {', '.join(known)}" if known else f" ({why})" if why else ""
        raise NothingFoundError(f"no finished run has {metric}{there}")
    groups, repeated = group_by_seed(having)
    left_out |= {older.folder: f"{run.folder.name} is the same run" for older, run in repeated.items()}
    rows = []
    columns = tuple(dict.fromkeys(name for name in columns if name != metric))
    for group, settings in zip(groups, describe_groups(groups), strict=True):
        numbers = [run.result.numbers[metric] for run in group]
        values = tuple(number.value for number in numbers)
        of_columns = {name: tuple(filter(None, (find_number(run, name) for run in group))) for name in columns}
        further = {name: of for name, of in of_columns.items() if len(of) == len(group)}
        folders, seeds = [run.folder for run in group], tuple(run.config["seed"] for run in group)
        rows.append(SeedGroup(settings, average_seeds(numbers), values, folders, seeds, further, tuple(group)))
    unit = rows[0].number.unit
    lower = is_lower_better(metric, unit)
    why = describe_caution(having, unit)
    if not why:
        rows.sort(key=lambda row: row.mean if lower else -row.mean)
    if reference is None or why:
        return Summary(metric, unit, lower, rows, left_out, why, columns=columns)
    beside = rows[find_reference(reference, [row.settings for row in rows])]
    return Summary(metric, unit, lower, rows, left_out, columns=columns, reference=beside)


def summarize_by_data(
    runs: Sequence[RunRecord], metric: str, left_out: dict[Path, str] | None = None, *,
    columns: Sequence[str] = (), reference: Settings | None = None,
) -> list[Summary]:  # fmt: skip
    """`summarize_runs` for each group of runs on the same images and labels; `left_out` goes to the first.

    Raises:
        NothingFoundError: no run has the metric.
        ValueError: no row of a group has the settings of `reference`.
    """
    groups = group_by_data([run for run in runs if find_key(run.result.numbers, metric) is not None])
    summarize_group = partial(summarize_runs, metric=metric, columns=columns, reference=reference)
    if len(groups) < 2:
        return [summarize_group(runs, left_out=left_out)]
    lacking = [run for run in runs if not any(run in group for group in groups.values())]
    first, *others = (replace(summarize_group(group), data=label) for label, group in groups.items())
    more = (left_out or {}) | {run.folder: f"it has no {metric}" for run in lacking}
    return [replace(first, left_out=more | first.left_out), *others]


def describe_caution(runs: Sequence[RunRecord], unit: str) -> str:
    """The reason why numbers are not comparable: several datasets; of losses per token or pixel also several
    objectives, resolutions or tokenizers; of losses per dimension several resolutions.
    """  # fmt: skip
    per_token = unit.endswith(("/token", "/pixel"))
    of_what: dict[str, set[Any]] = {"datasets": {*group_by_data(runs)}}
    if per_token:
        of_what["objectives"] = {read_objective(run) for run in runs}
    if per_token or unit.startswith("bits/dim"):
        of_what["resolutions"] = {run.settings.get("data.resolution") for run in runs}
    if per_token:  # older results have only the palette's hash, equal to the tokenizer's in raster order
        provenances = [run.result.provenance for run in runs]
        of_what["tokenizers"] = {str(of.get("tokenizer", of.get("palette"))) for of in provenances}
    several = [name for name, kinds in of_what.items() if len(kinds) > 1]
    return f"not comparable: these are of several {' and '.join(several)}" if several else ""


def average_seeds(numbers: Sequence[Number]) -> Number:
    """The mean over seeds with standard deviation and 95 % confidence interval (Student's t).

    A single number is returned as it is; if it has only a standard error, with the interval ± 1.96 standard errors.
    """
    first = numbers[0]
    if len(numbers) == 1:
        return replace(first, interval=first.confidence_interval)
    values = np.array([number.value for number in numbers])
    mean, deviation, n = float(values.mean()), float(values.std(ddof=1)), len(values)
    around = float(student.ppf(0.975, n - 1)) * deviation / n**0.5
    return Number(mean, first.unit, n, deviation / n**0.5, (mean - around, mean + around), deviation)


def is_lower_better(metric: str, unit: str) -> bool:
    """Whether lower is better: for losses, errors and costs."""
    return unit.startswith(LOWER) or any(
        word in metric for word in ("loss", "error", "seconds", "memory", "operations")
    )


def find_common_metric(runs: Sequence[RunRecord]) -> str | None:
    """The first loss, accuracy or PSNR that all runs have, else the first number; None if they have none in common."""
    first, *others = (run.result.numbers for run in runs)
    common = [key for key in first if all(key in numbers for numbers in others)]
    judged = [key for key in common if first[key].unit.startswith(("nats", "bits", "share", "dB"))]
    return next(iter([*judged, *common]), None)
