"""Differences between means over seeds and those of a reference: Welch's interval, and a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from igpt.report.significant import count_decimals
from igpt.utils.overrides import escape_text, format_value

WITHIN = "within the spread"


@dataclass(frozen=True)
class Difference:
    """A mean minus the reference's."""

    value: float
    interval: tuple[float, float] | None  # 95 % confidence interval; None: one of the two has a single seed
    lower_is_better: bool

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval lies on one side of 0."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        if low <= 0 <= high:
            return WITHIN
        return "better" if (high < 0) == self.lower_is_better else "worse"

    @property
    def text(self) -> str:
        """`-0.0120 [-0.0190, -0.0050] better`, rounded as far as the interval supports it."""
        spread = None if self.interval is None else (self.interval[1] - self.interval[0]) / 2
        decimals = count_decimals(self.value, spread)
        around = "" if self.interval is None else " [{:+.{d}f}, {:+.{d}f}]".format(*self.interval, d=decimals)
        return f"{self.value:+.{decimals}f}{around} {self.verdict}"


def compare_means(values: Sequence[float], reference: Sequence[float], *, lower_is_better: bool) -> Difference:
    """The difference of two means, with the 95 % interval of Welch's t (seeds independent, spreads unequal)."""
    difference = float(np.mean(values) - np.mean(reference))
    if min(len(values), len(reference)) < 2:
        return Difference(difference, None, lower_is_better)
    if np.ptp(values) == np.ptp(reference) == 0:  # Welch's degrees of freedom are 0 / 0
        return Difference(difference, (difference, difference), lower_is_better)
    low, high = ttest_ind(values, reference, equal_var=False).confidence_interval()
    return Difference(difference, (float(low), float(high)), lower_is_better)


Settings = Mapping[str, Any]  # setting of a row → its value, or a list of values, each of which will do


def find_reference(reference: Settings, rows: Sequence[Mapping[str, str]]) -> int:
    """The first of several rows (setting → value as text) with all settings of `reference`.

    Raises:
        ValueError: no such row; the message has the values that there are.
    """
    wanted = {key: value if isinstance(value, list) else [value] for key, value in reference.items()}
    texts = {key: [format_value(value, quoted=False) for value in values] for key, values in wanted.items()}
    for i, settings in enumerate(rows):
        if all(any(_is_same(settings.get(key), text) for text in texts[key]) for key in texts):
            return i
    there = "; ".join(dict.fromkeys(" ".join(f"{k}={v}" for k, v in row.items() if k in texts) for row in rows))
    shown = " ".join(f"{key}={','.join(values)}" for key, values in texts.items())
    raise ValueError(f"reference: no row has {escape_text(shown)}" + (f"; there are {there}" if there else ""))


def _is_same(shown: str | None, wanted: str) -> bool:
    """Whether two texts are the same value: 3e-3 is 0.003."""
    try:
        return shown == wanted or float(shown or "") == float(wanted)
    except ValueError:
        return False
