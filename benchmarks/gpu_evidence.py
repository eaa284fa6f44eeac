"""Part `evidence` of `gpu.py`: findings of docs/evidence at 32×32 in 512 colours, by the same commands.

First one pretraining, then all that reads its weights, side by side: these are no figures of speed. The small files of
the finished runs go to FOLDER/evidence/at_32, as `evidence.py collect at_32` would put them into docs/evidence.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_runs import ROOT, STOPPED, run_side_by_side
from gpu_units import Unit

FINDING = "at_32"
NETWORK = ["data.resolution=32", "data.palette_size=512", "model=igpt_mini"]
STEPS = ["task.batch_size=125", "task.steps=3000", "task.val_every=1500", "task.checkpoint_every=750"]
READ = ["trainer.compile=auto", "task.batch_size=250"]  # too short to gain by compiling; batches without a remainder
TUNE = ["data.augment.pad=4", "task.batch_size=40", "task.steps=1800", "task.val_every=600"]
SEEDS = (0, 1, 2)
TINY = ["trainer.compile=false", "model.name=two", "model.n_layer=2", "model.n_embd=32", "model.n_head=2"]


def describe_pretraining(tiny: bool = False) -> list[str]:
    """The overrides of the network that all others read."""
    steps = ["task.steps=4", "task.batch_size=4", "task.warmup_steps=1"] if tiny else STEPS
    return ["experiment=evidence/pretrain", *NETWORK, "task.keep_steps=[]", *steps, *TINY * tiny]


def describe_readers(run: str, tiny: bool = False) -> dict[str, list[str]]:
    """The overrides of what reads the weights of `run`, and of the baseline from scratch, by a name."""
    labels = f"data.labels_per_class={10 if tiny else 1000}"
    few = ["task.steps=2", "task.batch_size=4", "task.val_every=1", labels] if tiny else TUNE
    tune = ["experiment=evidence/finetune", *NETWORK, *few, *TINY * tiny]
    read = ["trainer.compile=false", "task.batch_size=50"] if tiny else READ
    readers = {
        "probe": ["task=probe", f"init={run}", *read],
        "probe_few": ["task=probe", f"init={run}", *read, labels, "task.baselines=[]"],
        "evaluate": ["task=evaluate", f"init={run}", *read],
        "complete": ["task=complete", f"init={run}", "task.count=8"],
        "sample": ["task=sample", f"init={run}", "task.count=64"],
    }
    for seed in SEEDS[:1] if tiny else SEEDS:
        arms = {
            "joint": [f"init={run}", "task.learning_rate=0.001"],
            "alone": [f"init={run}", "task.learning_rate=0.001", "task.loss_weights.gen=0"],
            "scratch": ["task.learning_rate=0.0003", "task.loss_weights.gen=0"],
        }
        readers |= {f"{arm}{seed}": [*tune, *overrides, f"seed={seed}"] for arm, overrides in arms.items()}
    return readers


def make_command(overrides: Sequence[str], settings: Sequence[str]) -> list[str]:
    """A command of train.py, without the folder of images where the task takes none."""
    taken = [each for each in settings if not (each.startswith("data.path=") and "task=sample" in overrides)]
    return [sys.executable, "train.py", *overrides, *taken, "resume=auto"]


def check_codes(codes: Mapping[str, int | None], folder: Path) -> bool:
    """Whether all commands ended. Raises RuntimeError with the last line of one that failed."""
    for name, code in codes.items():
        if code not in (None, 0, STOPPED):
            lines = [line for line in (folder / f"{name}.log").read_text().splitlines() if line.strip()]
            raise RuntimeError(f"{name} ended with exit code {code}: {lines[-1] if lines else ''} ({folder})")
    return not any(code is None or code == STOPPED for code in codes.values())


def name_path(path: Path) -> str:
    """A path as commands name it, which are run in ROOT: inside it without the machine's part."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def find_pretraining(folder: Path) -> Path | None:
    """The run of the pretraining, if it has ended."""
    return next((path.parent for path in sorted((folder / "runs").glob("pretrain-*/result.json"))), None)


def pretrain(seconds: float, folder: Path, settings: Sequence[str], tiny: bool) -> dict[str, Any]:
    """The pretraining: its test is the probe, so the result is where it lies."""
    command = make_command(describe_pretraining(tiny), settings)
    if not check_codes(run_side_by_side({"pretrain": command}, seconds, folder), folder):
        return {"unfinished": True}
    run = find_pretraining(folder)
    if run is None:
        raise RuntimeError(f"train.py ended, and {folder / 'runs'} holds no finished pretraining")
    return {"run": run.name}


def read(seconds: float, folder: Path, settings: Sequence[str], tiny: bool) -> dict[str, Any]:
    """All that reads the pretraining; the rows that their runs give in the table of findings."""
    import evidence

    run = find_pretraining(folder)
    if run is None:
        raise RuntimeError("the pretraining has not ended: the next call goes on with it")
    readers = describe_readers(name_path(run), tiny)
    commands = {name: make_command(overrides, settings) for name, overrides in readers.items()}
    codes = run_side_by_side(commands, seconds, folder)
    finished = sorted(path.parent for path in (folder / "runs").glob("*/result.json"))
    evidence.collect(FINDING, finished, folder / "evidence")  # also where one of the others failed
    if not check_codes(codes, folder):
        return {"unfinished": True}
    rows = evidence.FINDINGS[FINDING](evidence.read_finding(folder / "evidence", FINDING))
    return {"runs": [path.name for path in finished], "rows": [vars(row) for row in rows]}


def list_units(args: argparse.Namespace) -> list[Unit]:
    if not args.cifar:
        return []
    folder = (args.out / "at_32").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs, cache = (name_path(folder / name) for name in ("runs", "cache"))
    paths = [f"data.path={args.cifar.resolve()}", f"paths.runs={runs}", f"paths.cache={cache}"]
    device = [f"trainer.accelerator={args.device}"] if args.device == "cpu" else ["trainer=gpu"]
    few = (folder, [*device, *paths, *args.override], args.tiny)
    estimates = (5, 5) if args.tiny else (90, 120)  # what does not end goes on
    return [
        Unit("evidence", "pretrain", estimates[0], pretrain, few, apart=False),
        Unit("evidence", "read", estimates[1], read, few, apart=False),
    ]


def make_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows of the findings."""
    found = figures.get("read", {}).get("result", {})
    lines = [f"| {row['finding']} | {row['ours']} | {row['holds']} |" for row in found.get("rows", ())]
    return ["| finding | here | holds? |", "|---|---|---|", *lines] if lines else []
