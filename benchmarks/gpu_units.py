"""Units of work that end in time, and the file of their figures: what `gpu.py` runs, stops, and continues."""

import json
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch

SLACK = 1.5  # a unit that was stopped is expected to take this many times what it had
PRECIOUS = ("gpu", "driver", "cpu")  # figures of one folder are of one machine


@dataclass(frozen=True)
class Unit:
    """A measurement: `function(seconds, *arguments)` returns its figures as plain values.

    `seconds` is the time that is left. A result with `unfinished` true is continued by the next call.
    """

    part: str
    name: str
    estimate: float  # seconds, on an H100
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = ()
    apart: bool = True  # in a process of its own, whose memory is gone with it

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name}"


class Figures:
    """The figures in FOLDER/gpu.json, written anew after every unit.

    Raises:
        SystemExit: the folder holds figures of another machine.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.path, self.command = folder / "gpu.json", command
        folder.mkdir(parents=True, exist_ok=True)
        self.report: dict[str, Any] = {"machine": describe_machine(), "units": {}}
        if self.path.is_file():
            before = json.loads(self.path.read_text())
            for name in PRECIOUS:
                was, now = before["machine"].get(name), self.report["machine"][name]
                if was != now:
                    raise SystemExit(f"{self.path} holds figures of {name} {was}, this is {now}: choose another --out")
            self.report["units"] = before["units"]

    @property
    def units(self) -> dict[str, dict[str, Any]]:
        units: dict[str, dict[str, Any]] = self.report["units"]
        return units

    def is_done(self, unit: Unit) -> bool:
        entry = self.units.get(unit.key, {})
        return "result" in entry and not entry["result"].get("unfinished")

    def estimate(self, unit: Unit) -> float:
        """Seconds that the unit is expected to take: more than what it was stopped after."""
        entry = self.units.get(unit.key, {})
        stopped = entry["seconds"] if entry.get("stopped") else 0.0
        return max(unit.estimate, SLACK * stopped)

    def record(self, unit: Unit, seconds: float, **outcome: Any) -> None:
        """`outcome`: result, or error and stopped. A result of an earlier call outlives an error."""
        entry = self.units.get(unit.key, {})
        took = seconds + (entry.get("seconds", 0.0) if entry.get("result", {}).get("unfinished") else 0.0)
        about = {"seconds": round(took, 1), "command": self.command, "commit": self.report["machine"]["commit"]}
        kept = {"result": entry["result"]} if "result" in entry else {}
        self.units[unit.key] = {**kept, **about, **outcome}
        text = json.dumps(self.report, indent=1) + "\n"
        part = self.path.with_suffix(".part")
        part.write_text(text)
        os.replace(part, self.path)


def describe_machine() -> dict[str, Any]:
    """The machine, its driver, the versions, the commit."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
    driver = machine.read_output(query) if torch.cuda.is_available() else ""
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        **machine.about(),
        "driver": driver.splitlines()[0] if driver else None,
        "gpu_bytes": properties.total_memory if properties else None,
        "cuda": torch.version.cuda,
        "data_sheet_tflops": machine.data_sheet_tflops(properties.name) if properties else None,
    }


def run_units(
    units: Sequence[Unit], figures: Figures, seconds: float, *, after: Callable[[], None] = lambda: None
) -> list[Unit]:
    """Runs what is not done and fits into `seconds`, in order; returns what is left. `after`: called after each."""
    end, left_over = time.monotonic() + seconds, []
    for unit in units:
        if figures.is_done(unit):
            continue
        left, need = end - time.monotonic(), figures.estimate(unit)
        if need > left:
            left_over.append(unit)
            continue
        print(f"{unit.key} … (about {need:.0f} s, {left:.0f} s are left)", flush=True)
        start = time.monotonic()
        outcome = run_unit(unit, left)
        figures.record(unit, time.monotonic() - start, **outcome)
        print(f"{unit.key}: {outcome.get('error') or json.dumps(outcome['result'])[:300]}", flush=True)
        if not figures.is_done(unit):
            left_over.append(unit)
        after()
    return left_over


def run_unit(unit: Unit, seconds: float) -> dict[str, Any]:
    """What `Figures.record` keeps of a unit: its result, or its error on one line and whether it was stopped."""
    if not unit.apart:
        return measure(unit.function, seconds, unit.arguments)
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_send, args=(there, unit.function, seconds, unit.arguments), daemon=False)
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return {"error": f"was stopped after {seconds:.0f} s, at the end of the call", "stopped": True}
        outcome: dict[str, Any] = here.recv()
        process.join(10)
        return outcome
    except EOFError:
        process.join()
        killed = ", killed, perhaps for the machine's memory" if process.exitcode == -9 else ""
        return {"error": f"its process ended with exit code {process.exitcode}{killed}"}
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def _send(pipe: Any, function: Callable[..., dict[str, Any]], seconds: float, arguments: tuple[Any, ...]) -> None:
    pipe.send(measure(function, seconds, arguments))


def measure(function: Callable[..., dict[str, Any]], seconds: float, arguments: tuple[Any, ...]) -> dict[str, Any]:
    try:
        return {"result": function(seconds, *arguments)}
    # whatever a unit ends by is one of its figures: the other units are measured all the same
    except (Exception, SystemExit) as error:
        return {"error": machine.first_line(error)}


def select_part(figures: Mapping[str, Mapping[str, Any]], part: str) -> dict[str, Mapping[str, Any]]:
    """The recorded units of a part by name: those with a result, and those with an error."""
    return {key.partition("/")[2]: entry for key, entry in figures.items() if key.startswith(f"{part}/")}
