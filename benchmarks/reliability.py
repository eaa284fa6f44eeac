"""Every task is killed, and meets errors of the disk, at its own file operations: does it end as one left undisturbed?

python benchmarks/reliability.py                                          all tasks: 324 kills, 158 errors
python benchmarks/reliability.py --sample                                 5 of them
python benchmarks/reliability.py --task pretrain --at 37 --fault ENOSPC   one, with all that it wrote
python benchmarks/reliability.py --task ddp --at 5 --rank 1 --fault KILL

Each task runs undisturbed first, and its file operations are numbered. Then it runs from the same folder again and
again: killed by SIGKILL at one operation, or refused one with EIO, EACCES, or, from there on, ENOSPC. After each of
these it is resumed where there is a checkpoint, else begun again. Weights, numbers, curves and pictures must equal
those of the undisturbed run to the bit; nothing that a checkpoint held may be lost; an error must be a line that names
the file; no bystander's error may end a run; nothing temporary may be left. Where not, the position is printed and the
exit code is 1.

Linux with a C compiler (fault_injection.py, fault_injection.c).
"""

import argparse
import gc
import importlib
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_injection import (
    ERRORS,
    KILL,
    TRAIN,
    Fault,
    Operation,
    adopt_orphans,
    compile_library,
    run_train,
)
from reliability_checks import (
    Baseline,
    check_failed,
    check_killed,
    compare_facts,
    find_steps,
    last_line,
    list_temporary,
    read_facts,
)
from reliability_tasks import MODULES, PRETRAIN, SAMPLE, TASKS

MISSED = "missed"  # the operation was not reached: which rank makes a cache, is not fixed


@dataclass(frozen=True)
class Outcome:
    """How a disturbed task ended. `how`: equal, MISSED, and after errors also error or warning."""

    task: str
    fault: Fault
    operation: Operation | None
    how: str
    problems: list[str]
    text: str

    def __str__(self) -> str:
        rank = f" --rank {self.fault.slot - 1}" if self.fault.slot else ""
        where = f"{self.operation.name} {self.operation.path}" if self.operation else "not reached"
        lines = [f"--task {self.task} --at {self.fault.at}{rank} --fault {self.fault.kind}: {where}", *self.problems]
        return "\n    ".join(lines[:6])


def make_template(folder: Path, tasks: Sequence[str]) -> Path:
    """A folder in which these tasks can start: `base/` with trained weights, a run on them, exported ones, images."""
    import numpy as np
    from PIL import Image

    place = folder / "making"
    work, base = place / "work", place / "work" / "base"
    for path in (base, work / "tmp"):
        path.mkdir(parents=True)
    for name, arguments, part in (
        ("pretrained", (*PRETRAIN, "task.checkpoint_keep=9"), "."),
        ("evaluated", TASKS["evaluate"].arguments, "."),
        ("huggingface", TASKS["export"].arguments, "huggingface"),
    ):
        is_used = any(f"base/{name}" in argument for task in tasks for argument in TASKS[task].arguments)
        if is_used or name == "pretrained":  # that one leaves the compiled library and fonts, for every task
            result = run_train(place, arguments)
            if result.code:
                raise SystemExit(f"{' '.join(arguments)} ended with {result.code}:\n{result.text}")
            (run,) = (work / "runs").iterdir()
            shutil.copytree(run / part, base / name)
            shutil.rmtree(work / "runs")
    draw = np.random.default_rng(0)
    for i in range(40):
        path = base / "photos" / ("train", "train", "train", "val", "test")[i % 5] / "ab"[i // 5 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    shutil.rmtree(work / ".cache", ignore_errors=True)
    return work.rename(folder / "template")


def run_baseline(name: str, folder: Path) -> Baseline:
    """Runs a task undisturbed; one that starts processes both with new interpreters and with forks."""
    task, template = TASKS[name], folder / "template"
    if task.without:
        template = shutil.copytree(template, folder / f"template-{name}")
        for part in task.without:
            shutil.rmtree(template / part, ignore_errors=True)
    facts: list[dict[str, Any]] = []
    for forks in (False, True) if task.spawns else (True,):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            shutil.copytree(template, Path(place) / "work")
            result = run_train(Path(place), task.arguments, forks=forks)
            if result.code or result.problems:
                raise SystemExit(f"{name} ended with {result.code}, {result.problems}:\n{result.text}")
            if left := list_temporary(Path(place) / "work"):
                raise SystemExit(f"{name}, undisturbed, leaves {left}")
            facts.append(read_facts(Path(place) / "work"))
    if differs := compare_facts(facts[-1], facts[0], bystanders=True):
        raise SystemExit(f"{name}: forked processes give other results than new interpreters: {differs}")
    return Baseline(name, template, result.operations, result.text, facts[-1])


def inject_fault(baseline: Baseline, fault: Fault, keep: Path | None = None) -> Outcome:
    """Runs a task with a fault, then again without, and checks what is promised."""
    arguments = TASKS[baseline.task].arguments
    with tempfile.TemporaryDirectory(prefix="igpt-reliability-") as name:
        place, work = Path(name), Path(name) / "work"
        shutil.copytree(baseline.template, work)
        result = run_train(place, arguments, fault)
        text = f"$ {' '.join(arguments)}\n{result.text}exit code {result.code}\n"
        if result.hit is None:
            return Outcome(baseline.task, fault, None, MISSED, result.problems, text)
        if fault.kind == KILL:
            how, problems = "equal", check_killed(result, work)
        else:
            how, problems = check_failed(result, baseline, work, fault)
        steps, again = find_steps(work), list_next_arguments(work, arguments)
        then = run_train(place, again)
        text += f"$ {' '.join(again)}\n{then.text}exit code {then.code}\n"
        problems = [*result.problems, *problems, *then.problems]
        if then.code:
            problems.append(f"the next run ends with {then.code}: {last_line(then.text)}")
        messages = then.text + "".join(path.read_text(errors="replace") for path in work.rglob("job_*.txt"))
        for run, step in steps.items():
            resumed = re.findall(rf"resuming from \S*{re.escape(run)}/checkpoints/step_(\d+)", messages)
            if max(map(int, resumed), default=0) < step:
                problems.append(f"the checkpoint of step {step} is not used, but {resumed or 'none'}")
        differs = compare_facts(read_facts(work), baseline.facts, bystanders=fault.kind == KILL)
        problems += [each for each in differs if "/samples/" not in each]  # of a step that was saved before the kill
        problems += [f"{left} is left" for left in list_temporary(work)]
        if keep is not None:
            shutil.copytree(place, keep, dirs_exist_ok=True)
    return Outcome(baseline.task, fault, result.hit, how, problems, text)


def list_next_arguments(work: Path, arguments: Sequence[str]) -> list[str]:
    """`resume=FOLDER` for an unfinished run with a checkpoint, else the same again; a sweep resumes its jobs itself."""
    begun = [path.parent for path in sorted((work / "runs").glob("*/run.json"))]
    begun = [run for run in begun if not (run / "result.json").is_file() and any(run.rglob("step_*.sha256"))]
    return list(arguments) if "-m" in arguments or not begun else [f"resume={begun[0].relative_to(work)}"]


def choose_faults(operations: Sequence[Operation], kills: int, errors: int, rng: random.Random) -> Iterator[Fault]:
    """Positions spread over the kinds of operations, which all occur before one occurs twice."""
    for count, kinds in ((kills, (KILL,)), (errors, ERRORS)):
        groups: dict[Any, list[Fault]] = defaultdict(list)
        for operation in operations:
            groups[operation.kind] += [fault for fault in operation.faults if fault.kind in kinds]
        left = list(groups.values())
        rng.shuffle(left)
        for group in left:
            rng.shuffle(group)
        while count and (left := [group for group in left if group]):
            for group in left[:count]:
                yield group.pop()
            count -= min(count, len(left))


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Kills/errors by task and operation; how errors ended; violations."""
    operations = sorted({each.operation.name for each in outcomes if each.operation})
    hows = ("equal", "warning", "error")
    rows = [("task", *operations, "kills", "errors", *hows, "violations")]
    for task in [*dict.fromkeys(each.task for each in outcomes), "all"]:
        own = [each for each in outcomes if task in (each.task, "all")]
        at = Counter((each.operation.name, each.fault.kind == KILL) for each in own if each.operation)
        errors = Counter(each.how for each in own if each.fault.kind != KILL)
        cells = [f"{at[name, True]}/{at[name, False]}".replace("0/0", "–") for name in operations]
        n_error, wrong = errors.total(), sum(bool(each.problems) for each in own)
        rows.append((task, *cells, *map(str, (len(own) - n_error, n_error, *(errors[how] for how in hows), wrong))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)))


def prepare_process(tasks: Sequence[str]) -> None:
    """Imports what these tasks do and fills the tables of Hydra's parser, for all forks."""
    for name in MODULES:
        importlib.import_module(name)
    from igpt.report.paper import load_paper
    from igpt.run.arguments import prepare_arguments

    load_paper()
    for task in tasks:
        prepare_arguments(list(TASKS[task].arguments), TRAIN.parent / "conf")
    gc.freeze()
    adopt_orphans()


def enumerate_faults(args: argparse.Namespace) -> int:
    """Disturbs the tasks at the chosen positions; prints violations and the table; returns the exit code."""
    start, rng = time.perf_counter(), random.Random(args.seed)
    counts = SAMPLE if args.sample else {name: (TASKS[name].kills, TASKS[name].errors) for name in args.task or TASKS}
    prepare_process(list(counts))
    with tempfile.TemporaryDirectory(prefix="igpt-reliability-") as name:
        folder = Path(name)
        make_template(folder, list(counts))
        if args.at is not None:
            fault = Fault(0 if args.rank is None else 1 + args.rank, args.at, args.fault)
            outcome = inject_fault(run_baseline(args.task[0], folder), fault, args.keep)
            print(outcome.text, outcome, sep="\n")
            return int(bool(outcome.problems))
        outcomes, waiting = [], []
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(args.at_once, mp_context=context, initializer=adopt_orphans) as pool:
            for baseline in pool.map(run_baseline, counts, [folder] * len(counts)):
                kills, errors = (round(args.share * count) for count in counts[baseline.task])
                waiting += [(baseline, fault) for fault in choose_faults(baseline.operations, kills, errors, rng)]
            print(f"{len(counts)} tasks undisturbed: {time.perf_counter() - start:.0f} s", flush=True)
            for outcome in pool.map(inject_fault, *zip(*waiting, strict=True)):
                outcomes.append(outcome)
                if outcome.problems:
                    print(outcome, flush=True)
    reached = [each for each in outcomes if each.how != MISSED]
    print_table(reached)
    kills = sum(each.fault.kind == KILL for each in reached)
    wrong = sum(bool(each.problems) for each in outcomes)
    print(
        f"{kills} kills, {len(reached) - kills} errors ({len(outcomes) - len(reached)} more were not reached), "
        f"{wrong} violations, {time.perf_counter() - start:.0f} s"
    )
    return int(wrong > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="may be repeated; default: all")
    parser.add_argument("--sample", action="store_true", help="5 faults of two tasks")
    parser.add_argument("--share", type=float, default=1.0, help="of the number of faults")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of positions")
    parser.add_argument("--at", type=int, help="a single position, of one task")
    parser.add_argument("--rank", type=int, help="the rank of this position")
    parser.add_argument("--fault", choices=(KILL, *ERRORS), default=KILL, help="at this position")
    parser.add_argument("--keep", type=Path, help="where to keep the folder of this run")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    if "fault_injection" in os.environ.get("LD_PRELOAD", ""):
        sys.exit(enumerate_faults(args))
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(Path(folder))
        more = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        if args.sample:
            more["CC"] = "false"  # saves the seconds of compiling attend.c and decode.c
        sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **more}).returncode)


if __name__ == "__main__":
    main()
