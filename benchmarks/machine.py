"""What every benchmark shares: rows that take turns, medians with their spread, the machine's own limits, JSON."""

import functools
import json
import multiprocessing as mp
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from igpt.distributed.cores import count_cores
from igpt.distributed.process_state import float32_matmul_precision
from igpt.model.cpu import inductor_cache, medium_format


def peak_gflops(dtype: torch.dtype, matmul: str, device: str) -> float:
    """The machine's own large matrix product, 4096³, best of five."""
    x = torch.randn(4096, 4096, dtype=dtype, device=device)
    times = []
    with float32_matmul_precision(matmul):
        for _ in range(6):
            start = time.perf_counter()
            (x @ x)[0, 0].item()
            times.append(time.perf_counter() - start)
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


@dataclass(frozen=True)
class Limits:
    """What this machine can do at all: its own large matrix products, in GFLOP/s, and how fast it reads memory."""

    gflops: dict[str, float]  # by the name of a precision, as rows are labelled
    gib_per_s: float

    def __str__(self) -> str:
        products = ", ".join(f"{name} {value:,.0f}" for name, value in self.gflops.items())
        return f"this machine: matrix products {products} GFLOP/s; reads memory at {self.gib_per_s:.1f} GiB/s"


def medium(device: str) -> str:
    """The label of float32 rows whose products are at "medium": what that computes is another thing on each machine.

    `fp32+medium`: in float32, by other kernels; `tf32-products` (GPUs), `bf16-products` (CPUs with AMX): rounded.
    """
    rounded = medium_format(torch.device(device))
    return "fp32+medium" if rounded == "fp32" else f"{rounded}-products"


def training(device: str) -> str:
    """The label of float32 rows as this project trains: at "medium" where that is float32."""
    return "fp32+medium" if medium(device) == "fp32+medium" else "fp32"


def limits(device: str) -> Limits:
    products = {
        "fp32": peak_gflops(torch.float32, "highest", device),
        medium(device): peak_gflops(torch.float32, "medium", device),
        "bf16": peak_gflops(torch.bfloat16, "highest", device),
    }
    return Limits(products, bandwidth_gib(device))


@dataclass
class Timed:
    """The seconds of a row, round by round, and what it computed last."""

    seconds: list[float] = field(default_factory=list)
    result: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{1e3 * min(self.seconds):.1f} – {1e3 * max(self.seconds):.1f}"


Run = Callable[[], tuple[float, Any]]  # seconds, result


def interleaved(rows: Mapping[str, Run], rounds: int, *, warm_up: int = 1) -> dict[str, Timed]:
    """Every row, each round one of each, in turn; the first rounds are a warm-up for all."""
    times = {name: Timed() for name in rows}
    for i in range(rounds + warm_up):
        for name, run in rows.items():
            seconds, times[name].result = run()
            if i >= warm_up:
                times[name].seconds.append(seconds)
    return times


class Side:
    """Rows that run in a process of their own, with settings of their own (its memory, its threads), when asked to.

    `make(*arguments)` builds them there. A side that waits computes nothing.
    """

    def __init__(self, make: Callable[..., dict[str, Run]], *arguments: Any) -> None:
        context = mp.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self._process.start()
        there.close()
        self.names: list[str] = self._here.recv()

    def rows(self) -> dict[str, Run]:
        return {name: functools.partial(self._run, name) for name in self.names}

    def _run(self, name: str) -> tuple[float, Any]:
        self._here.send(name)
        answer: tuple[float, Any] = self._here.recv()
        return answer

    def close(self) -> None:
        self._here.send(None)
        self._process.join()


def _serve(pipe: Any, make: Callable[..., dict[str, Run]], arguments: tuple[Any, ...]) -> None:
    with inductor_cache():
        rows = make(*arguments)
        pipe.send(list(rows))
        while (name := pipe.recv()) is not None:
            pipe.send(rows[name]())


def timed(run: Callable[[], Any]) -> Run:
    """What calls something and returns the seconds it took, with a GPU's work done, and what it returned."""

    def call() -> tuple[float, Any]:
        _finish()
        start = time.perf_counter()
        result = run()
        _finish()
        return time.perf_counter() - start, result

    return call


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(times: Mapping[str, Timed], *, unit: Callable[[float], str], against: str) -> list[str]:
    """A row each: median, smallest, largest, what `unit` makes of the median, how many times faster than `against`."""
    lines = [f"| row | median ms | min – max | | against {against} |", "|---|---|---|---|---|"]
    for name, row in times.items():
        ratio = times[against].median / row.median
        lines.append(f"| {name} | {1e3 * row.median:.1f} | {row.spread} | {unit(row.median)} | {ratio:.2f}× |")
    return lines


def agree(what: str, times: Mapping[str, Timed], within: Callable[[str], Any]) -> None:
    """Stops the benchmark when what a row computed is not what the first row did; `within` a row's own tolerance."""
    (first, base), *others = times.items()
    for name, row in others:
        off = (torch.as_tensor(row.result) - torch.as_tensor(base.result)).abs()
        if not (off <= torch.as_tensor(within(name))).all():
            worst = float(off.max())
            raise SystemExit(f"{what} of {name} and of {first} differ by {worst:.2g}, more than allowed: no figures")


def about() -> dict[str, Any]:
    """The machine, the versions, the commit."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    root = Path(__file__).parent
    commit = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "cpu": model or platform.processor(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    """The figures as JSON, with `about` and the command, where a path is given; limits and times as they are."""
    if path is not None:
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        path.write_text(json.dumps({"command": command, **about(), **report}, indent=2, default=_plain) + "\n")


def _plain(figure: Any) -> Any:
    return {"seconds": figure.seconds} if isinstance(figure, Timed) else vars(figure)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
