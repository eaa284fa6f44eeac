"""Settings of the process: changed for a block and put back, and a test that leaves one changed fails."""

import os
import re
import signal
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from igpt.distributed.process_state import (
    environment,
    float32_matmul_precision,
    num_threads,
    restore_environment,
    signal_handler,
)
from igpt.metric.result import Result
from igpt.model import cpu
from igpt.run import launch
from tests import conftest
from tests.process_state import snapshot


def ignored(number: int, frame: object) -> None: ...


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (float32_matmul_precision("medium"), "float32 matmul precision"),
        (num_threads(3), "threads"),
        (environment(HOME="elsewhere", IGPT_NEW="1"), "environment"),
        (signal_handler([signal.SIGUSR1, signal.SIGTERM], ignored), "signal handlers"),
    ],
)
def test_a_block_that_fails_leaves_nothing_changed(changed: AbstractContextManager[None], what: str) -> None:
    before = snapshot()
    with pytest.raises(KeyError), changed:
        assert {name for name, value in snapshot().items() if value != before[name]} == {what}
        raise KeyError
    assert snapshot() == before


def test_what_others_set_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGPT_OLD", "old")
    monkeypatch.delenv("IGPT_NEW", raising=False)
    with restore_environment("IGPT_OLD", "IGPT_NEW"):
        os.environ |= {"IGPT_OLD": "changed", "IGPT_NEW": "1"}
    assert os.environ["IGPT_OLD"] == "old"
    assert "IGPT_NEW" not in os.environ


def test_a_run_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: while it lasts kernels have a folder, what rounds is said once, and then all is as before."""
    monkeypatch.delenv(cpu.INDUCTOR_CACHE, raising=False)
    monkeypatch.setattr(cpu, "rounding_setting", lambda: "ROUNDS=1")
    folders: list[str | None] = []

    def run_and_report(components: object) -> Result:
        folders.append(os.environ.get(cpu.INDUCTOR_CACHE))
        return Result()

    monkeypatch.setattr(launch, "run_and_report", run_and_report)
    before = snapshot()
    places = (f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}")
    _, folder = launch.run("model=igpt_nano", "trainer=cpu", *places, conf=conftest.ROOT / "conf")
    assert snapshot() == before
    assert folders[0] is not None
    assert cpu.cpu_fingerprint() in folders[0]
    assert caplog.text.count("ROUNDS=1") == 1
    assert folder is not None
    assert (folder / "log.txt").read_text().count("ROUNDS=1") == 1


LEAKING = """
import os, random, signal
import numpy as np, pytest, torch
from tests.process_state import snapshot

first = []
LEAKS = {
    "float32 matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "default dtype": lambda: torch.set_default_dtype(torch.bfloat16),
    "default device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(3),
    "environment": lambda: os.environ.update(LEFT="1"),
    "working directory": lambda: os.chdir("/"),
    "seed of PyTorch": lambda: torch.manual_seed(5),
    "random state of Python": lambda: random.seed(5),
    "random state of NumPy": lambda: np.random.seed(5),
    "signal handlers": lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
}

@pytest.mark.parametrize("what", LEAKS)
def test_leaks(what):
    first[:] = first or [snapshot()]
    assert snapshot() == first[0]
    LEAKS[what]()
    assert snapshot() != first[0]

def test_draws():
    assert snapshot() == first[0]
    torch.rand(1), torch.nn.Linear(3, 3)
"""


class Reports:
    """Notes what becomes of each phase of each test."""

    def __init__(self) -> None:
        self.failed: list[tuple[str, str, str]] = []
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed.append((report.nodeid, report.when or "", str(report.longrepr)))


@pytest.mark.ci
def test_a_test_that_leaves_something_changed_fails_and_no_other(tmp_path: Path) -> None:
    """Invariant: of eleven tests ten change one thing each, each is told so, and the next one finds nothing changed."""
    (tmp_path / "test_leaking.py").write_text(LEAKING)
    reports = Reports()
    alone = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist", "-s"]
    pytest.main(
        [*alone, "--import-mode=importlib", "--rootdir", str(tmp_path), str(tmp_path)], plugins=[conftest, reports]
    )
    assert reports.passed == 11
    assert len(reports.failed) == 10
    for test, phase, message in reports.failed:
        assert phase == "teardown"
        (changed,) = re.findall(r"\[(.*)\]", test)
        assert changed in message.split("this test left changed: ")[1]
