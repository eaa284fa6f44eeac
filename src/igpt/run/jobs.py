"""The jobs of a sweep: processes of `python train.py …`, several in parallel, and their records."""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from igpt.distributed.cores import count_physical_cores
from igpt.distributed.launcher import RANK_VARIABLES, RUN_DIR_FILE, SWEEP, Child, Children, describe_exit
from igpt.distributed.signals import STOPPED
from igpt.metric.result import find_key
from igpt.report.bystanders import Bystander
from igpt.report.closing_table import align_columns, read_text
from igpt.report.sweep_report import report_sweep
from igpt.utils import files
from igpt.utils.program import typed_command

log = logging.getLogger(__name__)

WAITING, RUNNING, FINISHED, FAILED, INTERRUPTED = "waiting", "running", "finished", "failed", "interrupted"


@dataclass
class Job:
    """One job of a sweep, as saved in `jobs.json`."""

    number: int  # from 1
    overrides: list[str]
    state: str = WAITING
    exit_code: int | None = None
    seconds: float = 0.0
    folder: str | None = None  # run directory, once it is known
    value: float | None = None  # the sweep's metric
    n_process: int = 1
    gpus: list[str] = field(default_factory=list)

    def read_result(self, metric: str) -> bool:
        """Whether the run is finished; if so, reads its metric, None if it has none of that name.

        Raises:
            ValueError: its result.json is damaged.
        """
        if self.folder is None or not (result := Path(self.folder) / "result.json").is_file():
            return False
        try:
            numbers = files.read_json(result)["numbers"]
            key = find_key(numbers, metric)
            self.value = None if key is None else float(numbers[key]["value"])
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{result} is damaged ({error!r:.80}): restore it, or remove its folder") from error
        return True


@dataclass
class Sweep:
    """The jobs of one sweep, with its directory: `jobs.json`, and each job's output in `job_000.txt`."""

    folder: Path
    jobs: list[Job]
    gpus: list[str]
    n_jobs: int
    metric: str
    table: dict[str, Any]  # further settings of `report_sweep`
    typed: Sequence[str] = ()  # overrides of the command

    def __post_init__(self) -> None:
        self._jobs_path = self.folder / "jobs.json"
        self._jobs_bystander = Bystander(self._jobs_path)

    def run(self, command: Sequence[str]) -> str | None:
        """Runs every unfinished job; returns the name of the signal that stopped the sweep, or None."""
        files.remove_parts(self.folder, ".*.part")
        self._save()
        waiting = [job for job in self.jobs if job.state != FINISHED]
        done = len(self.jobs) - len(waiting)
        log.info(
            "%d jobs, %d at a time, in %s%s", len(self.jobs), self.n_jobs, self.folder,
            f"; {done} were finished before" if done else "",
        )  # fmt: skip
        running: dict[int, tuple[Job, Child, float]] = {}
        free = list(self.gpus)
        bar = tqdm(total=len(self.jobs), initial=done, unit="job", disable=None, leave=False)
        with Children().supervise() as children, bar:

            def has_free_slot() -> bool:
                enough = not self.gpus or len(free) >= waiting[0].n_process
                return children.received_signal is None and len(running) < self.n_jobs and enough

            while running or (waiting and children.received_signal is None):
                while waiting and has_free_slot():
                    job = waiting.pop(0)
                    job.gpus = [free.pop(0) for _ in range(job.n_process if self.gpus else 0)]
                    child = self._start(job, children, command)
                    running[id(child)] = job, child, time.monotonic()
                ended, code = children.wait()
                job, _, since = running.pop(id(ended))
                free += job.gpus
                self._record_end(job, code, time.monotonic() - since, stopping=children.received_signal is not None)
                bar.update()
        states = [job.state for job in self.jobs]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        log.info("%d jobs: %s\n%s", len(states), counts, self._format_table())
        folders = [Path(job.folder) for job in self.jobs if job.folder is not None and job.state in (FINISHED, FAILED)]
        if SWEEP not in os.environ:  # a search compares its jobs at its end
            report_sweep(self.folder, folders, metric=self.metric, command=typed_command(), **self.table)
        return children.received_signal

    def _start(self, job: Job, children: Children, command: Sequence[str]) -> Child:
        job.state = RUNNING
        self._tell_path(job).unlink(missing_ok=True)
        self._save()
        environment = {
            RUN_DIR_FILE: str(self._tell_path(job).absolute()),
            SWEEP: name_sweep(self.folder),
        }
        if job.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
        if "OMP_NUM_THREADS" not in os.environ:  # parallel jobs would compete for the cores
            environment["OMP_NUM_THREADS"] = str(max(1, count_physical_cores() // (self.n_jobs * job.n_process)))
        first_line = f"{self._name_job(job)}: {self._describe_settings(job)}"
        log.info("%s", first_line)
        with self._open_output(job) as output:
            with Bystander(self._output_path(job)):
                output.write(f"{first_line}\n".encode(errors="backslashreplace"))
                output.flush()  # before what the job writes
            return children.start(Child([*command, *job.overrides], output, environment, without=RANK_VARIABLES))

    def _record_end(self, job: Job, code: int, seconds: float, *, stopping: bool) -> None:
        job.exit_code, job.seconds = code, round(seconds, 1)
        tell = self._tell_path(job)
        job.folder = os.fsdecode(tell.read_bytes()) if tell.is_file() else None
        failed = INTERRUPTED if stopping or code == STOPPED else FAILED
        job.state = FINISHED if code == 0 and job.read_result(self.metric) else failed
        tell.unlink(missing_ok=True)
        self._save()
        if job.state == FAILED:
            output = read_text(self.folder, Path(self._output_path(job).name))
            lines = [line for line in output.splitlines() if line.strip()]
            errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
            lines = lines[errors[-1] :][:5] if errors else lines[-5:]
            log.error(
                "%s %s after %.0f s; %s says:\n%s", self._name_job(job), describe_exit(code), seconds,
                self._output_path(job),
                "\n".join(f"    {line}" for line in lines),
            )  # fmt: skip
        else:
            value = "" if job.value is None else f", {self.metric} {job.value:.4f}"
            name, folder = self._name_job(job), _shorten_path(job.folder)
            log.info("%s %s after %.0f s%s: %s", name, job.state, seconds, value, folder)

    def _save(self) -> None:
        with self._jobs_bystander:
            files.write_json(self._jobs_path, {"jobs": [asdict(job) for job in self.jobs]})

    def _open_output(self, job: Job) -> IO[bytes]:
        with Bystander(self._output_path(job)):
            return self._output_path(job).open("ab")
        with suppress(OSError):  # a stderr that is closed
            return open(os.dup(2), "ab")  # why the job fails, if it does, is told here then
        return open(os.devnull, "ab")

    def _output_path(self, job: Job) -> Path:
        return self.folder / f"job_{job.number:03d}.txt"

    def _tell_path(self, job: Job) -> Path:
        return self.folder / f".job_{job.number:03d}.folder"

    def _name_job(self, job: Job) -> str:
        """`job 3/8`; in a search, which does not know how many there will be, `job 3`."""
        return f"job {job.number}" + ("" if SWEEP in os.environ else f"/{len(self.jobs)}")

    def _describe_settings(self, job: Job) -> str:
        """The overrides of this job that not all jobs share, and of a search those that it chose."""
        everywhere = {*self.typed}
        if len(self.jobs) > 1:
            everywhere |= set.intersection(*(set(other.overrides) for other in self.jobs))
        return " ".join(override for override in job.overrides if override not in everywhere) or "–"

    def _format_table(self) -> str:
        """The table of jobs: differing settings, state, metric, run directory."""
        rows = [("job", "settings", "state", self.metric, "folder")]
        for job in self.jobs:
            value = "–" if job.value is None else f"{job.value:.4f}"
            rows.append((str(job.number), self._describe_settings(job), job.state, value, _shorten_path(job.folder)))
        return align_columns(rows)


def _shorten_path(folder: str | None) -> str:
    """The path relative to the working directory if it lies in it; – for None."""
    if folder is None:
        return "–"
    return os.path.relpath(folder) if Path(folder).is_relative_to(Path.cwd()) else folder


def name_sweep(folder: Path) -> str:
    """The sweep's name for its jobs: that of the search, if it is part of one."""
    return os.environ.get(SWEEP, f"sweep-{folder.name}")
