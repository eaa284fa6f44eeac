"""Every figure of a GPU by one command, which ends in time and goes on when it is called again.

    python benchmarks/gpu.py --minutes 12 --cifar CIFAR10 --out gpu
    python benchmarks/gpu.py train sampling --minutes 8

Parts, in this order: `tests` (pytest -m gpu) and `train` (1), `sampling` (2), `cifar` (3), `data` (4), `memory` (5),
`evidence` (6); a number names its parts. gpu.json in the folder `--out` holds every figure with its command and commit,
written after each; gpu.md there is the tables, and with `--docs` they replace the marked block of docs/performance.md.

A machine without network: `--prepare WHEELS` elsewhere makes a folder of what a CUDA image lacks, `--wheels WHEELS`
takes it from there. `--tiny` runs everything at sizes of no meaning, on a CPU too.
"""

import argparse
import fnmatch
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_wheels

if TYPE_CHECKING:
    from gpu_units import Unit  # imports PyTorch

ROOT = gpu_wheels.ROOT
PARTS = {  # name: number, module, its list of units, its table, title
    "tests": ("1", "gpu_runs", "make_tests_table", "Tests"),
    "train": ("1", "gpu_train", "make_table", "Training steps"),
    "sampling": ("2", "gpu_sampling", "make_table", "Sampling with iGPT-S, 1,024 tokens an image"),
    "cifar": ("3", "gpu_runs", "make_cifar_table", "CIFAR-10 at 32×32"),
    "data": ("4", "gpu_runs", "make_data_table", "From photographs to the device"),
    "memory": ("5", "gpu_memory", "make_table", "Memory against the plan"),
    "evidence": ("6", "gpu_evidence", "make_table", "Findings at 32×32"),
}
DOCS = ROOT / "docs" / "performance.md"
RECORD = ROOT / "docs" / "gpu.json"  # the figures that docs/performance.md shows
BEGIN, END = "<!-- benchmarks/gpu.py -->", "<!-- end of benchmarks/gpu.py -->"
NO_FIGURES = "This command has not run on a GPU yet: it has no figures here."


def render(report: Mapping[str, Any] | None) -> str:
    """The tables of all parts as Markdown, with the machine; of no report the sentence that there is none."""
    if not report or not report["units"]:
        return NO_FIGURES
    from gpu_units import select_part

    about, units = report["machine"], report["units"]
    commits = sorted({entry["commit"] for entry in units.values()})
    card = f"{about['gpu']}, driver {about['driver']}" if about["gpu"] else f"no GPU: {about['cpu']}"
    lines = [
        f"{card}; PyTorch {about['torch']}, Python {about['python']}, {about['cores']} cores, commit "
        f"{', '.join(commits)}."
    ]
    for part, (_, module, table, title) in PARTS.items():
        figures = select_part(units, part)
        errors = [f"- `{name}`: {entry['error']}" for name, entry in figures.items() if "error" in entry]
        if rows := getattr(importlib.import_module(module), table)(figures):
            lines += ["", f"**{title}**", "", *rows]
        if errors:
            lines += ["", f"**{title}**: without figures", "", *errors]
    return "\n".join(lines)


def replace_block(text: str, block: str) -> str:
    """A page with what stands between the marks replaced."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"docs/performance.md lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def choose_units(units: Sequence["Unit"], patterns: Sequence[str]) -> list["Unit"]:
    """The units whose keys a pattern of the shell fits, in the order of the patterns.

    Raises:
        SystemExit: a pattern that fits none.
    """
    chosen: dict[str, Unit] = {}
    for pattern in patterns:
        fitting = {unit.key: unit for unit in units if fnmatch.fnmatchcase(unit.key, pattern)}
        if not fitting:
            raise SystemExit(f"no unit is called {pattern}: {', '.join(unit.key for unit in units)}")
        chosen = {**chosen, **{key: unit for key, unit in fitting.items() if key not in chosen}}
    return list(chosen.values())


def main(argv: Sequence[str] | None = None, *, apart: bool = True) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = sorted({number for number, *_ in PARTS.values()})
    parser.add_argument(
        "part", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} or {', '.join(numbers)}; none: all"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="that this call may take")
    parser.add_argument(
        "--units", nargs="+", metavar="PATTERN", help="only these, in this order, as 'train/s *' 'sampling/64 bf16 *'"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the figures")
    parser.add_argument(
        "--cifar", type=Path, help="folder of CIFAR-10, as data.path=; without it no parts cifar and evidence"
    )
    parser.add_argument("--photos", type=Path, help="folder of photographs; without it JPEGs are made up")
    parser.add_argument("--override", nargs="+", default=[], help="overrides of the runs on CIFAR-10")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--tiny", action="store_true", help="sizes of no meaning, to see that it runs")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is not installed here")
    parser.add_argument("--prepare", type=Path, help="fill this folder of wheels, on a machine with a network, and end")
    parser.add_argument(
        "--bare", nargs="+", default=gpu_wheels.BARE, help="(--prepare) what the GPU's image has already"
    )
    parser.add_argument(
        "--carried", nargs="+", default=["pydantic"], help="(--prepare) what it lacks though its packages may need it"
    )
    parser.add_argument("--python", default="3.12", help="(--prepare) the Python of the GPU's image")
    args = parser.parse_args(argv)
    if unknown := [part for part in args.part if part not in PARTS and part not in numbers]:
        raise SystemExit(f"unknown part {unknown[0]}: {', '.join(PARTS)} or {', '.join(numbers)}")
    if args.prepare:
        gpu_wheels.prepare(args.prepare, args.bare, args.python, args.carried)
        return {}
    end = time.monotonic() + 60 * args.minutes
    if absent := gpu_wheels.provide(args.wheels, args.out / "site"):
        print(
            f"not installed, and {'not in --wheels' if args.wheels else 'no --wheels'}: {', '.join(absent)}; what "
            "imports them will say so. On a machine with a network: python benchmarks/gpu.py --prepare WHEELS"
        )
    if "torch" in absent:
        raise SystemExit("PyTorch is not installed here: take an image, or an environment, that has a CUDA build of it")
    import torch
    from gpu_units import Figures, Unit, run_units

    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("PyTorch sees no GPU here: --tiny runs the parts on a CPU, for figures of no meaning")
    figures = Figures(args.out, " ".join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)]))
    chosen = [part for part, (number, *_) in PARTS.items() if not args.part or {part, number} & set(args.part)]
    units: list[Unit] = []
    for module in dict.fromkeys(PARTS[part][1] for part in chosen):
        units += importlib.import_module(module).list_units(args)
    units = [unit for part in chosen for unit in units if unit.part == part]
    if args.units:
        units = choose_units(units, args.units)
    if not apart:
        units = [Unit(**{**vars(unit), "apart": False}) for unit in units]

    def write_tables() -> None:
        (args.out / "gpu.md").write_text(render(figures.report) + "\n")

    left = run_units(units, figures, end - time.monotonic(), after=write_tables)
    write_tables()
    if args.docs:
        RECORD.write_text(json.dumps(figures.report, indent=1) + "\n")
        DOCS.write_text(replace_block(DOCS.read_text(), render(figures.report)))
    for unit in left:
        print(f"left: {unit.key}, about {figures.estimate(unit):.0f} s")
    print(f"{args.out / 'gpu.md'}; {'the same command goes on' if left else 'all is measured'}")
    return figures.report


if __name__ == "__main__":
    main()
