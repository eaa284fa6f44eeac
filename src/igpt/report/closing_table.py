"""Numbers and tables as text, for the terminal and for pages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from igpt.metric.result import Number, Result
from igpt.report.class_table import describe_classes
from igpt.report.display_names import FIGURES, SUBJECTS, display_name, display_unit, name_figure, rank_key, split_key
from igpt.utils.files import resolve_below

REPORT = "report.html"  # in a run directory
MOST_ROWS = 15  # numbers that are logged
GENERATIVE = ("loss_gen", "bits_per_")
LATER = len(FIGURES) * len(SUBJECTS)  # beyond every rank
LONGEST_TEXT = 1_000_000  # bytes of a text file that is shown


def closing_table(result: Result, folder: Path, seconds: float, *, published: Sequence[str] = ()) -> str:
    """The text logged at the end of a run: its .txt files, main numbers, published numbers, and the files to open.

    A training that ended early, and what the result warns of, are said first. Each number has its unit, uncertainty and
    count. `seconds`: duration of the run. Files that the result names outside of `folder` are neither read nor named.
    """
    shown = {key: result.numbers[key] for key in choose_rows(result.numbers)}
    rows = [
        (display_name(key), format_readable(of), ", ".join(filter(None, (f"n = {of.n:,}", of.features))))
        for key, of in shown.items()
    ]
    lines = _align(rows, "<<<")
    rule = "─" * max((len(line) for line in lines), default=20)
    hidden = len(result.numbers) - len(shown)
    lines += [f"{hidden} more in {REPORT}"] * (hidden > 0) + describe_classes(result, folder)
    lines += list(filter(None, [describe_uncertainty(shown.values())]))
    names = ["published:", *(f"  {line}" for line in published), rule] if published else []
    page = [Path(REPORT)] if (folder / REPORT).is_file() else []
    inside = [path for path in result.files.values() if resolve_below(folder, path) is not None]
    to_open = [*page, *(path for path in inside if path.suffix in {".csv", ".png", ".html"})]
    places = [str(folder / path) for path in to_open]
    texts = [read_text(folder, path) for path in inside if path.suffix == ".txt"]
    first = [*texts, *result.early_stops, *result.warnings]
    return "\n".join([*first, rule, *lines, rule, *names, *places, f"{folder}  ({seconds:.0f} s)"])


def choose_rows(numbers: Mapping[str, Number]) -> list[str]:
    """The keys of at most MOST_ROWS numbers, in the order in which people ask; of each stage of a pipeline one or more.

    Where classes are predicted, the generative loss comes after what is said of them.
    """
    groups: dict[str, list[str]] = {}
    for key in numbers:
        groups.setdefault(key.removesuffix(split_key(key)), []).append(key)
    ranks = {}
    for keys in groups.values():
        has_classes = any(name_figure(key) == "accuracy" for key in keys)
        for key in keys:
            ranks[key] = rank_key(key) + (LATER if has_classes and any(name in key for name in GENERATIVE) else 0)
    first = [min(keys, key=ranks.__getitem__) for keys in groups.values()][:MOST_ROWS]
    others = sorted(ranks.keys() - set(first), key=lambda key: (ranks[key], list(numbers).index(key)))
    chosen = {*first, *others[: MOST_ROWS - len(first)]}
    return [key for keys in groups.values() for key in sorted(keys, key=ranks.__getitem__) if key in chosen]


def read_text(folder: Path, path: Path) -> str:
    """The content of a text file of a run, or a message that it is not shown."""
    file = resolve_below(folder, path)
    if file is None:
        return f"{path} lies outside of {folder}: it is not read"
    try:
        if not file.is_file():
            return f"{path} is no file any more"
        if file.stat().st_size > LONGEST_TEXT:
            return f"{path} is too long to be shown"
        return file.read_text(encoding="utf-8", errors="replace").rstrip()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """A text table with aligned columns; the first row is the heading."""
    heading, *lines = _align(rows, "<" * len(rows[0]))
    return "\n".join([heading, "─" * max(map(len, [heading, *lines])), *lines])


def format_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the heading."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _align(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """A line for each row, columns padded to equal width; `sides`: `<` or `>` for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def format_readable(number: Number) -> str:
    """The value with uncertainty and unit: shares in percent, integers with thousands separators."""
    if number.unit != "share":
        plain = format_number(number)
        return plain if float(number.value).is_integer() else f"{plain} {display_unit(number.unit)}"
    text, around = _round_number(number, 100, 1)
    if number.deviation is not None:
        return f"{text}{around} % (std of {number.n})"
    return f"{text} %{around}"


def format_interval(number: Number) -> str:
    """The ends of the 95 % interval, of shares in percent: `86.8 to 93.5`; "" without one."""
    if number.confidence_interval is None:
        return ""
    scale, digits = (100, 1) if number.unit == "share" else (1, 0 if _is_whole(number) else 4)
    low, high = (scale * end for end in number.confidence_interval)
    return " to ".join(_round_ends(low, high, digits))


def _round_ends(low: float, high: float, digits: int) -> list[str]:
    """The ends of an interval: three significant digits, or more where they would be one number.

    At most `digits` decimals.
    """
    apart = math.ceil(math.log10(2 / (high - low))) if high > low else digits
    ends = []
    for end in (low, high):
        significant = 2 - math.floor(math.log10(abs(end))) if end else 0
        ends.append(f"{end:,.{min(max(significant, apart, 0), digits)}f}" if end else "0")
    return ends


def describe_uncertainty(numbers: Iterable[Number]) -> str:
    """The key to what `format_number` writes after the values; "" if it writes nothing."""
    numbers = list(numbers)
    means = any(number.deviation is not None for number in numbers)
    intervals = any(number.deviation is None and number.confidence_interval is not None for number in numbers)
    parts = ["[low, high]: 95 % confidence interval"] * intervals
    return "; ".join(parts + ["± … (std): standard deviation of the values whose mean this is"] * means)


def format_number(number: Number) -> str:
    """The value with its uncertainty, without unit: standard deviation of a mean, else 95 % interval."""
    text, around = _round_number(number, 1, 0 if _is_whole(number) else 4)
    is_integer = float(number.value).is_integer() and not around
    if not _is_huge(number) and (abs(number.value) >= 1e4 or is_integer):
        text = f"{round(number.value):,}"
    return text + around + (" (std)" if number.deviation is not None else "")


def _round_number(number: Number, scale: int, digits: int) -> tuple[str, str]:
    """(value, uncertainty) as text: the latter is ` ± deviation`, else ` [low, high]`, else ""."""
    around, interval = "", number.confidence_interval
    large = math.floor(math.log10(max(1.0, abs(scale * number.value))))
    shape = ".4g" if _is_huge(number) else f".{min(digits, max(0, 4 - large))}f"
    if number.deviation is not None:
        around = f" ± {scale * number.deviation:{shape}}"
    elif interval is not None:
        low, high = (scale * end for end in interval)
        around = f" [{low:.3g}, {high:.3g}]" if _is_huge(number) else f" [{', '.join(_round_ends(low, high, digits))}]"
    return f"{scale * number.value:{'' if _is_huge(number) else ','}{shape}}", around


def _is_whole(number: Number) -> bool:
    """Whether it counts something, as a layer: value and interval are integers."""
    values = (number.value, *(number.interval or (0.5,)))
    return number.unit != "share" and number.deviation is None and all(float(value).is_integer() for value in values)


def _is_huge(number: Number) -> bool:
    """Whether powers of ten show the value better, as of floating-point operations."""
    return abs(number.value) >= 1e12
