"""What a command does around its arithmetic: imports, records, and the benchmark that counts it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from igpt.report import folder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_images_of_a_folder_load_no_datasets_library() -> None:
    """Invariant: `datasets` and pandas are imported for the Hub and for parquet files alone."""
    code = "import sys, igpt.data.images; print([name for name in ('datasets', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_git_is_asked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: every record of a process names the code that it started with."""
    commits = iter(["0123456789ab"])
    monkeypatch.setattr(folder, "find_commit", lambda: next(commits))
    folder.find_code.cache_clear()
    try:
        records = [folder.environment() for _ in range(2)]
    finally:
        folder.find_code.cache_clear()
    assert records[0] == records[1]
    assert records[0]["commit"] == "0123456789ab"
    records[0]["versions"]["torch"] = "0"
    assert records[1]["versions"]["torch"] != "0"


def test_a_meter_counts_every_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a stage of 1 + 10 + 2 seconds, of which 10 are one step and 4 of these an import."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu_seconds

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cpu_seconds.time, "process_time", lambda: clock.now)
    meter = cpu_seconds.Meter()

    def take(seconds: float) -> None:
        clock.now += seconds

    def step() -> None:
        take(6)
        meter.measure(take, cpu_seconds.IMPORTS)(4)

    def stage(components: SimpleNamespace) -> None:
        take(1)
        meter.measure(step, "arithmetic")()
        take(2)

    take(0.5)
    meter.measure(stage, "")(SimpleNamespace(run_dir=Path("runs/1_probe")))
    meter.charge()
    assert meter.seconds[cpu_seconds.BEFORE, cpu_seconds.REST] == 0.5
    assert {part: meter.seconds["1_probe", part] for part in ("arithmetic", "imports", "rest")} == {
        "arithmetic": 6, "imports": 4, "rest": 3
    }  # fmt: skip
    assert sum(meter.seconds.values()) == clock.now
    assert "| 1_probe | 6.0 | 4.0 | 0.0 | 0.0 | 0.0 | 0.0 | 3.0 | 7.0 |" in cpu_seconds.format_table(meter.seconds)
