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
import hashlib
import importlib
import json
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
    ProcessResult,
    adopt_orphans,
    compile_library,
    run_train,
)

MISSED = "missed"  # the operation was not reached: which rank makes a cache, is not fixed
NET = ("model.n_layer=2", "model.n_embd=16", "trainer=cpu")
DATA = ("data.labels_per_class=4", "data.val_fraction=0.03", "data.test_fraction=0.03")
STEPS = ("steps=6", "batch_size=16", "val_every=3", "log_every=2", "checkpoint_every=2")
FIT = (*DATA, *(f"task.{each}" for each in STEPS), "callbacks.samples.count=4")
PRETRAIN = ("task=pretrain", *NET, *FIT, "task.warmup_steps=2")
PHOTOS = ("data=folder", "data.path=base/photos", "data.n_class=2", "data.resolution=8", "data.palette_size=8")
PROBE = ("task.C_grid=[0.1,1.0]", "task.baselines=[pixels]")
SGD = ("task.solver=sgd", "task.folds=null", "task.sgd.rates=[1.0,0.1]", *(f"task.sgd.{each}" for each in STEPS))
FEW_LABELS = ("data.labels_per_class=null", "task.per_class=[2]", "task.subsets=2", "task.layer=1")
PRETRAIN_STAGE = (f"task.stages.pretrain.{each}" for each in (*STEPS, "warmup_steps=2"))
NO_STAGES = (f"task.stages.{name}=null" for name in ("complete", "probe", "finetune", "scratch"))
FINISHED = "task.runs=[base/pretrained,base/evaluated]"
GROUPS = tuple(f"{group}=checkpoint" for group in ("model", "tokens", "objective"))
ON_CHECKPOINT = ("init=base/pretrained", "data=digits", *GROUPS, "trainer=cpu")
DDP = ("trainer=ddp", "trainer.accelerator=cpu")


@dataclass(frozen=True)
class Task:
    """A command, and how many kills and errors it gets."""

    arguments: tuple[str, ...]
    kills: int = 13
    errors: int = 6
    spawns: bool = False  # a launcher starts its processes
    without: tuple[str, ...] = ()  # parts of the template that are not there


TASKS = {
    "pretrain": Task(PRETRAIN, 36, 20),
    "images": Task((*PRETRAIN, *PHOTOS, "callbacks=probe")),
    "finetune": Task(("task=finetune", *ON_CHECKPOINT, *FIT)),
    "probe": Task(("task=probe", *ON_CHECKPOINT, *DATA, *PROBE)),
    "sgd_probe": Task(("task=probe", *ON_CHECKPOINT, *DATA, *SGD)),
    "low_data": Task(("task=low_data", *ON_CHECKPOINT, *DATA, *PROBE, *FEW_LABELS)),
    "scaling": Task(("task=scaling", "task.runs=[base/pretrained]", "trainer=cpu", *DATA, PROBE[0])),
    "evaluate": Task(("task=evaluate", *ON_CHECKPOINT, *DATA)),
    "sample": Task(("task=sample", *ON_CHECKPOINT, "task.count=4")),
    "complete": Task(("task=complete", *ON_CHECKPOINT, *DATA, "task.count=2", "task.completions=2")),
    "palette": Task(("task=palette", *DATA, "task.count=20")),
    "import": Task(("task=import", "init=base/huggingface", "trainer=cpu")),
    "export": Task(("task=export", *ON_CHECKPOINT)),
    "compare": Task(("task=compare", FINISHED)),
    "report": Task(("task=report", FINISHED)),
    "pipeline": Task(("experiment=quickstart", "data=digits", *NET, *DATA, *PRETRAIN_STAGE, *NO_STAGES), 24, 10),
    "library": Task(("task=sample", *ON_CHECKPOINT, "task.count=4"), 5, 3, without=("xdg",)),
    "wandb": Task((*PRETRAIN, "logger=[csv,wandb]", "logger.wandb.offline=true"), 5, 5),
    "sweep": Task(("-m", "seed=0,1", *PRETRAIN), 14, 6, spawns=True),
    "learning_rate": Task(
        ("-m", "sweep=learning_rate", "hydra.sweeper.values=[0.01,0.003]", *PRETRAIN), 14, 6, spawns=True
    ),
    "ddp": Task((*PRETRAIN, *DDP), 30, 16, spawns=True),
    "ddp_probe": Task(("task=probe", *ON_CHECKPOINT, *DATA, *PROBE, *DDP), 14, 8, spawns=True),
}
SAMPLE = {"pretrain": (2, 1), "evaluate": (1, 1)}
MODULES = (  # what these tasks import when they run
    *("lightning", "torch.utils.serialization", "sklearn.datasets", "sklearn.linear_model"),
    *("matplotlib.backends.backend_agg", "matplotlib.pyplot", "igpt.data.digits"),
    *("igpt.run.launch", "igpt.run.search", "igpt.run.sweep", "igpt.app.compare"),
    *("igpt.training.callbacks", "igpt.training.loggers"),
    *(f"igpt.task.{name}" for name in ("complete", "evaluate", "evaluate_palette", "export_weights", "finetune")),
    *(f"igpt.task.{name}" for name in ("import_weights", "low_data", "pipeline", "pretrain", "probe", "sample")),
    *("igpt.task.scaling", "igpt.task.sgd_probe"),
)

# Files that watch a run or show its result: an error of theirs ends no run.
BYSTANDERS = re.compile(
    r"console\.txt|log\.txt|/metrics(/|$)|/samples(/|$)|\.png|\.html|_(tokens|counts)\.npy"
    r"|jobs\.json|job_\d+\.txt|/wandb(/|$)"
)
TEMPORARY = re.compile(r"\.part$|^\.?tmp.|\.tmp$")
FOLDERS_OF_RUNS = re.compile(r"-[0-9a-f]{8}$|^(runs|base|work)$")
HASH = re.compile(r"-[0-9a-f]{8}(?=/|$)")  # of a run's settings, the absolute paths of its data among them


@dataclass(frozen=True)
class Baseline:
    """A task left undisturbed: the folder that it began in, its operations, its terminal, its facts (`read_facts`)."""

    task: str
    template: Path
    operations: list[Operation]
    text: str
    facts: dict[str, Any]


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


def read_facts(work: Path) -> dict[str, Any]:
    """What must not depend on interruptions, by file: hashes of weights, arrays, pictures; numbers, curves; pages.

    The hash in a run's name is left out where that name is no other run's.
    """
    facts: dict[str, Any] = {}
    named = Counter(HASH.sub("", path.name) for path in (work / "runs").glob("*"))
    for path in sorted(file for folder in ("runs", "base") for file in (work / folder).rglob("*") if file.is_file()):
        name, unique = str(path.relative_to(work)), HASH.sub("", str(path.relative_to(work)))
        name = unique if named[unique.split("/")[1]] == 1 else name
        if "wandb" in path.parts:
            continue  # W&B's own, named by the time
        if path.suffix in (".safetensors", ".npy", ".png") or "huggingface" in path.parts:
            facts[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".html":
            facts[name] = path.read_text().rstrip().endswith("</html>")
        elif path.name == "result.json":
            record = json.loads(path.read_text().replace(str(work), "."))
            facts[name] = {key: record[key] for key in ("curves", "class_names", "provenance")}
            facts[name]["files"] = sorted({*record["files"].values(), *list_not_written(path.parent)})
            facts[name]["numbers"] = {
                key: number
                for key, number in record["numbers"].items()
                if number["unit"] not in ("s", "GB", "device-days") and not number["unit"].endswith("/s")
            }
        elif path.name == "jobs.json":
            jobs = json.loads(path.read_text())["jobs"]
            facts[name] = [(job["overrides"], job["state"], job["value"]) for job in jobs]
    return facts


def list_not_written(run: Path) -> list[str]:
    """The pictures and arrays of a run, or of the stages in it, that its records list as not written."""
    records = {path.parent.relative_to(run): json.loads(path.read_text()) for path in run.rglob("result.json")}
    return [str(stage / file) for stage, record in records.items() for file in record.get("not_written", ())]


def compare_facts(facts: dict[str, Any], expected: dict[str, Any], *, bystanders: bool) -> list[str]:
    """The files that are missing or differ; those of bystanders only if asked for."""
    return [
        f"{name} {'differs' if name in facts else 'is missing'}"
        for name in expected
        if facts.get(name) != expected[name] and (bystanders or not BYSTANDERS.search(name))
    ]


def name_files(operations: Sequence[Operation]) -> set[str]:
    """The names by which an error may name what it met; of a run's own folder none, as each line may hold it."""
    folders = {Path(each.path).parent.name for each in operations}
    return {each.file for each in operations} | {name for name in folders if not FOLDERS_OF_RUNS.search(name)}


def list_temporary(work: Path) -> list[str]:
    """Temporary files and folders that are left, but for those of W&B, a compiler and Python's first one."""
    found = [path.relative_to(work) for path in work.rglob("*")]
    own = [path for path in found if "wandb" not in str(path) and not re.match(r"tmp/(cc\w+\.|\w{8}$)", str(path))]
    return [str(path) for path in own if TEMPORARY.search(path.name) or path.parent == Path("tmp")]


def find_steps(work: Path) -> dict[str, int]:
    """The step of the newest checkpoint whose SHA-256 is right, by unfinished run folder."""
    steps: dict[str, int] = {}
    for checksum in (work / "runs").rglob("step_*.sha256"):
        path, run = checksum.with_suffix(".ckpt"), checksum.parents[1]
        finished = (run / "result.json").is_file()
        if not finished and path.is_file() and hash_file(path) == checksum.read_text().strip():
            steps[run.name] = max(steps.get(run.name, 0), int(path.stem.removeprefix("step_")))
    return steps


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_killed(result: ProcessResult, work: Path) -> list[str]:
    """What is wrong right after a kill: a good end, a traceback, a checkpoint that was written and is gone."""
    problems, steps = [], find_steps(work)
    for each in result.operations:
        checksum = re.search(r"([^/]+)/checkpoints/step_(\d+)\.sha256$", each.path)
        if each == result.hit or each.name != "rename" or checksum is None:
            continue
        run, step = checksum[1], int(checksum[2])
        if steps.get(run, 0) < step and not any((work / "runs").rglob(f"{run}/result.json")):
            problems.append(f"the checkpoint of step {step} was written and is gone")
    if result.code == 0:
        problems.append("exit code 0, though one of its processes was killed")
    if "Traceback" in result.text:
        problems.append("a traceback")
    return problems


def check_failed(result: ProcessResult, baseline: Baseline, work: Path, fault: Fault) -> tuple[str, list[str]]:
    """How a run met an error (error, warning, or equal: it was without effect), and what is wrong with that."""
    assert result.hit is not None
    where, problems = result.hit, []
    text = "\n".join([result.text, *(path.read_text(errors="replace") for path in work.rglob("job_*.txt"))])
    met = [where, *(result.operations if fault.kind == "ENOSPC" else ())]  # a full disk stays full
    names = name_files(met) | ({Path(where.path).parent.name} if result.code else set())
    known = {strip_digits(line) for line in baseline.text.splitlines()}
    new = [line for line in text.splitlines() if strip_digits(line) not in known]
    is_named = any(name in line for line in new for name in names)
    if "Traceback" in text or "--- Logging error" in text:
        problems.append("a traceback")
    if result.code == 0:
        differs = compare_facts(read_facts(work), baseline.facts, bystanders=not is_named)
        return "warning" if is_named else "equal", [
            *problems,
            *(f"{each}, and no message" for each in differs),
        ]
    others = name_files([each for each in met if not BYSTANDERS.search(each.path)])
    is_other = any(name in line for line in new for name in others if "error:" in line)
    # the output of a job of a sweep, where its error is, is on the same disk
    is_lost = fault.kind == "ENOSPC" and re.search(r"job \d+ ended with exit code 2", result.text) is not None
    is_starting = baseline.task == "wandb" and not any(work.rglob("step_*.ckpt"))  # a logger may refuse at the start
    is_work = baseline.task == "report"  # whose work are pages
    if BYSTANDERS.search(where.path) and not (is_other or is_starting or is_work or is_lost):
        problems.append(f"a bystander ends the run: {last_line(result.text)}")
    if result.code != 2 and not (TASKS[baseline.task].spawns and result.code == 1):  # 1: of a sweep, a job has failed
        problems.append(f"exit code {result.code}: {last_line(result.text)}")
    if not is_lost and not (is_named and any("error:" in line for line in new)):
        problems.append(f"no error that names {where.file}: {last_line(result.text)}")
    return "error", problems


def strip_digits(text: str) -> str:
    return re.sub(r"[\d.,]+", "", text)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(nothing)"])[-1][:200]


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
