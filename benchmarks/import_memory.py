"""Peak memory and time of importing weights of a size: OpenAI's layout, Hugging Face's, and an export to it.

`python benchmarks/import_memory.py --model igpt_l` makes random weights in both layouts (three times the network's
size on disk, in a temporary folder), runs `task=import` and `task=export` on them, each in a process of its own, and
prints the peak of its resident memory over the size of the file. Target: below 1.5.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import numpy as np
import torch

from igpt.checkpoint.openai import list_variables
from igpt.tokens.palette import Palette

ROOT = Path(__file__).parents[1]
SIZES = {"igpt_s": (24, 512, 8), "igpt_m": (36, 1024, 8), "igpt_l": (48, 1536, 16)}


def make(place: Path, model: str, n_shard: int) -> None:
    """Random weights in OpenAI's layout, their palette beside them."""
    sys.path.insert(0, str(ROOT))
    from tests.oracle import released  # the tests' writer of that layout, and with it TensorFlow

    n_layer, n_embd, n_head = SIZES[model]
    network = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_ctx": 1024, "n_vocab": 512, "causal": True}
    draw = torch.Generator().manual_seed(0)

    class Drawn(dict[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            shape = wanted[name]
            return torch.empty(shape).normal_(0, 0.02, generator=draw).numpy()

    wanted = {f"model/{name}": shape for name, shape in list_variables(network).items()}
    released.save(place / "openai" / "model.ckpt-1000000", Drawn(dict.fromkeys(wanted, np.empty(0))), n_shard)
    colours = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    Palette(colours).save(place / "openai" / "kmeans_centers.npy")
    print(f"{model}: {sum(map(prod, wanted.values())):,} weights in {n_shard} shards", flush=True)


def measure_command(place: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak resident bytes of one command."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, cwd=place, env=os.environ)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with {status}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="igpt_l")
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--folder", default=None, help="where to put them while it lasts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder)
        if not (child := os.fork()):  # TensorFlow's writer stays out of this process
            make(place, args.model, args.shards)
            os._exit(0)
        os.waitpid(child, 0)
        size = sum(path.stat().st_size for path in (place / "openai").iterdir())
        rows = []
        for what, arguments in (
            ("OpenAI → ours", ("task=import", "init=openai", "paths.runs=a")),
            ("ours → Hugging Face", ("task=export", "init=RUN", "paths.runs=b")),
            ("Hugging Face → ours", ("task=import", "init=HF", "paths.runs=c")),
        ):
            run = next((str(path) for path in (place / "a").glob("*")), "")
            hf = next((str(path) for path in (place / "b").glob("*/huggingface")), "")
            seconds, peak = measure_command(
                place, *(a.replace("=RUN", f"={run}").replace("=HF", f"={hf}") for a in arguments)
            )
            rows.append({"what": what, "seconds": seconds, "peak_bytes": peak, "of_file": peak / size})
            print(
                f"{what:22} {seconds:7.1f} s  peak {peak / 2**30:5.2f} GiB = {peak / size:.2f} × the file", flush=True
            )
        print(json.dumps({"model": args.model, "file_bytes": size, "rows": rows}))


if __name__ == "__main__":
    main()
