"""Training of igpt_micro at 16×16, alone and beside busy processes, by how long OpenMP's threads spin.

    python benchmarks/shared_cpu.py --out shared_cpu.json
    python benchmarks/shared_cpu.py --counts 0 500 1000 2000 5000 20000 --rounds 3 --steps 2

Each row is a process of its own that trains with as many threads as there are cores: `default` with the spin counts
that the runtimes document as theirs, once more to show how far two equal rows differ, then with igpt's, or with those
that `--counts` lists. All have the same first losses, or there are no figures. Rows take turns, round by round. Run it
on an idle machine.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
import torch.nn.functional as F
from networks import SIZES, our_net, token_ids
from train_step import EXACT, ROUNDED

from igpt.distributed.process_state import environment, float32_matmul_precision
from igpt.distributed.spinning import SPIN_LIMITS
from igpt.training.hardware import disable_malloc_trim

DEFAULT = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
IGPT = int(SPIN_LIMITS["GOMP_SPINCOUNT"])
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(100_000): pass"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """As many processes that compute, each on one core, as long as the block lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def training_rows(row: str, precisions: Sequence[str], options: dict[str, Any]) -> dict[str, machine.Run]:
    """Rows of each precision, alone and beside busy processes; a result is the losses of the first two steps."""
    if options["hold"]:
        disable_malloc_trim()
    tokens, rows = token_ids(options["size"], "cpu"), {}
    for precision in precisions:
        step = make_training_step(options["size"], tokens, precision)
        first = [step(), step()]
        for busy in (0, options["busy"]):
            rows[f"{row} {precision} {busy}"] = timed_steps(step, first, options["steps"], busy)
    return rows


def make_training_step(size: str, tokens: torch.Tensor, precision: str) -> Any:
    """What trains one step (forward, backward, Adam) as a run does, and returns its loss."""
    net = our_net(size)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    matmul = "medium" if machine.training("cpu") == "fp32+medium" else "highest"

    def step() -> float:
        with float32_matmul_precision(matmul):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(net(tokens).flatten(0, 1).float(), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def timed_steps(step: Any, first: list[float], steps: int, busy: int) -> machine.Run:
    """Seconds of so many steps beside so many busy processes, after one that is not counted."""

    def run() -> tuple[float, Any]:
        with busy_processes(busy):
            step()
            seconds, _ = machine.with_timer(lambda: [step() for _ in range(steps)])()
        return seconds, first

    return run


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--busy", type=int, default=1, help="busy processes")
    parser.add_argument("--counts", nargs="+", type=int, default=[IGPT], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--steps", type=int, default=3, help="steps in a timed row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(arguments)
    values = {"default": DEFAULT, "default again": DEFAULT}
    values |= {str(n): SPIN_LIMITS | {"GOMP_SPINCOUNT": str(n)} for n in args.counts}
    options = {"size": args.size, "steps": args.steps, "busy": args.busy, "hold": arguments is None}
    living = []
    for row, variables in values.items():
        with environment(**variables):  # runtimes read them as the new process loads PyTorch
            living.append(machine.Side(training_rows, row, args.precision, options))
    print("measuring", file=sys.stderr, flush=True)
    every = {name: run for side in living for name, run in side.rows().items()}
    times = machine.time_in_turns(every, args.rounds, warm_up=0)
    for side in living:
        side.close()
    for precision, tolerance in (("fp32", EXACT), ("bf16", ROUNDED)):
        if same := {name: row for name, row in times.items() if f" {precision} " in name}:
            machine.agree("the first losses", same, dict.fromkeys(same, tolerance).__getitem__)

    images = args.steps * SIZES[args.size][-1]
    print(f"{machine.about()}\n{SIZES[args.size]}, images/s: median, smallest – largest of {args.rounds} rounds")
    print(f"| spin count | precision | alone | beside {args.busy} busy | share kept |\n|---|---|---|---|---|")
    rows: dict[str, Any] = {}
    for row in values:
        for precision in args.precision:
            alone, beside = (
                [images / seconds for seconds in times[f"{row} {precision} {busy}"].seconds] for busy in (0, args.busy)
            )
            kept = median(beside) / median(alone)
            rows[f"{row} {precision}"] = {"alone": alone, "beside": beside, "kept": kept}
            cells = (f"{median(each):.1f}, {min(each):.1f} – {max(each):.1f}" for each in (alone, beside))
            print(f"| {row} | {precision} | {' | '.join(cells)} | {kept:.2f} |")
    report = {"variables": values, "busy": args.busy, "steps": args.steps, "rows": rows}
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
