"""A run that is killed at random moments, and resumed each time: does it end as one that was never killed?

python benchmarks/kills.py --kills 20 [OVERRIDE …]        e.g. data=cifar10 data.path=FOLDER data.resolution=8

Every other life begins without the cache of decoded images and palettes, so that kills fall into making it, too.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from igpt.report.folder import RunFolder

TRAIN = Path(__file__).parents[1] / "train.py"
SETTINGS = (
    "task=pretrain",
    "model.n_layer=2",
    "model.n_embd=64",
    "task.batch_size=32",
    "task.warmup_steps=10",
    "task.val_every=50",
    "task.log_every=1",
    "task.checkpoint_every=3",
    "callbacks=none",
    "trainer=cpu",
)


def life(
    place: Path, overrides: list[str], *, seconds: float | None, training: bool = False, saving: bool = False
) -> str:
    """One process in `place`, left to its end or killed some seconds after its start, or after its training began.

    With `saving`, it is killed the moment that a checkpoint is seen half written.

    Returns what it was doing when it was killed, or `finished`.
    """
    command = [sys.executable, str(TRAIN), *overrides]
    stderr_path = place / "said.txt"
    with stderr_path.open("w") as file, subprocess.Popen(command, cwd=place, stderr=file) as process:
        while training and process.poll() is None and " weights, steps " not in stderr_path.read_text():
            time.sleep(0.02)
        folders = list(place.glob("runs/*/checkpoints"))
        while saving and folders and process.poll() is None:
            if any(name.endswith(".part") for name in os.listdir(folders[0])):
                process.send_signal(signal.SIGKILL)
                break
        try:
            code = process.wait(timeout=seconds)
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{stderr_path.read_text()}")
            if code == 0:
                return "finished"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    parts = list(place.rglob(".*.part"))
    if any("checkpoints" in path.parts for path in parts):
        return "while a checkpoint was written"
    if any("cache" in path.parts for path in parts):
        return "while a cache was written"
    return "while training" if " weights, steps " in stderr_path.read_text() else "while starting"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        cache = place / "cache"
        settings = [*SETTINGS, f"task.steps={args.steps}", f"paths.cache={cache}", *more]
        start = time.perf_counter()
        life(place, [*settings, "paths.runs=whole"], seconds=None)
        alone = time.perf_counter() - start
        print(f"never killed: {alone:.0f} s for {args.steps} steps", flush=True)
        moments: dict[str, int] = {}
        for number in range(args.kills):
            if number % 2:
                shutil.rmtree(cache, ignore_errors=True)
            begun = [run for run in place.glob("runs/*") if (run / "checkpoints" / "latest").is_file()]
            overrides = [f"resume={begun[0]}"] if begun else settings
            early = number % 4 == 1  # as it starts, and without a cache
            seconds = rng.uniform(3, 9) if early else rng.uniform(0, 3)
            moment = life(place, overrides, seconds=seconds, training=not early, saving=number % 4 == 3)
            moments[moment] = moments.get(moment, 0) + 1
            latest = [path.read_text().strip() for path in place.glob("runs/*/checkpoints/latest")]
            print(f"kill {number + 1}: {moment}; newest checkpoint {latest}", flush=True)
            if moment == "finished":
                break
        (run,) = place.glob("runs/*")
        if not RunFolder(run).is_finished:
            life(place, [f"resume={run}"] if (run / "checkpoints" / "latest").is_file() else settings, seconds=None)
        (never_killed,) = place.glob("whole/*")
        weights = [load_file(folder / "model" / "model.safetensors") for folder in (run, never_killed)]
        same = all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[1])
        curves = RunFolder(run).read_result()["curves"] == RunFolder(never_killed).read_result()["curves"]
        print(f"{args.kills} kills: {moments}\nweights equal to the bit: {same}; curves equal: {curves}")
        sys.exit(0 if same and curves else 1)


if __name__ == "__main__":
    main()
