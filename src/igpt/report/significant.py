"""Numbers of tables rounded to the digits that their uncertainty supports."""

import math

from igpt.metric.result import Number
from igpt.report.closing_table import format_number

LARGE = 1e4  # from here on in full, with thousands separators or as a power of ten
MOST_DECIMALS = 4


def count_decimals(value: float, spread: float | None) -> int:
    """Decimals that show two significant digits of `spread`, at most MOST_DECIMALS; without one, three of `value`."""
    size, digits, most = (spread, 2, MOST_DECIMALS) if spread else (abs(value), 3, 100)
    return 0 if not size else min(most, max(0, digits - 1 - math.floor(math.log10(size))))


def format_measured(number: Number) -> str:
    """As `format_number`, rounded by `count_decimals` from its deviation or half of its interval."""
    interval = number.confidence_interval
    spread = number.deviation if number.deviation is not None else interval and (interval[1] - interval[0]) / 2
    if abs(number.value) >= LARGE or (not spread and float(number.value).is_integer()):
        return format_number(number)
    decimals = count_decimals(number.value, spread)
    text = f"{number.value:.{decimals}f}"
    if number.deviation is not None:
        return f"{text} ± {number.deviation:.{decimals}f} (std)"
    return text if interval is None else f"{text} [{interval[0]:.{decimals}f}, {interval[1]:.{decimals}f}]"
