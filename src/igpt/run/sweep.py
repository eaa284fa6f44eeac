"""Sweeps on one machine: each job is a `python train.py …` process, several in parallel."""

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm.auto import tqdm

from igpt.distributed import launcher
from igpt.distributed.cores import count_physical_cores
from igpt.distributed.launcher import RANK_VARIABLES, RUN_DIR_FILE, SWEEP, Child, Children, count_devices, describe_exit
from igpt.distributed.process_state import environment
from igpt.distributed.signals import STOPPED
from igpt.metric.result import find_key
from igpt.report.bystanders import Bystander
from igpt.report.closing_table import align_columns, read_text
from igpt.report.sweep_report import check_table, report_sweep
from igpt.run.arguments import resolve_paths
from igpt.run.finished import complete_finished
from igpt.run.logs import log_file, refuse, set_up_logging
from igpt.run.operations import resolve_steps
from igpt.run.run_config import RunConfig, to_dict
from igpt.run.run_dir import find_run_dir
from igpt.run.saved_overrides import search_path_arguments
from igpt.run.variants import apply_variant
from igpt.utils import files
from igpt.utils.program import program_arguments, typed_command

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


def launch(
    sweep: DictConfig, configs: Sequence[DictConfig], *, first: int, n_jobs: int | None, metric: str, **table: Any
) -> list[JobReturn]:
    """Runs the unfinished jobs of a sweep, logs a table of all jobs, and returns their metrics.

    `table`: further settings of `report_sweep`, which compares the runs at the end.

    The same command continues an interrupted sweep: finished jobs are skipped, started ones resume, failed ones run
    again. A failed job does not stop the sweep or a sweeper's later jobs; the command's exit code is 1 then.

    Raises:
        SystemExit: code 75 when a signal stopped a job, 2 for an invalid sweep.
    """
    set_up_logging()
    for cfg in (sweep, *configs):
        resolve_paths(cfg)
    jobs = [Job(i, list(cfg.hydra.overrides.task)) for i, cfg in enumerate(configs, start=first + 1)]
    folder = Path(sweep.hydra.sweep.dir) / files.hash_json([job.overrides for job in jobs])[:8]
    try:
        _predict_folders(jobs, configs)
        if n_jobs is not None and n_jobs < 1:
            raise ValueError(f"hydra.launcher.n_jobs starts at 1, or null, got {n_jobs}")
        if SWEEP not in os.environ:  # a search checks nothing of jobs that it does not know yet
            check_table([job.overrides for job in jobs], **table)
        gpus = _share_gpus(jobs, configs)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0), log_file(folder / "log.txt"):
            with Bystander(folder / "multirun.yaml"):
                OmegaConf.save(sweep, folder / "multirun.yaml")  # Hydra's config of the sweep
            _load_finished(jobs, configs, metric, sweep=_name_sweep(folder))
            at_once = n_jobs or max(1, len(gpus) // max(job.n_process for job in jobs))
            typed = list(sweep.hydra.overrides.task)
            running = Sweep(folder, jobs, gpus=gpus, n_jobs=at_once, metric=metric, table=table, typed=typed)
            received = running.run(command=_build_command(configs[0]))
    except Timeout:
        refuse(f"{folder} is in use: the same sweep is running")
    except (ValueError, OSError) as error:
        refuse(str(error))
    if any(job.state in (WAITING, INTERRUPTED) for job in jobs):
        log.warning("stopped by %s; the same command goes on with what is left", received or "a signal to a job")
        sys.exit(STOPPED)
    if any(job.state == FAILED for job in jobs):
        launcher.sweep_code = 1
    return [_build_job_return(job, cfg) for job, cfg in zip(jobs, configs, strict=True)]


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
            SWEEP: _name_sweep(self.folder),
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


def _build_command(cfg: DictConfig) -> list[str]:
    """The command of one job without its overrides: Python, this program, additional config folders."""
    return [*program_arguments(), *search_path_arguments(cfg.hydra)]


def _share_gpus(jobs: Sequence[Job], configs: Sequence[DictConfig]) -> list[str]:
    """Sets each job's `n_process` (one GPU each); returns the ids of this machine's GPUs.

    Raises:
        ValueError: a job that needs more GPUs than there are.
    """
    for job, cfg in zip(jobs, configs, strict=True):
        job.n_process = count_devices(cfg.trainer)
    if all(cfg.trainer.accelerator == "cpu" for cfg in configs):
        return []
    import torch  # slow import, only for GPU jobs

    n_gpu = torch.cuda.device_count()
    for job in jobs:
        if n_gpu and job.n_process > n_gpu:
            raise ValueError(
                f"job {job.number} asks for trainer.devices={job.n_process}, this machine has {n_gpu} GPUs: lower it"
            )
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n_gpu)))).split(",")[:n_gpu]


def _predict_folders(jobs: Sequence[Job], configs: Sequence[DictConfig]) -> None:
    """Sets each job's `folder`, the future run directory; None for invalid settings, which the job reports.

    Raises:
        ValueError: two jobs that are the same run.
    """
    owners: dict[str, int] = {}
    for job, cfg in zip(jobs, configs, strict=True):
        if cfg.rerun:
            continue  # a new directory
        try:
            config = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
            apply_variant(config, job.overrides)
            run = RunConfig(config, dict(cfg.hydra.runtime.choices))
            resolve_steps(run)
            job.folder = str(find_run_dir(run).path.absolute())
        except (ValueError, OSError, OmegaConfBaseException):
            continue
        if job.folder in owners:
            raise ValueError(
                f"jobs {owners[job.folder]} and {job.number} are the same run, {run.name}: what differs between them "
                "does not change what is learned (the trainer's settings but for precision do not), so sweep something "
                "else, or set another paths.runs for each"
            )
        owners[job.folder] = job.number


def _name_sweep(folder: Path) -> str:
    """The sweep's name for its jobs: that of the search, if it is part of one."""
    return os.environ.get(SWEEP, f"sweep-{folder.name}")


def _load_finished(jobs: Sequence[Job], configs: Sequence[DictConfig], metric: str, *, sweep: str) -> None:
    """Sets state and metric of the jobs whose runs are finished, by this sweep or another command.

    These jobs are not started: the loggers that they ask for are told here.
    """
    for job, cfg in zip(jobs, configs, strict=True):
        if job.folder is not None and job.read_result(metric):
            job.state = FINISHED
            with environment(**{SWEEP: sweep}):
                complete_finished(Path(job.folder), to_dict(cfg.logger) if cfg.get("logger") else None)


def _build_job_return(job: Job, cfg: DictConfig) -> JobReturn:
    """The job's metric for the sweeper; NaN if it failed."""
    returned = JobReturn(overrides=job.overrides, cfg=cfg, working_dir=job.folder or "", status=JobStatus.COMPLETED)
    returned.return_value = math.nan if job.state == FAILED else job.value  # an exception would end the sweep
    return returned
