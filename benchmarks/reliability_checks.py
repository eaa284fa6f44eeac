"""What must hold of a run that was disturbed: what is compared, and what is wrong with it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_injection import (
    Fault,
    Operation,
    ProcessResult,
)
from reliability_tasks import TASKS

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
