"""A comparison as text for the terminal, as Markdown, and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from igpt.app.against import PaperComparison
from igpt.metric.result import Number
from igpt.report import summary
from igpt.report.closing_table import columns, readable
from igpt.report.runs import RunRecord
from igpt.report.summary import Summary, over_seeds, shortened

HEADINGS = ("paper", "ours", "setting", "command")
FIELDS = (
    "part", "number", "setting", "paper", "source", "ours", "low", "high", "deviation", "seeds", "differs", "runs",
    "command", "RUN",
)  # fmt: skip
WIDE = 48  # maximal characters of a cell; longer text goes below its row


@dataclass(frozen=True)
class ComparisonText:
    """The results of a comparison: published numbers with their runs, and a summary of the runs of each task."""

    runs: Sequence[RunRecord]
    problems: Mapping[Path, str]
    beside: Sequence[PaperComparison]
    summaries: Mapping[str, Summary]
    numbers: Sequence[str]  # further columns of the summaries

    @property
    def said(self) -> list[str]:
        """The counts of runs and problems, then a line for each problem."""
        lines = [f"{shortened([path])}: {why}" for path, why in self.problems.items()]
        return [f"{len(self.runs)} runs read, {len(self.problems)} folders left out" + (":" if lines else ""), *lines]

    def plain(self) -> str:
        """The text for the terminal."""
        blocks = []
        for title, rows in self._tables().items():
            cells = [(_paper(row), _short(_ours(row)), row.published.setting) for row in rows]
            heading, rule, *body = columns([HEADINGS[:3], *cells]).splitlines()
            lines = [part for line, row in zip(body, rows, strict=True) for part in (line, *_below(row))]
            blocks.append("\n".join([title, heading, rule, *lines]))
        for task, found in self.summaries.items():
            blocks.append("\n".join([f"task={task}", columns(self._summary(found)), *_remarks(found)]))
        return "\n\n".join([*blocks, "\n  ".join(self.said)]) + "\n"

    def markdown(self) -> str:
        """The Markdown: a table for each of the paper's, and one for each task."""
        blocks = ["# Runs compared"]
        for title, rows in self._tables().items():
            blocks.append(f"## {title}\n\n{grid([HEADINGS, *map(_markdown_row, rows)])}")
        for task, found in self.summaries.items():
            blocks += [f"## task={task}", grid(self._summary(found)), *_remarks(found)]
            blocks += [f"![{found.metric}](compare_{task}.png)"] if len(found.rows) > 1 else []
        counted, *lines = self.said
        return "\n\n".join([*blocks, "\n".join([counted, *(f"- {line}" for line in lines)])]) + "\n"

    def csv(self) -> str:
        """The CSV, one line a row; shares of 1, losses in nats per token."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in self.beside:
            of = row.published
            writer.writerow({
                "part": f"paper: {of.table}", "number": of.number if of.key else "", "setting": of.setting,
                "source": of.source, "paper": of.detail if of.value is None else of.value, **_values(row.ours),
                "seeds": len(row.runs),
                "differs": "; ".join(row.differs), "runs": " ".join(str(run.folder) for run in row.runs),
                "command": of.command or of.why_not, "RUN": of.run,
            })  # fmt: skip
        for task, found in self.summaries.items():
            for group in found.rows:
                writer.writerow({
                    "part": f"task={task}", "number": found.metric, "setting": group.name, **_values(group.number),
                    "seeds": group.n, "runs": " ".join(map(str, group.folders)),
                })  # fmt: skip
        return text.getvalue()

    def _tables(self) -> dict[str, list[PaperComparison]]:
        """Title of the paper's table → its rows; differences that repeat those of the row above are `as above`."""
        tables: dict[str, list[PaperComparison]] = {}
        for above, row in zip([None, *self.beside], self.beside, strict=False):
            before = above and (above.published.table, above.runs, above.differs)
            repeats = row.differs and before == (row.published.table, row.runs, row.differs)
            tables.setdefault(row.published.table, []).append(replace(row, differs=["as above"]) if repeats else row)
        return tables

    def _summary(self, found: Summary) -> list[tuple[str, ...]]:
        """The table of a task's runs, with a column for each further number."""
        of_folder = {run.folder: run.result.numbers for run in self.runs}
        (settings, metric, *rest), *lines = summary.table(found)
        keys = [key for key in self.numbers if key != found.metric]
        table = [(settings, metric, *keys, *rest)]
        for group, (settings, value, *rest) in zip(found.rows, lines, strict=True):
            numbers = [of_folder[folder] for folder in group.folders]
            every = [[own[key] for own in numbers if key in own] for key in keys]
            more = [readable(over_seeds(each)) if len(each) == len(numbers) else "–" for each in every]
            table.append((settings, value, *more, *rest))
        return table


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the heading."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _paper(row: PaperComparison) -> str:
    """The published value, with a mark if it is unconfirmed."""
    return row.published.printed + (f" (unconfirmed: {told})" if (told := row.published.unconfirmed) else "")


def _ours(row: PaperComparison) -> str:
    """The measured value, or the reason why there is none."""
    if row.ours is not None:
        return readable(row.ours) if isinstance(row.ours, Number) else row.ours
    of = row.published
    return "not run" if of.command else "–" if of.ours else of.why_not


def _short(text: str) -> str:
    return text if len(text) < WIDE else "below"


def _below(row: PaperComparison) -> list[str]:
    """The lines below a row in the terminal."""
    of = row.published
    lines = [("ours", _ours(row))] if _short(_ours(row)) != _ours(row) else []
    lines += [("run", shortened([run.folder for run in row.runs]))] if row.runs else []
    lines += [("" if i else "differs", line) for i, line in enumerate(row.differs)]
    lines += [("command", of.command + (f"    RUN: {of.run}" if of.run else ""))] if of.command else []
    lines += [("but" if of.command else "none", of.why_not)] if of.ours and of.why_not else []
    return [f"    {label:9}{text}" for label, text in lines]


def _markdown_row(row: PaperComparison) -> tuple[str, ...]:
    """paper, ours, setting, command."""
    of = row.published
    told = "; ".join(filter(None, (of.source, of.unconfirmed and f"from memory: {of.unconfirmed}")))
    runs = row.runs and shortened([run.folder for run in row.runs])
    differs = row.differs and f"**differs:** {'; '.join(row.differs)}"
    command, made_by = of.command and f"`{of.command}`", of.run and f"RUN: `{of.run}`".replace(", or ", "`, or `")
    cells = ((of.printed, told), (_ours(row), runs), (of.setting, differs), (command, made_by, of.ours and of.why_not))
    return tuple("<br>".join(str(part) for part in cell if part) for cell in cells)


def _values(ours: Number | str | None) -> dict[str, Any]:
    """The cells of a measured number."""
    if not isinstance(ours, Number):
        return {"ours": ours or ""}
    low, high = ours.interval or ("", "")
    return {"ours": ours.value, "low": low, "high": high, "deviation": "" if ours.deviation is None else ours.deviation}


def _remarks(found: Summary) -> list[str]:
    """The caution and the left-out runs of a summary, a line each."""
    lines = [f"left out: {shortened([path])}: {why}" for path, why in found.left_out.items()]
    return [*([found.caution] if found.caution else []), *lines]
