"""`benchmarks/gpu.py`, whose parts run in tiny on this CPU: figures, ends in time, what goes on, wheels, the page."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.test_benchmarks import BENCHMARKS, Here


@pytest.fixture(scope="module", autouse=True)
def shared() -> Iterator[ModuleType]:
    """`benchmarks/machine.py`, its own measurements of this machine and processes left out."""
    sys.path.insert(0, str(BENCHMARKS))
    import gpu_runs
    import gpu_train
    import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "peak_gflops", lambda dtype, matmul, device: 100.0)
        patch.setattr(machine, "bandwidth_gib", lambda device: 10.0)
        patch.setattr(machine, "Side", Here)
        patch.setattr(gpu_train, "WAYS", ("eager",))  # compiling takes long
        patch.setattr(gpu_train.train_step, "disable_malloc_trim", lambda: None)
        patch.setattr(gpu_runs.data_path, "disable_malloc_trim", lambda: None)
        patch.setattr(gpu_runs.data_path, "BATCH", 4)
        path = list(sys.path)
        yield machine
        sys.path[:] = path
    sys.path.remove(str(BENCHMARKS))


def run(*arguments: str, out: Path) -> dict[str, Any]:
    import gpu

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "")  # is put back
        report: dict[str, Any] = gpu.main([*arguments, "--tiny", "--out", str(out)], apart=False)
    return report


def units(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())["units"]
    return found


def test_the_parts_measure_in_tiny(tmp_path: Path) -> None:
    """By hand: operations of the tiny network; Invariant: each figure has its command, and is in the tables."""
    report = run("train", "sampling", "data", "memory", "--minutes", "5", out=tmp_path)
    entries = units(tmp_path)
    assert entries == report["units"]
    assert not {name: entry["error"] for name, entry in entries.items() if "error" in entry}
    assert all(entry["command"].startswith("python benchmarks/gpu.py train sampling") for entry in entries.values())
    step = entries["train/tiny eager"]["result"]
    by_hand = 16 * 6 * (2 * 12 * 32**2 + 32 * 8) + 2 * 12 * 32 * 16**2 / 2  # an image's, forward and backward
    assert step["tflops"] * 1e12 == pytest.approx(step["images_per_s"] * by_hand)
    shares = entries["train/tiny profile"]["result"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["products"] > 0
    assert shares["optimiser"] > 0
    assert (tmp_path / "profile_tiny.txt").read_text().count("ms a step") > 5
    assert entries["sampling/greedy graphs"]["result"]["same_tokens"] == 1.0
    assert entries["sampling/2 bf16 hf"]["result"]["images"] == 2
    assert entries["data/0 workers"]["result"]["made_up"]
    assert entries["memory/xl"]["result"]["precision"] == "bf16-mixed"
    tables = (tmp_path / "gpu.md").read_text()
    for title in ("Training steps", "Sampling with iGPT-S", "From photographs", "Memory against the plan"):
        assert f"**{title}" in tables
    assert f"| tiny eager | {step['images']} |" in tables


class Clocked:
    """A unit's function that notes its calls and takes its time."""

    def __init__(self, *results: dict[str, Any], seconds: float = 0.0) -> None:
        self.results, self.seconds, self.calls = list(results), seconds, 0

    def __call__(self, seconds: float) -> dict[str, Any]:
        self.calls += 1
        time.sleep(self.seconds)
        return self.results.pop(0)


def make_unit(name: str, function: Callable[..., dict[str, Any]], *, estimate: float = 0.1, apart: bool = False) -> Any:
    import gpu_units

    return gpu_units.Unit("train", name, estimate, function, (), apart)


def fail(seconds: float) -> dict[str, Any]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 2 GiB. More")


def wait(seconds: float) -> dict[str, Any]:
    time.sleep(60)
    return {}


def test_what_does_not_fit_is_left_and_the_next_call_goes_on(tmp_path: Path) -> None:
    """Invariant: a unit is measured once; one that is unfinished or failed is called again; others do not wait."""
    import gpu_units

    once, twice, long = Clocked({"a": 1}), Clocked({"unfinished": True}, {"b": 2}), Clocked({"c": 3})
    every = [
        make_unit("long", long, estimate=100), make_unit("once", once), make_unit("twice", twice),
        make_unit("fails", fail),
    ]  # fmt: skip
    figures = gpu_units.Figures(tmp_path, "first")
    left = gpu_units.run_units(every, figures, 10)
    assert [unit.name for unit in left] == ["long", "twice", "fails"]
    assert units(tmp_path)["train/fails"]["error"] == "OutOfMemoryError: CUDA out of memory"
    again = gpu_units.Figures(tmp_path, "second")
    assert [unit.name for unit in gpu_units.run_units(every, again, 200)] == ["fails"]
    assert (once.calls, twice.calls, long.calls) == (1, 2, 1)
    assert {name: (entry.get("result"), entry["command"]) for name, entry in units(tmp_path).items()} == {
        "train/once": ({"a": 1}, "first"), "train/twice": ({"b": 2}, "second"), "train/fails": (None, "second"),
        "train/long": ({"c": 3}, "second"),
    }  # fmt: skip
    other = json.loads((tmp_path / "gpu.json").read_text())
    other["machine"]["gpu"] = "NVIDIA H200"
    (tmp_path / "gpu.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="holds figures of gpu NVIDIA H200, this is None: choose another --out"):
        gpu_units.Figures(tmp_path, "third")


def test_units_are_chosen_in_the_order_of_the_patterns() -> None:
    """Independent source: the shell's patterns, by hand; one that fits nothing is refused with the names."""
    import gpu

    every = [make_unit(name, fail) for name in ("s eager", "s blocks", "m eager")]
    assert gpu.choose_units(every, ["train/m *", "train/* eager"]) == [every[2], every[0]]
    with pytest.raises(SystemExit, match=r"no unit is called train/x .*: train/s eager, train/s blocks, train/m eager"):
        gpu.choose_units(every, ["train/x *"])


def test_a_unit_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """Invariant: the call ends in time; the unit is then expected to take half as long again."""
    import gpu_units

    figures, unit = gpu_units.Figures(tmp_path, "first"), make_unit("waits", wait, apart=True)
    start = time.monotonic()
    assert gpu_units.run_units([unit], figures, 1.0) == [unit]
    assert time.monotonic() - start < 10
    assert units(tmp_path)["train/waits"]["stopped"]
    assert figures.estimate(unit) == pytest.approx(1.5 * units(tmp_path)["train/waits"]["seconds"])


STUB = """
import pathlib, signal, sys, time
mark = pathlib.Path(sys.argv[1])
if mark.exists():
    sys.exit(0)
def stop(*_):
    mark.touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_run_is_stopped_and_resumed(quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: SIGTERM before the time is over; the same command goes on; its figures are those of its result."""
    import gpu_runs

    monkeypatch.setattr(gpu_runs, "GRACE", 5.0)
    command = [sys.executable, "-c", STUB, str(tmp_path / "mark")]
    assert gpu_runs.run_stoppable(command, 5.5, tmp_path / "stub.log") is None
    assert (tmp_path / "mark").exists()
    assert gpu_runs.run_stoppable(command, 60, tmp_path / "stub.log") == 0

    commands: list[Any] = []
    codes = [None, 0, 1]
    monkeypatch.setattr(gpu_runs, "run_stoppable", lambda command, *_: (commands.append(command), codes.pop(0))[1])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / quickstart.name).symlink_to(quickstart)
    (tmp_path / "cifar.log").write_text("first\ndata.path: no such folder\n")
    assert gpu_runs.run_cifar(60, tmp_path, ["data.path=CIFAR"]) == {"unfinished": True}
    found = gpu_runs.run_cifar(60, tmp_path, ["data.path=CIFAR"])
    assert commands[0] == commands[1]
    assert {"experiment=cifar10_32", "data.path=CIFAR", "resume=auto"} < {*commands[0]}
    numbers = json.loads((quickstart / "result.json").read_text())["numbers"]
    assert found["numbers"]["probe/test/accuracy"]["value"] == numbers["probe/test/accuracy"]["value"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(gpu_runs.PICTURES)
    table = gpu_runs.make_cifar_table({"cifar10_32": {"seconds": 90.0, "result": found}})
    assert f"`{quickstart.name}`: 1.5 minutes, all stages." in table
    with pytest.raises(RuntimeError, match=r"ended with exit code 1: data\.path: no such folder"):
        gpu_runs.run_cifar(60, tmp_path, [])


def test_tests_that_passed_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: over calls every test is run until it passes; one that ends the process is not tried again."""
    import gpu_runs

    printed = [
        ("a.py::x[1] PASSED [ 25%]\na.py::y FAILED [ 50%]\na.py::z ", -11),
        ("a.py::y PASSED [ 50%]\na.py::w[a b] SKIPPED (no) [100%]\n", 0),
    ]
    deselected: list[set[str]] = []

    def pretend(command: list[str], seconds: float, log: Path) -> int:
        text, code = printed.pop(0)
        deselected.append({word.partition("=")[2] for word in command if word.startswith("--deselect")})
        with log.open("a") as output:
            output.write(text)
        return code

    monkeypatch.setattr(gpu_runs, "run_stoppable", pretend)
    first = gpu_runs.run_tests(60, tmp_path, ["a.py"], "gpu")
    assert first == {
        "counts": {"PASSED": 1, "FAILED": 1, "CRASHED": 1}, "failed": ["a.py::y", "a.py::z"], "unfinished": True
    }  # fmt: skip
    second = gpu_runs.run_tests(60, tmp_path, ["a.py"], "gpu")
    assert second["counts"] == {"PASSED": 2, "CRASHED": 1, "SKIPPED": 1}
    assert not second["unfinished"]
    assert deselected == [set(), {"a.py::x[1]", "a.py::z"}]


def test_xl_is_trained_in_the_first_way_that_fits() -> None:
    """Independent source: fp32 weights, gradients and Adam of XL, 16 B a weight, are 109 GB: for an H200, no H100."""
    import gpu_memory

    assert gpu_memory.choose_xl_way(gpu_memory.XL, 0.92 * 150e9, "cuda") == ("bf16-mixed", True)
    assert gpu_memory.choose_xl_way(gpu_memory.XL, 0.92 * 84e9, "cuda") == ("bf16-true", True)
    with pytest.raises(ValueError, match=r"a step of XL takes at least \d+ GB, 24 GB are free"):
        gpu_memory.choose_xl_way(gpu_memory.XL, 24e9, "cuda")


def test_a_batch_fills_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: one image more, or eight, would not fit; after running out of memory, a quarter fewer."""
    import gpu_train

    network = gpu_train.describe_network("m")
    batch = gpu_train.choose_batch(network, 70e9, device="cuda")
    planned = {
        n: gpu_train.plan_memory(network, n, precision="bf16-mixed", recompute=False, device="cuda")
        for n in (batch, batch + 8)
    }
    assert planned[batch] <= 70e9 < planned[batch + 8]
    step = gpu_train.TrainingStep(gpu_train.describe_network("tiny"), "cpu")
    call = gpu_train.TrainingStep.__call__

    def short(step: Any, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return call(step, tokens)

    monkeypatch.setattr(gpu_train.TrainingStep, "__call__", short)
    tokens, failed = gpu_train.fill_card(step, 1)
    batches = [*failed, len(tokens)]
    assert batches[0] > 40 >= batches[-1]
    assert all(after == before * 3 // 4 and before > 40 for before, after in pairwise(batches))


def test_steps_that_sampling_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: both give the greedy tokens of the network's own step, without torch.compile."""
    import sampling

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: (asked.append(how), function)[1])
    rows = sampling.build_side("igpt", "tiny", [], ["layers", *sampling.STEPS], "fp32")
    layers, *others = (run()[1] for run in rows.values())
    assert all(torch.equal(tokens, layers) for tokens in others)
    assert {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False} in asked
    from igpt.model import decode, graphs

    monkeypatch.setattr(graphs.RecordedStep, "_record", lambda step: torch.empty(0).view(3))
    run = sampling.build_side("igpt", "tiny", [], ["graphs"], "fp32")["greedy igpt graphs"]
    with pytest.raises(SystemExit, match="a step is not recorded, tokens are drawn more slowly"):
        run()
    for name in sampling.STEPS:
        decode.BACKENDS.pop(name)
