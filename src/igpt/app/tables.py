"""A comparison as text to read in a terminal, as Markdown, and as rows for other programs."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt.app import summary
from igpt.app.against import Row
from igpt.app.summary import Summary, over_seeds, shortened
from igpt.metric.result import Number
from igpt.report.paper import TABLES
from igpt.report.runs import Run
from igpt.report.text import columns, readable

HEADINGS = ("paper", "ours", "setting", "command")
FIELDS = (
    "part", "number", "setting", "paper", "source", "ours", "low", "high", "deviation", "seeds", "differs", "runs",
    "command", "RUN",
)  # fmt: skip
WIDE = 48  # characters of a cell; what is longer stands below its row


@dataclass(frozen=True)
class Text:
    """What a comparison found: published numbers with the runs beside them, and the runs of each task by one number."""

    n_run: int
    problems: dict[Path, str]
    beside: Sequence[Row]
    summaries: dict[str, Summary]
    numbers: Sequence[str]  # further columns of the summaries
    runs: Sequence[Run]

    @property
    def said(self) -> list[str]:
        """A line for each folder that could not be read, after how many there are."""
        lines = [f"{shortened([path])}: {why}" for path, why in self.problems.items()]
        return [f"{self.n_run} runs read, {len(self.problems)} folders left out" + (":" if lines else ""), *lines]

    def plain(self) -> str:
        """For a terminal."""
        blocks = []
        for title, rows in self._tables():
            cells = [
                (paper(row), ours(row) if len(ours(row)) < WIDE else "below", row.published.setting) for row in rows
            ]
            heading, rule, *body = columns([("paper", "ours", "setting"), *cells]).splitlines()
            block = [title, heading, rule]
            for i, (line, row) in enumerate(zip(body, rows, strict=True)):
                block += [line, *(f"    {part}" for part in _below(row, rows[i - 1] if i else None))]
            blocks.append("\n".join(block))
        for task, found in self.summaries.items():
            table = columns([self._headings(found), *self._rows(found)])
            blocks.append("\n".join([f"task={task}", table, *_remarks(found)]))
        return "\n\n".join([*blocks, "\n  ".join(self.said)]) + "\n"

    def markdown(self) -> str:
        """For a page: a table for each of the paper's, and one for each task."""
        blocks = ["# Runs compared"]
        for title, rows in self._tables():
            before = [None, *rows[:-1]]
            cells = [markdown_row(row, above) for row, above in zip(rows, before, strict=True)]
            blocks.append(f"## {title}\n\n{grid(HEADINGS, cells)}")
        for task, found in self.summaries.items():
            table = grid(self._headings(found), self._rows(found))
            blocks.append("\n\n".join([f"## task={task}", table, *_remarks(found)]))
            if len(found.rows) > 1:
                blocks.append(f"![{found.metric}](compare_{task}.png)")
        counted, *lines = self.said
        return "\n\n".join([*blocks, "\n".join([counted, *(f"- {line}" for line in lines)])]) + "\n"

    def csv(self) -> str:
        """One line a row, values as they are: shares of 1, losses in nats per token."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(FIELDS)
        for row in self.beside:
            of, value = row.published, row.ours
            number = value if isinstance(value, Number) else None
            low, high = (number.interval if number else None) or ("", "")
            writer.writerow([
                f"paper: {TABLES[of.table]}", of.key, of.setting,
                of.detail if of.value is None else of.value, of.source,
                number.value if number else value or "", low, high, _or_empty(number.deviation if number else None),
                len(row.runs), "; ".join(row.differs), " ".join(str(run.folder) for run in row.runs),
                of.command or of.why_not, of.run,
            ])  # fmt: skip
        for task, found in self.summaries.items():
            for line in found.rows:
                low, high = line.interval or ("", "")
                writer.writerow([
                    f"task={task}", found.metric, line.name, "", "", line.mean, low, high, _or_empty(line.deviation),
                    line.n, "", " ".join(map(str, line.folders)), "", "",
                ])  # fmt: skip
        return text.getvalue()

    def _tables(self) -> list[tuple[str, list[Row]]]:
        tables = [(title, [row for row in self.beside if row.published.table == key]) for key, title in TABLES.items()]
        return [(title, rows) for title, rows in tables if rows]

    def _headings(self, found: Summary) -> tuple[str, ...]:
        settings, metric, *rest = summary.headings(found)
        return settings, metric, *(key for key in self.numbers if key != found.metric), *rest

    def _rows(self, found: Summary) -> list[tuple[str, ...]]:
        of_folder = {run.folder: run for run in self.runs}
        lines = []
        for row, (settings, value, *rest) in zip(found.rows, summary.table(found), strict=True):
            runs = [of_folder[folder] for folder in row.folders]
            more = []
            for key in (key for key in self.numbers if key != found.metric):
                having = [run.numbers[key] for run in runs if key in run.numbers]
                more.append(readable(over_seeds(having)) if len(having) == len(runs) else "–")
            lines.append((settings, value, *more, *rest))
        return lines


def paper(row: Row) -> str:
    """The published value, marked where it is from memory."""
    return row.published.printed + (f" (unconfirmed: {told})" if (told := row.published.unconfirmed) else "")


def ours(row: Row) -> str:
    """What the runs found; why there is nothing, where there is not."""
    if isinstance(row.ours, Number):
        return readable(row.ours)
    if row.ours:
        return row.ours
    return "not run" if row.published.command else "–" if row.published.ours else row.published.why_not


def _below(row: Row, above: Row | None) -> list[str]:
    """The lines under a row in a terminal."""
    of = row.published
    lines = [f"ours     {ours(row)}"] if len(ours(row)) >= WIDE else []
    lines += [f"run      {shortened([run.folder for run in row.runs])}"] if row.runs else []
    lines += [f"{'differs' if not i else '':9}{line}" for i, line in enumerate(_said(row, above))]
    if of.command:
        lines.append(f"command  {of.command}" + (f"    RUN: {of.run}" if of.run else ""))
    elif of.ours:
        lines.append(f"none     {of.why_not}")
    if of.command and of.why_not:
        lines.append(f"but      {of.why_not}")
    return lines


def _said(row: Row, above: Row | None) -> list[str]:
    """What differs; where that is what the row above says of the same run, only that."""
    same = above is not None and above.runs == row.runs and above.differs == row.differs
    return ["as above"] if same and row.differs else row.differs


def _remarks(found: Summary) -> list[str]:
    """What is to be known of a table of runs."""
    lines = [f"left out: {shortened([path])}: {why}" for path, why in found.left_out.items()]
    return [*([found.caution] if found.caution else []), *lines]


def markdown_row(row: Row, above: Row | None) -> tuple[str, ...]:
    """paper, ours, setting, command."""
    of = row.published
    value = ours(row) + (f"<br>{shortened([run.folder for run in row.runs])}" if row.runs else "")
    setting = of.setting + (f"<br>**differs:** {'; '.join(_said(row, above))}" if row.differs else "")
    command = f"`{of.command}`" if of.command else ""
    command += f"<br>RUN: `{of.run}`".replace(", or ", "`, or `") if of.run else ""
    told = "; ".join(part for part in (of.source, of.unconfirmed and f"from memory: {of.unconfirmed}") if part)
    return (
        f"{of.printed}<br>{told}",
        value,
        setting,
        "<br>".join(part for part in (command, of.ours and of.why_not) if part),
    )


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value
