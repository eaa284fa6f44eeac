"""Parts `tests`, `cifar` and `data` of `gpu.py`: `pytest -m gpu`, a run of CIFAR-10, images against appetite."""

import argparse
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import data_path
import numpy as np
from gpu_units import Unit
from PIL import Image

from igpt.distributed.cores import count_cores

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS|CRASHED)\b")
STOPPED = 75  # exit code of a run that was stopped and can be resumed
GRACE = 40.0  # seconds that a stopped run has to save
PICTURES = {  # of the CIFAR-10 run, by their part of its folder
    "depth_curve.png": "*_probe/curves.png",
    "samples.png": "*_sample/samples.png",
    "completions.png": "*_complete/completions.png",
    "training.png": "*_pretrain/curves.png",
}
NUMBERS = {  # of its result
    "evaluate/test/loss_gen": "test loss, nats per token",
    "probe/test/accuracy": "test accuracy of the best layer",
    "probe/probe/layer": "best layer",
    "probe/val/last_layer": "validation accuracy of the last layer",
    "probe/val/raw_pixels": "validation accuracy from raw pixels",
    "pretrain/train/step_seconds": "seconds a step",
    "pretrain/train/peak_memory": "GB of GPU memory in training",
}


def run_stoppable(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Exit code of a command, or None: sent SIGTERM `GRACE` before `seconds` are over. `log`: NAME.log, its output."""
    return run_side_by_side({log.stem: command}, seconds, log.parent)[log.stem]


def run_side_by_side(commands: Mapping[str, Sequence[str]], seconds: float, folder: Path) -> dict[str, int | None]:
    """Exit codes by name, None of those that were sent SIGTERM `GRACE` before `seconds` are over; logs in `folder`."""
    end, processes = time.monotonic() + max(1.0, seconds - GRACE), {}
    for name, command in commands.items():
        with (folder / f"{name}.log").open("a") as output:
            processes[name] = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    codes: dict[str, int | None] = {}
    for name, process in processes.items():
        try:
            codes[name] = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            codes[name] = None
            process.send_signal(signal.SIGTERM)
    latest = time.monotonic() + GRACE
    for process in processes.values():
        try:
            process.wait(max(0.0, latest - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return codes


def parse_outcomes(text: str) -> dict[str, str]:
    """What `pytest -v` printed: test → PASSED, FAILED, …"""
    return {match[1]: match[2] for line in text.splitlines() if (match := LINE.match(line))}


def run_tests(seconds: float, folder: Path, files: Sequence[str], marker: str) -> dict[str, Any]:
    """Outcomes of the tests with this marker. Those that passed, or crashed, in an earlier call are not run again."""
    log = folder / "pytest.log"
    before = parse_outcomes(log.read_text()) if log.is_file() else {}
    passed = [name for name, outcome in before.items() if outcome in ("PASSED", "CRASHED")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--color=no",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-m",
        marker,
    ]
    code = run_stoppable([*command, *(f"--deselect={name}" for name in passed), *files], seconds, log)
    if code not in (None, 0, 1, 5):  # 1: some failed, 5: all were deselected
        begun = [line for line in log.read_text().splitlines() if re.match(r"\S+::\S", line)]
        if not begun or LINE.match(begun[-1]):
            raise RuntimeError(f"pytest ended with exit code {code}, its output is in {log}")
        with log.open("a") as output:
            output.write(f"\n{begun[-1].split()[0]} CRASHED\n")  # the process with it: the next call goes on behind it
        code = None
    outcomes = parse_outcomes(log.read_text())
    counts = {each: list(outcomes.values()).count(each) for each in dict.fromkeys(outcomes.values())}
    wrong = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR", "CRASHED"))
    return {"counts": counts, "failed": wrong, "unfinished": code is None}


def find_test_files() -> list[str]:
    """Test files in which a test is marked gpu."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if re.search(r"mark\.gpu|tests\.on_gpu", path.read_text())]


def run_cifar(seconds: float, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Figures of `experiment=cifar10_32`, which an earlier call may have begun; its pictures go to FOLDER/pictures."""
    runs = (folder / "runs").resolve()
    paths = [f"paths.runs={runs}", f"paths.cache={(folder / 'cache').resolve()}"]
    command = [sys.executable, "train.py", "experiment=cifar10_32", *overrides, *paths, "resume=auto"]
    log = folder / "cifar.log"
    code = run_stoppable(command, seconds, log)
    if code in (None, STOPPED):
        return {"unfinished": True}
    if code:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise RuntimeError(f"train.py ended with exit code {code}: {lines[-1] if lines else ''} ({log})")
    return collect_run(max(runs.glob("pipeline-*"), key=lambda path: path.stat().st_mtime), folder / "pictures")


def collect_run(run: Path, pictures: Path) -> dict[str, Any]:
    """The figures of a finished pipeline that `NUMBERS` names; copies the pictures that `PICTURES` names."""
    result = json.loads((run / "result.json").read_text())
    pictures.mkdir(exist_ok=True)
    copied = []
    for name, pattern in PICTURES.items():
        for path in run.glob(pattern):
            shutil.copyfile(path, pictures / name)
            copied.append(name)
    numbers = {key: result["numbers"][key] for key in NUMBERS if key in result["numbers"]}
    figures = {key: {"value": number["value"], "interval": number["interval"]} for key, number in numbers.items()}
    return {"run": run.name, "numbers": figures, "pictures": copied}


def draw_photos(count: int) -> list[bytes]:
    """Made-up JPEGs of 500 × 375 pixels, for machines without photographs: smooth colours with some noise."""
    generator, photos = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (pixels + generator.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=90)
        photos.append(file.getvalue())
    return photos


def measure_loading(
    seconds: float, photos: Path | None, workers: int, size: str, device: str, least: float
) -> dict[str, Any]:
    """Images/s as tokens on the device with so many workers, and how many a training step takes."""
    files = data_path.list_photos(photos) if photos else []
    images = [path.read_bytes() for path in files[:2000]] or draw_photos(64)
    rates = data_path.loading(images, [workers], size, device, least)
    return {"made_up": not files, "takes": rates["takes"], "images_per_s": rates[f"{workers} workers"]}


def list_units(args: argparse.Namespace) -> list[Unit]:
    tests = Unit("tests", "pytest -m gpu", 60, run_tests, (args.out, find_test_files(), "gpu"), apart=False)
    cifar = []
    if args.cifar or args.tiny:
        overrides = [] if args.tiny else [f"data.path={args.cifar.resolve()}"]
        few = (args.out, [*overrides, *args.override])
        cifar = [Unit("cifar", "cifar10_32", 90, run_cifar, few, apart=False)]
    cores, size, least = count_cores(), "tiny" if args.tiny else "s", 0.1 if args.tiny else 10.0
    counts = [0] if args.tiny else sorted({0, 4, 8, cores} & set(range(cores + 1)))
    data = [
        Unit("data", f"{n} workers", 1 if args.tiny else 60, measure_loading,
             (args.photos, n, size, args.device, least)) for n in counts
    ]  # fmt: skip
    return [tests, *cifar, *data]


def make_tests_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, entry in figures.items():
        if (r := entry.get("result")) is not None:
            counts = ", ".join(f"{n} {outcome.lower()}" for outcome, n in r["counts"].items())
            lines.append(f"`{name}`: {counts}{' so far' * r['unfinished']}, {entry['seconds']:.0f} s.")
            lines += [f"- failed: `{test}`" for test in r["failed"]]
    return lines


def make_cifar_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    for entry in figures.values():
        r = entry.get("result", {})
        if r.get("unfinished"):
            return [f"The run goes on at the next call; {entry['seconds'] / 60:.1f} minutes so far."]
        if "numbers" in r:
            lines = [
                f"`{r['run']}`: {entry['seconds'] / 60:.1f} minutes, all stages.",
                "",
                "| figure | value |",
                "|---|---|",
            ]
            for key, number in r["numbers"].items():
                between = f" ({number['interval'][0]:.4g} – {number['interval'][1]:.4g})" if number["interval"] else ""
                lines.append(f"| {NUMBERS[key]} | {number['value']:.4g}{between} |")
            return lines
    return []


def make_data_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| workers | images/s, as tokens on the device | of what training of iGPT-S takes |", "|---|---|---|"]
    results = {name: entry["result"] for name, entry in figures.items() if "result" in entry}
    for name, r in results.items():
        lines.append(f"| {name.split()[0]} | {r['images_per_s']:,.0f} | {r['images_per_s'] / r['takes']:.1f}× |")
    made_up = any(r["made_up"] for r in results.values())
    return [*lines, *["", "Made-up JPEGs of 500 × 375."] * made_up] if results else []
