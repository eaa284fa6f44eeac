"""The evidence for the paper's findings: small copies of runs in docs/evidence/, and the table that reads them.

    python benchmarks/evidence.py collect FINDING RUN [RUN …]    copy result.json, run.json and a picture of each run
    python benchmarks/evidence.py write                          write the pictures, and the table of README.md

A finding is a folder of docs/evidence/; FINDINGS in evidence_findings.py makes its rows. Paths of this machine do not
enter: the folder of images becomes DATA. `tests/evidence` holds README.md to these files.
"""

import argparse
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence_findings import FINDINGS, READS, list_compared
from evidence_palettes import list_palettes, original_bits
from evidence_runs import ALONE, JOINT, SCRATCH, YES, Run, bound_mean, choose_rates, read_runs, split_by_length
from PIL import Image

from igpt.metric.result import Bars, MarkedLines, Number
from igpt.report.figures import bars_figure, lines_figure
from igpt.utils import files

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "evidence"
README = ROOT / "README.md"
BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"
PAGE = FOLDER / "README.md"
PICTURES = ("curves.png", "figure3.png", "samples.png", "completions.png")  # of a run folder
COLOURS = 64  # of a kept picture: a fifth of the bytes
LOCAL = ("working_directory", "search_path")  # of run.json: paths of this machine


def collect(finding: str, runs: Sequence[Path], folder: Path = FOLDER) -> None:
    """Copies result.json, run.json and the picture of finished runs into the folder of a finding.

    Raises:
        SystemExit: a run has not finished.
    """
    for run in runs:
        if not (run / "result.json").is_file():
            raise SystemExit(f"{run} has no result.json: name folders of finished runs")
        record, result = files.read_json(run / "run.json"), files.read_json(run / "result.json")
        names = find_local_paths(record)
        kept = folder / finding / run.name
        kept.mkdir(parents=True, exist_ok=True)
        record = {key: value for key, value in record.items() if key not in LOCAL}
        for name, of in (("run.json", record), ("result.json", result)):
            files.write_json(kept / name, replace_paths(of, names))
        for picture in PICTURES:
            if (run / picture).is_file():
                with files.atomic_write(kept / picture) as file:
                    Image.open(run / picture).convert("RGB").quantize(COLOURS).save(file, "PNG", optimize=True)
        print(kept.relative_to(folder.parent.parent))


def find_local_paths(record: Mapping[str, Any]) -> dict[str, str]:
    """Paths of this machine in a run's record, longest first → what stands for them."""
    config = record["config"]
    names = {config["data"].get("path"): "DATA", record.get("working_directory"): "."}
    words = shlex.split(record.get("command") or "")
    names |= {word: "train.py" for word in words if word.endswith("/train.py")}
    return {path: names[path] for path in sorted(filter(None, names), key=len, reverse=True) if path.startswith("/")}


def replace_paths(value: Any, names: Mapping[str, str]) -> Any:
    """`value` of a JSON file with every path of `names` replaced."""
    if isinstance(value, Mapping):
        return {key: replace_paths(of, names) for key, of in value.items()}
    if isinstance(value, list):
        return [replace_paths(of, names) for of in value]
    if isinstance(value, str):
        for path, name in names.items():
            start = rf"(?<![\w.-]){re.escape(path)}"
            value = re.sub(rf"{start}/", "" if name == "." else f"{name}/", value)
            value = re.sub(rf"{start}(?![\w.-])", name, value)
    return value


def read_finding(folder: Path, finding: str) -> list[Run]:
    """The runs that a finding reads: those in its folder, and those of others that it is compared with."""
    return [run for name in (finding, *READS.get(finding, ())) for run in read_runs(folder / name)]


def render(folder: Path = FOLDER) -> str:
    """The table of all findings with runs, in Markdown, and how many of its rows hold."""
    rows = [(finding, row) for finding, describe in FINDINGS.items() for row in describe(read_finding(folder, finding))]
    held = sum(row.holds == YES for _, row in rows)
    lines = [f"{held} of {len(rows)} rows hold beyond their intervals.", ""]
    lines += ["| finding | paper | ours | holds? |", "|---|---|---|---|"]
    lines += [f"| [{row.finding}](docs/evidence/{of}) | {row.paper} | {row.ours} | {row.holds} |" for of, row in rows]
    return "\n".join(lines)


def render_runs(folder: Path = FOLDER) -> str:
    """The table of all kept runs, in Markdown: command, images its weights have read, minutes, commit, versions."""
    lines = ["| run | command | images its weights have read | minutes | commit, PyTorch |", "|---|---|---|---|---|"]
    for finding in FINDINGS:
        for run in read_runs(folder / finding):
            seen = run.result.numbers.get("train/images_seen")
            images, about = "" if seen is None else f"{seen.value:,.0f}", run.record
            lines.append(
                f"| [{run.name}]({finding}/{run.name}) | `{about['command']}` | {images} | {run.seconds / 60:.0f} | "
                f"{about['commit'][:8]}, {about['versions'].get('torch', '')} |"
            )
    return "\n".join(lines)


def fill(path: Path, table: str) -> str:
    """The text of a page with the table between its marks. Raises ValueError if they are not there, in order."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the marks {BEGIN} and {END}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def draw_finetuning(folder: Path = FOLDER) -> None:
    """The picture of fine-tuning: test accuracy of every arm, mean over seeds, and of the labelled probe."""
    runs = read_runs(folder / "finetuning")
    heights = {}
    for of_length in split_by_length(runs):
        arms = choose_rates(of_length)
        for arm in (SCRATCH, ALONE, JOINT):
            if of := arms.get(arm):
                seen = of[0].task["steps"] * of[0].task["batch_size"]
                heights[f"{arm}, {seen:,} images"] = {"test": bound_mean(of)}
    for run in runs:
        if run.task["name"] == "probe":
            heights["probe, the same labels"] = {"test": run.number("test/accuracy")}
    if heights:
        bars_figure(folder / "finetuning" / "accuracy.png", Bars(heights, "share of images"))


def draw_objectives(folder: Path = FOLDER) -> None:
    """The picture of AR and BERT: test accuracy of the probes of equal labels, and of the longest fine-tuning."""
    heights: dict[str, dict[str, Number]] = {}
    for kind, of in list_compared(read_finding(folder, "objectives")).items():
        heights[kind] = {objective.upper(): number for objective, number in sorted(of.items())}
    if heights:
        bars_figure(folder / "objectives" / "accuracy.png", Bars(heights, "share of images"))


def draw_palettes(folder: Path = FOLDER) -> None:
    """The pictures of the palette's size: bits of the original image, and accuracy of the best layer's probe."""
    sizes = sorted(list_palettes(read_runs(folder / "palette")).items())
    for name, unit, measure in (
        ("bits", "code length of the original image, bits a pixel", original_bits),
        ("accuracy", "test accuracy of the best layer's probe", lambda run: run.number("probe/test/accuracy")),
    ):
        if sizes:
            points = [(math.log2(k), measure(run)) for k, run in sizes]
            lines = MarkedLines(
                {"raster order, seed 0": points}, "bits a token: log2 of the number of colours", unit, ""
            )
            lines_figure(folder / "palette" / f"{name}.png", lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="copy finished runs into the folder of a finding")
    collecting.add_argument("finding", help="folder of docs/evidence/: " + ", ".join(FINDINGS))
    collecting.add_argument("runs", nargs="+", type=Path, help="run folders")
    commands.add_parser("write", help="write the pictures, and the table of README.md")
    args = parser.parse_args()
    if args.command == "collect":
        return collect(args.finding, args.runs)
    for draw in (draw_finetuning, draw_objectives, draw_palettes):
        draw()
    for path, table in ((README, render()), (PAGE, render_runs())):
        text = fill(path, table)
        with files.atomic_write(path) as file:
            file.write(text.encode())
        print(f"{table}\n")


if __name__ == "__main__":
    main()
