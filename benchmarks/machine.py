"""What every benchmark shares: rows that take turns, medians with their spread, the machine's own limits, JSON."""

import functools
import json
import multiprocessing as mp
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def peak_gflops(dtype: torch.dtype, matmul: str, device: str) -> float:
    """The machine's own large matrix product, 4096³, best of five."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    x = torch.randn(4096, 4096, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        times.append(time.perf_counter() - start)
    torch.set_float32_matmul_precision(before)
    return 2 * 4096**3 / min(times) / 1e9


def bandwidth_gib(device: str) -> float:
    """GiB/s at which 1 GiB of float32 is read (summed), best of five."""
    x = torch.ones(1 << 28, device=device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - start)
    return 1 / min(times)


def interleaved(rows: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every row, each round one of each, in turn; the first rounds are a warm-up for all."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for i in range(rounds + warm_up):
        for name, run in rows.items():
            seconds = run()
            if i >= warm_up:
                times[name].append(seconds)
    return times


class Side:
    """Rows that run in a process of their own, with settings of their own (its memory, its threads), when asked to.

    `make(*arguments)` builds them there: name → a function that returns seconds. A side that waits computes nothing.
    """

    def __init__(self, make: Callable[..., dict[str, Callable[[], float]]], *arguments: Any) -> None:
        context = mp.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self._process.start()
        self.names: list[str] = self._here.recv()

    def rows(self) -> dict[str, Callable[[], float]]:
        return {name: functools.partial(self._run, name) for name in self.names}

    def _run(self, name: str) -> float:
        self._here.send(name)
        seconds: float = self._here.recv()
        return seconds

    def close(self) -> None:
        self._here.send(None)
        self._process.join()


def _serve(pipe: Any, make: Callable[..., dict[str, Callable[[], float]]], arguments: tuple[Any, ...]) -> None:
    rows = make(*arguments)
    pipe.send(list(rows))
    while (name := pipe.recv()) is not None:
        pipe.send(rows[name]())


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """What calls something and returns the seconds it took."""

    def call() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return call


def table(times: Mapping[str, list[float]], *, unit: Callable[[float], str], against: str) -> list[str]:
    """A row each: median, smallest, largest, what `unit` makes of the median, how many times faster than `against`."""
    base = statistics.median(times[against])
    lines = ["| row | median ms | min – max | | against " + against + " |", "|---|---|---|---|---|"]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        low, high = 1e3 * min(seconds), 1e3 * max(seconds)
        lines.append(
            f"| {name} | {1e3 * median:.1f} | {low:.1f} – {high:.1f} | {unit(median)} | {base / median:.2f}× |"
        )
    return lines


def about() -> dict[str, Any]:
    """The machine, the versions, the commit."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    root = Path(__file__).parent
    commit = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "cpu": model or platform.processor(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    """The figures as JSON, with `about`, where a path is given."""
    if path is not None:
        path.write_text(json.dumps({**about(), **report}, indent=2))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
