"""Numbers and tables as text, for the terminal and for pages."""

from collections.abc import Sequence
from pathlib import Path

from igpt.metric.result import Number, Result

REPORT = "report.html"  # in a run directory


def closing_table(result: Result, folder: Path, seconds: float, *, published: Sequence[str] = ()) -> str:
    """The text logged at the end of a run: its .txt files, numbers, published numbers, and the files to open.

    A training that ended early is said first. Each number has its unit, uncertainty and count.
    `seconds`: duration of the run.
    """
    lines = _align([(key, format_number(of), of.unit, f"n = {of.n:,}") for key, of in result.numbers.items()], "<><<")
    rule = "─" * max((len(line) for line in lines), default=20)
    names = ["published:", *(f"  {line}" for line in published), rule] if published else []
    page = [Path(REPORT)] if (folder / REPORT).is_file() else []
    to_open = [*page, *(path for path in result.files.values() if path.suffix in {".png", ".html"})]
    places = [str(folder / path) for path in to_open]
    texts = [folder / path for path in result.files.values() if path.suffix == ".txt"]
    told = [text.read_text(encoding="utf-8").rstrip() for text in texts]
    return "\n".join([*told, *result.early_stops, rule, *lines, rule, *names, *places, f"{folder}  ({seconds:.0f} s)"])


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """A text table with aligned columns; the first row is the heading."""
    heading, *lines = _align(rows, "<" * len(rows[0]))
    return "\n".join([heading, "─" * max(map(len, [heading, *lines])), *lines])


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
        return format_number(number) if float(number.value).is_integer() else f"{format_number(number)} {number.unit}"
    text, around = _rounded(number, 100, 1)
    if number.deviation is not None:
        return f"{text}{around} % (std of {number.n})"
    return f"{text} %{around}" if number.interval is not None else f"{text}{around} %"


def format_number(number: Number) -> str:
    """The value with its uncertainty, without unit: standard deviation, else 95 % interval, else standard error."""
    text, around = _rounded(number, 1, 4)
    if abs(number.value) >= 1e4 or (float(number.value).is_integer() and not around):
        text = f"{round(number.value):,}"
    return text + around + (" (std)" if number.deviation is not None else "")


def _rounded(number: Number, scale: int, digits: int) -> tuple[str, str]:
    """(value, uncertainty) as text: the latter is ` ± deviation`, else ` [low, high]`, else ` ± standard error`, ""."""
    spread = number.stderr if number.deviation is None else number.deviation
    around = "" if spread is None else f" ± {scale * spread:.{digits}f}"
    if number.deviation is None and number.interval is not None:
        around = " [{:.{d}f}, {:.{d}f}]".format(*(scale * end for end in number.interval), d=digits)
    return f"{scale * number.value:,.{digits}f}", around
