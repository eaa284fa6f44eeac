"""The cost at which trainings of several lengths reach the loss of a reference, and their other numbers at that loss.

Each length is a training of its own, with its own schedule: only ends of trainings are compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from igpt.metric.result import Curve, Number
from igpt.report.closing_table import format_number
from igpt.report.display_names import display_name, name_with_unit
from igpt.report.reference import Difference
from igpt.report.summary import SeedGroup, Summary, average_seeds, is_lower_better

LENGTHS = ("steps", "operations", "warmup_steps")  # last parts of settings in which the trainings of a curve differ


@dataclass(frozen=True)
class EqualLoss:
    """The share of the reference's cost at which one recipe reaches its metric, and its other numbers there.

    Means over seeds, each compared with the reference of the same seed, with Student's 95 % intervals.
    """

    name: str  # the recipe
    share: Number | None  # None: not reached by its longest training, with some seed
    is_bound: bool  # its shortest training is better already, with some seed: the share is at most this
    differences: dict[str, Difference]  # further number at equal metric → difference from the reference's

    @property
    def text(self) -> str:
        """`0.5512 [0.5102, 0.5922]`, `at most …`, or `not reached`."""
        return "not reached" if self.share is None else "at most " * self.is_bound + format_number(self.share)


def group_lengths(result: Summary, cost: str) -> dict[str, list[SeedGroup]]:
    """Recipe → its rows, one for each length, the cheapest first: the settings but for LENGTHS name it.

    Rows that lack the cost are left out.
    """
    recipes: dict[str, list[SeedGroup]] = {}
    for row in result.rows:
        if cost in row.further:
            kept = {key: value for key, value in row.settings.items() if key.rpartition(".")[2] not in LENGTHS}
            recipes.setdefault(" ".join(f"{key}={value}" for key, value in kept.items()) or "all alike", []).append(row)
    return {name: sorted(rows, key=lambda row: row.further[cost][0].value) for name, rows in recipes.items()}


def compare_at_equal_loss(result: Summary, cost: str) -> list[EqualLoss]:
    """For every recipe but the reference's own: the share of the reference's `cost` at which it reaches its metric.

    `cost`: a further number of the summary. The cost is interpolated between neighbouring lengths, linearly in the
    metric over its logarithm; further numbers linearly in the metric. Recipes without a seed of the reference's are
    left out.
    """
    reference = result.reference
    if reference is None or cost not in reference.further:
        return []
    others = [name for name in result.judged if name != result.metric and name in reference.further]
    answers = []
    for name, rows in group_lengths(result, cost).items():
        seeds = [seed for seed in reference.seeds if all(seed in row.seeds for row in rows)]
        if reference in rows or not seeds:
            continue
        crossings = [_find_crossing(rows, reference, seed, result) for seed in seeds]
        reached = [(seed, *crossing) for seed, crossing in zip(seeds, crossings, strict=True) if crossing is not None]
        if len(reached) < len(seeds):
            answers.append(EqualLoss(name, None, False, {}))
            continue
        logs = [
            _mix([math.log(_read(row, cost, seed)) for row in rows[i : i + 2]], weight)
            - math.log(_read(reference, cost, seed))
            for seed, i, weight in reached
        ]
        share = average_seeds([Number(math.exp(value), "share", 1) for value in logs])
        differences = {}
        for other in [other for other in others if all(other in row.further for row in rows)]:
            values = [
                _mix([_read(row, other, seed) for row in rows[i : i + 2]], weight) - _read(reference, other, seed)
                for seed, i, weight in reached
            ]
            unit = result.units[other]
            mean = average_seeds([Number(value, unit, 1) for value in values])
            differences[other] = Difference(mean.value, mean.interval, is_lower_better(other, unit))
        is_bound = any((i, weight) == (0, 0.0) for _, i, weight in reached)
        answers.append(EqualLoss(name, replace(share, deviation=None), is_bound, differences))
    return sorted(answers, key=lambda answer: math.inf if answer.share is None else answer.share.value)


def _find_crossing(
    rows: Sequence[SeedGroup], reference: SeedGroup, seed: int, result: Summary
) -> tuple[int, float] | None:
    """`find_crossing` of a seed's values to that of the reference."""
    losses = [row.values[row.seeds.index(seed)] for row in rows]
    target = reference.values[reference.seeds.index(seed)]
    return find_crossing(losses, target, lower_is_better=result.lower_is_better)


def _read(row: SeedGroup, name: str, seed: int) -> float:
    """A further number of one seed."""
    return row.further[name][row.seeds.index(seed)].value


def find_crossing(losses: Sequence[float], target: float, *, lower_is_better: bool = True) -> tuple[int, float] | None:
    """(i, w): the target lies at share w of the way from value i to value i + 1, after which all are at least as good.

    (0, 0.0) where all are; None where the last is not.
    """
    sign = 1 if lower_is_better else -1
    excess = [sign * (loss - target) for loss in losses]
    if excess[-1] > 0:
        return None
    i = max((i for i, left in enumerate(excess) if left > 0), default=-1)
    return (0, 0.0) if i < 0 else (i, excess[i] / (excess[i] - excess[i + 1]))


def _mix(ends: Sequence[float], weight: float) -> float:
    return float(np.interp(weight, range(len(ends)), ends))


def list_answers(result: Summary, cost: str) -> list[tuple[str, ...]]:
    """Rows of text, the heading first: recipe, share of the reference's cost, and the differences at equal metric."""
    answers = compare_at_equal_loss(result, cost)
    names = list(dict.fromkeys(name for answer in answers for name in answer.differences))
    equal = f"at equal {display_name(result.metric)}"
    heading = ("settings", f"share of the {display_name(cost)}", *(f"{display_name(name)} {equal}" for name in names))
    lines = []
    for answer in answers:
        differences = (answer.differences.get(name) for name in names)
        lines.append((answer.name, answer.text, *("–" if of is None else of.text for of in differences)))
    return [heading, *lines]


def build_length_curves(result: Summary, cost: str) -> dict[str, Curve]:
    """Means over seeds for each recipe: the metric over the cost, and the next judged number over the metric."""
    curves: dict[str, Curve] = {}
    beside = next((name for name in result.judged if name != result.metric), "")
    axes = {name: name_with_unit(name, unit) for name, unit in {result.metric: result.unit, **result.units}.items()}
    for name, rows in group_lengths(result, cost).items():
        losses = [row.mean for row in rows]
        costs, seen = ([number.value for row in rows if (number := row.average(key))] for key in (cost, beside))
        curves[name] = Curve(costs, losses, axes[cost], axes[result.metric])
        if len(seen) == len(losses):
            curves[f"{name}, {display_name(beside)}"] = Curve(losses, seen, axes[result.metric], axes[beside])
    return curves
