"""What every benchmark shares: rows that take turns, medians with their spread, the machine's own limits, JSON."""

import functools
import json
import multiprocessing as mp
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from igpt.distributed.cores import count_cores
from igpt.distributed.process_state import float32_matmul_precision
from igpt.model.cpu import inductor_cache, medium_format

# dense bfloat16 TFLOP/s by the data sheet, by a part of the name that CUDA gives the card
DATA_SHEETS = {
    "GH200": 989.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0,
    "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.2,
}  # fmt: skip


def data_sheet_tflops(card: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a card by its data sheet; None for a card that `DATA_SHEETS` does not have."""
    names = [name for name in DATA_SHEETS if re.search(rf"\b{name}\b", card)]
    return DATA_SHEETS[max(names, key=len)] if names else None


def peak_gflops(dtype: torch.dtype, matmul: str, device: str) -> float:
    """The machine's own large matrix product, best of five: 4096³; on a GPU 8192³, 20 in a row."""
    n, in_row = (8192, 20) if device == "cuda" else (4096, 1)
    x = torch.randn(n, n, dtype=dtype, device=device)
    out = torch.empty_like(x)
    times = []
    with float32_matmul_precision(matmul):
        for _ in range(6):
            if device == "cuda":
                times.append(_time_on_gpu(lambda: torch.mm(x, x, out=out), in_row))
                continue
            start = time.perf_counter()
            (x @ x)[0, 0].item()
            times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e9


def _time_on_gpu(run: Callable[[], Any], in_row: int) -> float:
    """Seconds of one of `in_row` calls, by CUDA events: launches of later calls overlap with earlier calls."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(in_row):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / in_row


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
    reads = bandwidth_gib(device)
    if device == "cuda":
        torch.cuda.empty_cache()  # the sides need the memory
    return Limits(products, reads)


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


def time_in_turns(rows: Mapping[str, Run], rounds: int, *, warm_up: int = 1) -> dict[str, Timed]:
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
        self._of = make.__name__
        self.names: list[str] = self._receive()

    def rows(self) -> dict[str, Run]:
        return {name: functools.partial(self._run, name) for name in self.names}

    def _run(self, name: str) -> tuple[float, Any]:
        self._here.send(name)
        answer: tuple[float, Any] = self._receive()
        return answer

    def _receive(self) -> Any:
        """What the process sends; ends the benchmark by a line where that has failed or died."""
        try:
            failed, answer = self._here.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            failed, answer = True, f"its process ended with exit code {code}{', killed (memory?)' * (code == -9)}"
        if failed:
            raise SystemExit(f"{self._of}: {answer}: no figures")
        return answer

    def close(self) -> None:
        self._here.send(None)
        self._process.join()


def _serve(pipe: Any, make: Callable[..., dict[str, Run]], arguments: tuple[Any, ...]) -> None:
    try:
        with inductor_cache():
            rows = make(*arguments)
            pipe.send((False, list(rows)))
            while (name := pipe.recv()) is not None:
                pipe.send((False, rows[name]()))
    except torch.OutOfMemoryError as error:
        pipe.send((True, first_line(error)))


def first_line(error: BaseException) -> str:
    """The kind of an error and its message's first sentence, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text.split('. ')[0]}" if text else type(error).__name__


def take_turns(
    sides: Sequence[tuple[Any, ...]], rounds: int, *, warm_up: int = 1, alone: bool | None = None
) -> dict[str, Timed]:
    """Rows of all sides, each (make, *arguments), as `time_in_turns`.

    `alone`: one side lives at a time and does all its rounds, as on a GPU, whose memory they could not share.
    """
    if alone is None:
        alone = torch.cuda.is_available()
    times: dict[str, Timed] = {}
    for group in [[side] for side in sides] if alone else [list(sides)]:
        living = [Side(*side) for side in group]
        rows = {name: run for side in living for name, run in side.rows().items()}
        times |= time_in_turns(rows, rounds, warm_up=warm_up)
        for side in living:
            side.close()
    return times


def with_timer(run: Callable[[], Any]) -> Run:
    """What calls something and returns the seconds it took, with a GPU's work done, and what it returned."""

    def call() -> tuple[float, Any]:
        finish()
        start = time.perf_counter()
        result = run()
        finish()
        return time.perf_counter() - start, result

    return call


def finish() -> None:
    """Waits for a GPU's work."""
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
    return {
        "cpu": model or platform.processor(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": read_output(["git", "-C", str(root), "describe", "--always", "--dirty"]),
    }


def read_output(command: Sequence[str]) -> str:
    """What a command prints; "" if it fails, or is not installed, as in small images."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    """The figures as JSON, with `about` and the command, where a path is given; limits and times as they are."""
    if path is not None:
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        path.write_text(json.dumps({"command": command, **about(), **report}, indent=2, default=_plain) + "\n")


def _plain(figure: Any) -> Any:
    return {"seconds": figure.seconds} if isinstance(figure, Timed) else vars(figure)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
