"""Processes that end together: ranks, and the jobs of a sweep. Small scripts stand in for `train.py`."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from igpt.distributed import launcher
from igpt.distributed.launcher import Child, Children, run_ranks
from igpt.distributed.signals import STOPPED
from igpt.run import sweep
from igpt.run.jobs import FAILED, FINISHED, INTERRUPTED, WAITING, Job, Sweep
from tests.conftest import ROOT

RANK = """
import os, pathlib, signal, sys, time
rank, place = os.environ["RANK"], pathlib.Path(sys.argv[1])
(place / f"pid_{rank}").write_text(str(os.getpid()))
if rank == "0":
    pathlib.Path(os.environ["IGPT_TELL"]).write_text(str(place))
    (place / "log.txt").write_text("begun\\n")
while not (place / "pid_0").is_file() or not (place / "pid_1").is_file():
    time.sleep(0.01)
"""
WAIT = "time.sleep(60)"


def ranks(place: Path, code: str) -> int:
    """The exit code of two ranks that run `code`."""
    return run_ranks([sys.executable, "-c", RANK + code, str(place)], 2)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_gone(place: Path) -> bool:
    return all(gone(int(path.read_text())) for path in place.glob("pid_*"))


@pytest.mark.parametrize("grace", [0.2])
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("raise RuntimeError('my data is gone')", 1, ["rank 1 of 2 ended with exit code 1", "my data is gone"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ["rank 1 of 2 was killed by SIGKILL"]),
    ],
)
def test_a_rank_that_fails_ends_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    grace: float,
    fault: str,
    code: int,
    message: list[str],
) -> None:
    """Invariant: at once, also those that would have gone on; why is on the terminal and in the run's log."""
    monkeypatch.setattr(launcher, "GRACE_SECONDS", grace)
    start = time.monotonic()
    assert ranks(tmp_path, f"if rank == '1': {fault}\n{WAIT}") == code
    assert time.monotonic() - start < 20
    assert all_gone(tmp_path)
    log, terminal = (tmp_path / "log.txt").read_text(), capfd.readouterr().err
    assert log.startswith("begun\n")
    for line in message:
        assert line in log
        assert line in terminal


def test_ranks_that_see_the_same_bad_input_say_it_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks(tmp_path, "sys.stderr.write('error: no such file\\n'); sys.exit(2)") == 2
    assert capfd.readouterr().err == "error: no such file\n"


def test_a_signal_reaches_every_rank_once(tmp_path: Path) -> None:
    """Invariant: all ranks save and end with 75, and so does the command."""
    listen = (
        "heard = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: heard.append(1))\n"
        "(place / f'ready_{rank}').touch()\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.3); (place / f'heard_{rank}').write_text(str(len(heard))); sys.exit(75)\n"
    )
    threading.Thread(target=send_when, args=(tmp_path, ["ready_0", "ready_1"], signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    assert ranks(tmp_path, listen) == STOPPED
    assert [(tmp_path / f"heard_{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert signal.getsignal(signal.SIGTERM) is before


def send_when(place: Path, there: list[str], number: int) -> None:
    deadline = time.monotonic() + 20
    while not all((place / name).is_file() for name in there) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def test_nothing_outlives_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that started the ranks is killed: they, and what they have started, end."""
    child = (
        "import igpt.distributed.launcher as p, pathlib, subprocess, sys, time; p.die_with_parent()\n"
        "own = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1], 'pid_grandchild').write_text(str(own.pid)); time.sleep(60)\n"
    )
    parent = (
        "import sys; from igpt.distributed.launcher import run_ranks\n"
        f"run_ranks([sys.executable, '-c', {RANK + child!r}, sys.argv[1]], 2)\n"
    )
    (temporary := tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", parent, str(tmp_path)], env=environment) as process:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("pid_*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    while not all_gone(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list(tmp_path.glob("pid_*"))) == 3
    assert all_gone(tmp_path)
    assert len(list(temporary.iterdir())) == 1  # where they met; the next run removes it
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert run_ranks([sys.executable, "-c", ""], 1) == 0
    assert not list(temporary.iterdir())


JOB = """
import json, os, pathlib, sys, time
settings = dict(argument.split("=") for argument in sys.argv[2:])
place = pathlib.Path(sys.argv[1], settings["name"])
place.mkdir(exist_ok=True)
pathlib.Path(os.environ["IGPT_TELL"]).write_text(str(place))
(place / "pid_0").write_text(str(os.getpid()))
with (place / "begun").open("a") as file: file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + "\\n")
start = time.time()
time.sleep(float(settings.get("seconds", 0.2)))
if settings.get("fails") == "yes" and not (place.parent / "mended").exists(): sys.exit("this one cannot be done")
(place / "result.json").write_text(json.dumps({"numbers": {"val/loss_gen": {"value": float(len(place.name))}}}))
(place / "times").write_text(f"{start} {time.time()}")
"""


def a_sweep(place: Path, *settings: str, n_jobs: int = 2, gpus: list[str] | None = None, n_process: int = 1) -> Sweep:
    """One job for each line of settings; what an earlier one has finished is known."""
    jobs = [
        Job(i, [f"name=job{i}", *line.split()], n_process=n_process, folder=str(place / f"job{i}"))
        for i, line in enumerate(settings)
    ]
    (place / "sweep").mkdir(exist_ok=True)
    sweep._load_finished(jobs, [OmegaConf.create({"logger": None})] * len(jobs), "val/loss_gen", sweep="a sweep")
    return Sweep(place / "sweep", jobs, gpus=gpus or [], n_jobs=n_jobs, metric="val/loss_gen", table={})


def run(of: Sweep, place: Path) -> str | None:
    return of.run([sys.executable, "-c", JOB, str(place)])


def test_a_failed_job_stops_no_other_and_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: what is finished is not repeated by the same sweep; what failed is."""
    caplog.set_level(logging.INFO)
    lines = ("fails=yes", "", "", "")
    assert run(first := a_sweep(tmp_path, *lines), tmp_path) is None
    assert [job.state for job in first.jobs] == [FAILED, FINISHED, FINISHED, FINISHED]
    assert [job.value for job in first.jobs] == [None, 4.0, 4.0, 4.0]
    assert "this one cannot be done" in caplog.text
    assert "4 jobs: 1 failed, 3 finished" in caplog.text
    assert "job 0/4: name=job0 fails=yes" in caplog.messages
    assert (tmp_path / "sweep" / "job_000.txt").read_text().startswith("job 0/4: name=job0 fails=yes\n")
    (tmp_path / "mended").touch()
    (left := tmp_path / "sweep" / ".jobs.json.abc.part").write_text("of a sweep that was killed")
    assert run(second := a_sweep(tmp_path, *lines), tmp_path) is None
    assert {job.state for job in second.jobs} == {FINISHED}
    assert [len((tmp_path / f"job{i}" / "begun").read_text().splitlines()) for i in range(4)] == [2, 1, 1, 1]
    assert not left.exists()
    jobs = tmp_path / "sweep" / "jobs.json"
    assert {job["state"] for job in json.loads(jobs.read_text())["jobs"]} == {FINISHED}
    jobs.unlink()  # of a sweep that was killed before it wrote this
    assert run(a_sweep(tmp_path, *lines), tmp_path) is None
    assert {job["state"] for job in json.loads(jobs.read_text())["jobs"]} == {FINISHED}


def test_a_search_names_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: of one job at a time, all that was not typed; without the number of jobs, which is not known."""
    of = Sweep(
        tmp_path, [Job(3, ["model=a", "task.learning_rate=0.003"])], gpus=[], n_jobs=1, metric="val/loss_gen", table={},
        typed=["model=a", "sweep=learning_rate"],
    )  # fmt: skip
    assert of._describe_settings(of.jobs[0]) == "task.learning_rate=0.003"
    monkeypatch.setenv("IGPT_SWEEP", "a search")
    assert of._name_job(of.jobs[0]) == "job 3"


def test_a_sweep_goes_on_without_its_own_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Invariant: what a sweep writes about its jobs may fail, which is said once each; the jobs are done.

    What a job says is on the terminal then.
    """
    of = a_sweep(tmp_path, "", "fails=yes", n_jobs=1)
    for name in ("jobs.json", "job_000.txt", "job_001.txt"):
        (tmp_path / "sweep" / name).mkdir()
    assert run(of, tmp_path) is None
    assert [job.state for job in of.jobs] == [FINISHED, FAILED]
    assert "this one cannot be done" in capfd.readouterr().err
    failed = [line.partition(": ")[0] for line in caplog.messages if line.endswith("the run goes on")]
    assert sorted(Path(name).name for name in failed) == ["job_000.txt", "job_001.txt", "jobs.json"]


def test_why_ranks_ended_is_in_the_log_without_a_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a reader of stderr that is gone keeps the reason out of no log."""
    (tmp_path / "log.txt").touch()
    (tmp_path / "tell").write_text(str(tmp_path))
    gone = MagicMock()
    gone.write.side_effect = BrokenPipeError
    monkeypatch.setattr(sys, "stderr", gone)
    launcher._report_failure("rank 1 of 2 was killed", tmp_path / "tell")
    assert gone.write.called
    assert (tmp_path / "log.txt").read_text().endswith("rank 1 of 2 was killed\n")


def test_as_many_at_a_time_as_asked_each_with_its_own_gpus(tmp_path: Path) -> None:
    """Invariant: of five jobs on four GPUs, two each, no two share one at any moment."""
    of = a_sweep(tmp_path, *[""] * 5, n_jobs=3, gpus=["0", "1", "4", "7"], n_process=2)
    run(of, tmp_path)
    spans = []
    for job in of.jobs:
        place = tmp_path / f"job{job.number}"
        gpus = set((place / "begun").read_text().split()[0].split(","))
        assert len(gpus) == 2
        start, end = map(float, (place / "times").read_text().split())
        spans.append((start, end, gpus))
    together = [(a, b) for i, a in enumerate(spans) for b in spans[:i] if a[0] < b[1] and b[0] < a[1]]
    assert together
    assert not any(a[2] & b[2] for a, b in together)
    assert set.union(*(gpus for *_, gpus in spans)) == {"0", "1", "4", "7"}


def test_ctrl_c_ends_all_and_the_same_sweep_goes_on(tmp_path: Path) -> None:
    of = a_sweep(tmp_path, "", "seconds=60", "seconds=60", "")
    threading.Thread(target=send_when, args=(tmp_path, ["job2/pid_0"], signal.SIGINT)).start()
    assert run(of, tmp_path) == "SIGINT"
    assert [job.state for job in of.jobs] == [FINISHED, INTERRUPTED, INTERRUPTED, WAITING]
    assert all(all_gone(tmp_path / f"job{i}") for i in range(3))
    again = a_sweep(tmp_path, "", "", "", "")
    assert [job.state for job in again.jobs] == [FINISHED, WAITING, WAITING, WAITING]
    assert run(again, tmp_path) is None
    assert {job.state for job in again.jobs} == {FINISHED}


def test_children_have_ended_when_their_block_has(tmp_path: Path) -> None:
    """Also when it ends by an error: asked to, so that runs can save."""
    with pytest.raises(ValueError, match="mine"), Children().supervise() as children:
        child = children.start(Child([sys.executable, "-c", "import time; time.sleep(60)"], None))
        raise ValueError("mine")
    assert child.code == -signal.SIGTERM


def test_jobs_that_are_one_run_are_refused_and_what_is_finished_is_known(tmp_path: Path) -> None:
    """Invariant: as the runs themselves name their folders."""

    def configs(*each: str) -> list[DictConfig]:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            common = [f"paths.runs={tmp_path}", "task=pretrain"]
            return [compose("config", overrides=[*common, one], return_hydra_config=True) for one in each]

    jobs = [Job(0, []), Job(1, [])]
    with pytest.raises(ValueError, match=r"jobs 0 and 1 are the same run, pretrain-.*does not change what is learned"):
        sweep._predict_folders(jobs, configs("trainer.micro_batch=64", "trainer.micro_batch=128"))
    sweep._predict_folders(jobs, configs("seed=1", "task.steps=no"))
    assert [Path(str(job.folder)).name.startswith("pretrain-igpt_nano-digits8-ar-s1") for job in jobs[:1]] == [True]
    Path(str(jobs[0].folder)).mkdir()
    (Path(str(jobs[0].folder)) / "result.json").write_text('{"numbers": {"val/loss_gen": {"value": 1.5}}}')
    sweep._load_finished(jobs, configs("seed=1", "task.steps=no"), "val/loss_gen", sweep="a sweep")
    assert [(job.state, job.value) for job in jobs] == [(FINISHED, 1.5), (WAITING, None)]


@pytest.mark.parametrize("finished", [True, False])
def test_a_finished_rank_leaves_before_the_interpreter_is_torn_down(finished: bool) -> None:
    """By hand: exit handlers run and what was printed arrives; only without `rank_finished` objects are torn down."""
    script = f"""
import atexit
from igpt.distributed import launcher
class Late:
    def __del__(self, say=print):
        say("torn down")
late = Late()
launcher.skip_teardown()
atexit.register(print, "handler")
launcher.rank_finished = {finished}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["handler"] + ["torn down"] * (not finished)
