"""The setting that a sweep tries values of, and whether its best value lies at the edge of these."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igpt.report.folder import RunFolder
from igpt.report.runs import flatten
from igpt.report.summary import SeedGroup, Summary

# last parts of settings of which more costs more: their best value is no search's
OF_COST = ("steps", "operations", "labels_per_class", "resolution", "n_layer", "n_embd", "step", "count", "samples")


@dataclass(frozen=True)
class SweptValues:
    """A numeric setting of the rows: its values in rising order, one line for each choice of the other settings."""

    key: str
    lines: dict[str, list[tuple[float, SeedGroup]]]  # other settings ("" without any) → (value, row)

    @property
    def values(self) -> list[float]:
        """Every value, once, in rising order."""
        return sorted({value for line in self.lines.values() for value, _ in line})

    @property
    def n_compared(self) -> int:
        """Number of rows that another one is beside, alike but for this setting."""
        return sum(len(line) for line in self.lines.values() if len(line) > 1)

    @property
    def is_geometric(self) -> bool:
        """Whether the values' quotients are more alike than their differences."""
        values = np.array(self.values)
        if len(values) < 3 or values[0] <= 0:
            return False
        steps, quotients = np.diff(values), np.diff(np.log(values))
        return bool(quotients.std() / quotients.mean() < steps.std() / steps.mean())


def find_swept(result: Summary) -> SweptValues | None:
    """The numeric setting with the most values, then rows that are alike otherwise; None if no two rows are."""
    candidates = [SweptValues(key, _group_lines(result.rows, key)) for key in _list_numeric(result.rows)]
    varied = [swept for swept in candidates if any(len(line) > 1 for line in swept.lines.values())]
    return max(varied, key=lambda swept: (len(swept.values), swept.n_compared), default=None)


def warn_of_edges(result: Summary) -> list[str]:
    """A line for each numeric setting whose best value is the smallest or largest that was tried.

    Tried are values of rows that are otherwise as the best one, and those of runs without a result. Settings of cost
    and a smallest value of 0 are left out, as are numbers of which it is not known what is better.
    """
    if result.caution or result.metric not in result.judged:
        return []
    best, lines = result.rows[0], []
    for key in _list_numeric(result.rows):
        row_of = next(line for line in _group_lines(result.rows, key).values() if any(row is best for _, row in line))
        value = float(best.settings[key])
        tried = {each for each, _ in row_of} | set(_list_failed(result, key))
        if len(row_of) < 2 or key.rpartition(".")[2] in OF_COST or (value == 0 and value == min(tried)):
            continue
        for edge, word, more in ((min(tried), "smallest", "smaller"), (max(tried), "largest", "larger")):
            if value == edge:
                lines.append(f"the best {key}, {best.settings[key]}, is the {word} that was tried: try {more}")
    return lines


def _list_numeric(rows: Sequence[SeedGroup]) -> list[str]:
    """The settings whose values in all rows are numbers."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    return [key for key in keys if all(_is_number(row.settings.get(key, "")) for row in rows)]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _group_lines(rows: Sequence[SeedGroup], key: str) -> dict[str, list[tuple[float, SeedGroup]]]:
    lines: dict[str, list[tuple[float, SeedGroup]]] = {}
    for row in rows:
        others = " ".join(f"{name}={value}" for name, value in row.settings.items() if name != key)
        lines.setdefault(others, []).append((float(row.settings[key]), row))
    return {others: sorted(line, key=lambda point: point[0]) for others, line in lines.items()}


def _list_failed(result: Summary, key: str) -> list[float]:
    """The values of a setting in runs that were left out, as of a training whose loss was no number."""
    values = []
    for folder in result.left_out:
        try:
            value = flatten(RunFolder(folder).read_run()["config"]).get(key)
        except (ValueError, OSError):  # no run folder, or a damaged one
            continue
        values += [float(value)] if isinstance(value, int | float) else []
    return values
