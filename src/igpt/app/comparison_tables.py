"""A comparison as text for the terminal, as Markdown, and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from igpt.app.against import PaperComparison
from igpt.metric.result import Number
from igpt.report.closing_table import align_columns, describe_uncertainty, format_markdown, format_readable
from igpt.report.display_names import display_name
from igpt.report.runs import RunRecord
from igpt.report.summary import Summary
from igpt.report.summary_table import shorten_folders, tabulate_summary
from igpt.report.sweep_pictures import Draw, list_sweep_pictures
from igpt.report.swept_values import warn_of_edges

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

    @property
    def pictures(self) -> dict[str, str]:
        """Title → name of the picture of every summary of several rows: `compare_probe`, `compare_probe_2` …."""
        tasks = [title.partition(" ")[0] for title in self.summaries]
        names = [
            f"compare_{task}" + (f"_{tasks[: i + 1].count(task)}" if tasks.count(task) > 1 else "")
            for i, task in enumerate(tasks)
        ]
        pairs = zip(self.summaries.items(), names, strict=True)
        return {title: name for (title, result), name in pairs if len(result.rows) > 1}

    def list_training_pictures(self, title: str) -> dict[str, tuple[Draw, str]]:
        """Kind → (writer, caption) of the pictures over training, of a summary of several rows."""
        return list_sweep_pictures(self.summaries[title]) if title in self.pictures else {}

    @property
    def messages(self) -> list[str]:
        """The counts of runs and problems, then a line for each problem."""
        lines = [f"{shorten_folders([path])}: {why}" for path, why in self.problems.items()]
        return [f"{len(self.runs)} runs read, {len(self.problems)} folders left out" + (":" if lines else ""), *lines]

    def plain(self) -> str:
        """The text for the terminal."""
        blocks = []
        for title, rows in self._tables().items():
            cells = [(_format_published(row), _short(_format_ours(row)), row.published.setting) for row in rows]
            heading, rule, *body = align_columns([HEADINGS[:3], *cells]).splitlines()
            lines = [part for line, row in zip(body, rows, strict=True) for part in (line, *_below(row))]
            blocks.append("\n".join(filter(None, [title, heading, rule, *lines, _key_to_paper_table(rows)])))
        for title, result in self.summaries.items():
            blocks.append("\n".join([f"task={title}", align_columns(tabulate_summary(result)), *self._remarks(result)]))
        return "\n\n".join([*blocks, "\n  ".join(self.messages)]) + "\n"

    def markdown(self) -> str:
        """The Markdown: a table for each of the paper's, and one for each task."""
        blocks = ["# Runs compared"]
        for title, rows in self._tables().items():
            blocks += [f"## {title}", format_markdown([HEADINGS, *map(_markdown_row, rows)])]
            blocks += filter(None, [_key_to_paper_table(rows)])
        for title, result in self.summaries.items():
            blocks += [f"## task={title}", format_markdown(tabulate_summary(result)), *self._remarks(result)]
            name = self.pictures.get(title)
            drawn = {} if name is None else {name: display_name(result.metric)}
            drawn |= {f"{name}_{kind}": caption for kind, (_, caption) in self.list_training_pictures(title).items()}
            blocks += [f"![{caption}]({file}.png)" for file, caption in drawn.items()]
        counted, *lines = self.messages
        return "\n\n".join([*blocks, "\n".join([counted, *(f"- {line}" for line in lines)])]) + "\n"

    def csv(self) -> str:
        """The CSV, one line a row; shares of 1, losses in nats per token."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in self.beside:
            entry = row.published
            writer.writerow({
                "part": f"paper: {entry.table}", "number": entry.number if entry.key else "", "setting": entry.setting,
                "source": entry.source, "paper": entry.detail if entry.value is None else entry.value,
                **_values(row.ours),
                "seeds": len(row.runs),
                "differs": "; ".join(row.differs), "runs": " ".join(str(run.folder) for run in row.runs),
                "command": entry.command or entry.why_not, "RUN": entry.run,
            })  # fmt: skip
        for title, result in self.summaries.items():
            for group in result.rows:
                writer.writerow({
                    "part": f"task={title}", "number": result.metric, "setting": group.name, **_values(group.number),
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

    def _remarks(self, result: Summary) -> list[str]:
        """The key to uncertainties, the caution, values at an edge and the left-out runs of a summary, a line each."""
        lines = [f"left out: {shorten_folders([path])}: {why}" for path, why in result.left_out.items()]
        return [*filter(None, (result.key, result.caution)), *warn_of_edges(result), *lines]


def _format_published(row: PaperComparison) -> str:
    """The published value, with a mark if it is unconfirmed."""
    return row.published.printed + (f" (unconfirmed: {text})" if (text := row.published.unconfirmed) else "")


def _format_ours(row: PaperComparison) -> str:
    """The measured value, or the reason why there is none."""
    if row.ours is not None:
        return format_readable(row.ours) if isinstance(row.ours, Number) else row.ours
    entry = row.published
    return "not run" if entry.command else "–" if entry.is_ours else entry.why_not


def _short(text: str) -> str:
    return text if len(text) < WIDE else "below"


def _below(row: PaperComparison) -> list[str]:
    """The lines below a row in the terminal."""
    entry = row.published
    lines = [("ours", _format_ours(row))] if _short(_format_ours(row)) != _format_ours(row) else []
    lines += [("run", shorten_folders([run.folder for run in row.runs]))] if row.runs else []
    lines += [("" if i else "differs", line) for i, line in enumerate(row.differs)]
    lines += [("command", entry.command + (f"    RUN: {entry.run}" if entry.run else ""))] if entry.command else []
    lines += [("but" if entry.command else "none", entry.why_not)] if entry.is_ours and entry.why_not else []
    return [f"    {label:9}{text}" for label, text in lines]


def _markdown_row(row: PaperComparison) -> tuple[str, ...]:
    """paper, ours, setting, command."""
    entry = row.published
    text = "; ".join(filter(None, (entry.source, entry.unconfirmed and f"from memory: {entry.unconfirmed}")))
    runs = row.runs and shorten_folders([run.folder for run in row.runs])
    differs = row.differs and f"**differs:** {'; '.join(row.differs)}"
    run_text = entry.run and f"RUN: `{entry.run}`".replace(", or ", "`, or `").replace(", of ", "`, of `")
    cells = (
        (entry.printed, text),
        (_format_ours(row), runs),
        (entry.setting, differs),
        (entry.command and f"`{entry.command}`", run_text, entry.is_ours and entry.why_not),
    )
    return tuple("<br>".join(str(part) for part in cell if part) for cell in cells)


def _values(ours: Number | str | None) -> dict[str, Any]:
    """The cells of a measured number."""
    if not isinstance(ours, Number):
        return {"ours": ours or ""}
    low, high = ours.interval or ("", "")
    return {"ours": ours.value, "low": low, "high": high, "deviation": "" if ours.deviation is None else ours.deviation}


def _key_to_paper_table(rows: Sequence[PaperComparison]) -> str:
    """The key to the uncertainties of our numbers in a table of the paper."""
    numbers = [row.ours for row in rows if isinstance(row.ours, Number)]
    of_figures = [run.result.numbers.values() for row in rows if isinstance(row.ours, str) for run in row.runs]
    return describe_uncertainty([*numbers, *(number for of in of_figures for number in of)])
