"""The closing table: what a run found out, in a screenful."""

from collections.abc import Sequence
from pathlib import Path

from igpt.metric.result import Number, Result

REPORT = "report.html"  # of a run folder


def closing_table(result: Result, folder: Path, seconds: float, *, published: Sequence[str] = ()) -> str:
    """Numbers with unit, standard error and count, what others report, then what to open: the page first.

    Above them the text that a task has written, where there is one.
    """
    rows = [(key, shown(number), number.unit, f"n = {number.n:,}") for key, number in result.numbers.items()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3]]) for row in rows
    ]
    report = [Path(REPORT)] if (folder / REPORT).is_file() else []
    to_open = [*report, *(path for path in result.files.values() if path.suffix in {".png", ".html"})]
    rule = "─" * max((len(line) for line in lines), default=20)
    theirs = ["published:", *(f"  {line}" for line in published), rule] if published else []
    places = [f"{folder / path}" for path in to_open]
    told = [
        (folder / path).read_text(encoding="utf-8").rstrip() for path in result.files.values() if path.suffix == ".txt"
    ]
    return "\n".join([*told, rule, *lines, rule, *theirs, *places, f"{folder}  ({seconds:.0f} s)"])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows below one another, each column as wide as it must be; the first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def readable(number: Number) -> str:
    """A number as one says it, with how sure it is: shares in per cent, counts with their commas."""
    if number.unit != "share":
        unit = "" if float(number.value).is_integer() else f" {number.unit}"
        return f"{shown(number)}{unit}"
    text = f"{100 * number.value:.1f}"
    if number.deviation is not None:
        return f"{text} ± {100 * number.deviation:.1f} % (std of {number.n})"
    if number.interval is not None:
        return f"{text} % [{100 * number.interval[0]:.1f}, {100 * number.interval[1]:.1f}]"
    return f"{text} %" if number.stderr is None else f"{text} ± {100 * number.stderr:.1f} %"


def shown(number: Number) -> str:
    """The value with how sure it is: its 95 % interval, the deviation of what it is the mean of, or standard error."""
    sure = (number.interval, number.deviation, number.stderr)
    if float(number.value).is_integer() and abs(number.value) < 1e15 and sure == (None, None, None):
        return f"{int(number.value):,}"
    text = f"{number.value:,.4f}" if abs(number.value) < 1e4 else f"{number.value:,.0f}"
    if number.deviation is not None:
        return f"{text} ± {number.deviation:.4f} (std)"
    if number.interval is not None:
        return f"{text} [{number.interval[0]:.4f}, {number.interval[1]:.4f}]"
    return text if number.stderr is None else f"{text} ± {number.stderr:.4f}"
