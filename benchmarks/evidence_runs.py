"""Runs in docs/evidence/: reading them, the rates that val chooses, and numbers and differences with intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpt.metric.result import Number, Result
from igpt.metric.statistics import mean_interval
from igpt.report.folder import parse_result
from igpt.report.reference import compare_means
from igpt.utils import files

JOINT, ALONE = "pretrained, L_GEN + L_CLF", "pretrained, L_CLF alone"
SCRATCH = "from scratch, L_CLF alone"
YES = "**yes**"  # a finding holds


@dataclass(frozen=True)
class Run:
    """A run of a finding: its settings, and its numbers."""

    name: str
    record: Mapping[str, Any]  # run.json
    result: Result
    seconds: float

    @property
    def task(self) -> Mapping[str, Any]:
        """Settings of its task."""
        settings: Mapping[str, Any] = self.record["config"]["task"]
        return settings

    @property
    def data(self) -> Mapping[str, Any]:
        """Settings of its images."""
        settings: Mapping[str, Any] = self.record["config"]["data"]
        return settings

    @property
    def order(self) -> str:
        """The order of its tokens: `raster` or `random`."""
        order: str = self.record["config"]["tokens"]["order"]
        return order

    @property
    def objective(self) -> str:
        """The objective of its network: `ar` or `bert`."""
        objective: str = self.record["of"]["objective"]
        return objective

    @property
    def seed(self) -> int:
        """The seed of its random choices."""
        seed: int = self.record["config"]["seed"]
        return seed

    def number(self, key: str) -> Number:
        """One number of its result. Raises KeyError if it has no such number."""
        return self.result.numbers[key]


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    finding: str
    paper: str
    ours: str
    holds: str


def read_runs(folder: Path) -> list[Run]:
    """The runs in the folder of a finding, by name; none if it is not there."""
    runs = []
    for record in sorted(folder.glob("*/run.json")):
        written = files.read_json(record.with_name("result.json"))
        runs.append(Run(record.parent.name, files.read_json(record), parse_result(written), written["seconds"]))
    return runs


def percent(number: Number) -> str:
    """`57.1 % [55.7, 58.4]`, or `± 0.4 (std of 5)`."""
    share, interval = f"{100 * number.value:.1f} %", number.confidence_interval
    if number.deviation is not None:
        return f"{share} ± {100 * number.deviation:.1f} (std of {number.n})"
    return share if interval is None else f"{share} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def points(value: float, interval: tuple[float, float] | None) -> str:
    """A difference of shares: `+2.1 points [1.0, 3.2]`."""
    around = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * value:+.1f} points{around}"


def bits(number: Number) -> str:
    """`17.43 [17.40, 17.46]`."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(number.value, *bounds(number))


def judge(*intervals: tuple[float, float] | None) -> str:
    """`yes` where every interval lies above 0, `no` where one lies below it, else `not shown`, as without any."""
    lows = [interval[0] if interval else -np.inf for interval in intervals or [None]]
    highs = [interval[1] if interval else np.inf for interval in intervals or [None]]
    return YES if min(lows) > 0 else "**no**" if min(highs) < 0 else "not shown"


def subtract(one: Number, other: Number) -> Number:
    """A difference, with its 95 % interval from those of both (Newcombe 1998, method 10, of shares' Wilson intervals).

    For shares of the same images, which are alike, it is wider than need be.
    """
    (low, high), (other_low, other_high) = bounds(one), bounds(other)
    difference = one.value - other.value
    below = math.hypot(one.value - low, other_high - other.value)
    above = math.hypot(high - one.value, other.value - other_low)
    return Number(difference, one.unit, min(one.n, other.n), interval=(difference - below, difference + above))


def bounds(number: Number) -> tuple[float, float]:
    """The 95 % interval of a number. Raises ValueError if it has none: a difference would seem exact."""
    if number.confidence_interval is None:
        raise ValueError(f"{number} has no interval")
    return number.confidence_interval


def compare_arms(
    one: Sequence[Run], other: Sequence[Run], key: str = "test/accuracy"
) -> tuple[float, tuple[float, float] | None]:
    """Difference of the means of two arms and its interval: Welch's over seeds; with a single seed, of both means."""
    values = [[run.number(key).value for run in arm] for arm in (one, other)]
    gain = compare_means(*values, lower_is_better=False)
    if gain.interval is not None:
        return gain.value, gain.interval
    gap = subtract(bound_mean(one, key), bound_mean(other, key))
    return gap.value, gap.interval


def find_arm(run: Run) -> str:
    """How a network was fine-tuned, from its settings."""
    start = "pretrained" if run.record["config"]["init"] else "from scratch"
    loss = "L_GEN + L_CLF" if run.task["loss_weights"]["gen"] else "L_CLF alone"
    return f"{start}, {loss}"


def choose_rates(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Each arm's runs, a seed each, at the rate with the highest accuracy on val among those of the lowest seed."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(find_arm(run), []).append(run)
    chosen = {}
    for arm, of in arms.items():
        rate = choose_best(of).task["learning_rate"]
        chosen[arm] = sorted((run for run in of if run.task["learning_rate"] == rate), key=lambda run: run.seed)
    return chosen


def choose_best(runs: Sequence[Run]) -> Run:
    """The run with the highest accuracy on val among those of the lowest seed."""
    first = min(run.seed for run in runs)
    return max((run for run in runs if run.seed == first), key=lambda run: run.number("val/accuracy").value)


def average(runs: Sequence[Run], key: str = "test/accuracy") -> Number:
    """Mean of one number over seeds, with their standard deviation."""
    values = [run.number(key).value for run in runs]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Number(float(np.mean(values)), "share of images", len(values), deviation=deviation)


def split_by_length(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of fine-tuning by their number of steps, the shortest first."""
    tuned = [run for run in runs if run.task["name"] == "finetune"]
    return [[run for run in tuned if run.task["steps"] == n] for n in sorted({run.task["steps"] for run in tuned})]


def group_by_objective(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs by the objective of their network."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.objective, []).append(run)
    return groups


def group_by_labels(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs by their labels per class, the fewest first; all labels last."""
    groups: dict[float, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.data["labels_per_class"] or math.inf, []).append(run)
    return [groups[n] for n in sorted(groups)]


def choose_rates_by_objective(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Of each objective the joint fine-tunings at the rate that val chooses."""
    groups = {name: choose_rates(of).get(JOINT) for name, of in group_by_objective(runs).items()}
    return {name: of for name, of in groups.items() if of}


def describe_labels(per_class: int | None) -> str:
    """`1,000 labels a class`, or `all labels`."""
    return "all labels" if per_class is None else f"{per_class:,} labels a class"


def describe_arm(runs: Sequence[Run]) -> str:
    """`61.2 % ± 0.4 (std of 3) at rate 0.001, 24,000 images`; of one seed its interval."""
    accuracy = average(runs) if len(runs) > 1 else runs[0].number("test/accuracy")
    task = runs[0].task
    return f"{percent(accuracy)} at rate {task['learning_rate']:g}, {task['steps'] * task['batch_size']:,} images"


def bound_mean(runs: Sequence[Run], key: str = "test/accuracy") -> Number:
    """Mean of a share over several seeds, with its 95 % interval over seeds (Student's t) and test images.

    The half-widths are added as squares; that over images is the largest of one seed, as all saw the same images. One
    seed has no interval over seeds: it is over images alone.
    """
    numbers = [run.number(key) for run in runs]
    values = [number.value for number in numbers]
    over_images = max(max(x - low, high - x) for x, (low, high) in zip(values, map(bounds, numbers), strict=True))
    mean, over_seeds = float(np.mean(values)), 0.0
    if len(values) > 1:
        _, (_, high) = mean_interval(values)
        over_seeds = high - mean
    reach = float(np.hypot(over_images, over_seeds))
    return Number(mean, "share of images", len(runs), interval=(mean - reach, mean + reach))
