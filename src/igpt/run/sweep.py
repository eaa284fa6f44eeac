"""Starts the jobs of a sweep on one machine, and reads their metrics."""

import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.distributed import launcher
from igpt.distributed.launcher import SWEEP, count_devices
from igpt.distributed.process_state import environment
from igpt.distributed.signals import STOPPED
from igpt.report.bystanders import Bystander
from igpt.report.sweep_report import check_table
from igpt.run.arguments import resolve_paths
from igpt.run.finished import complete_finished
from igpt.run.jobs import FAILED, FINISHED, INTERRUPTED, WAITING, Job, Sweep, name_sweep
from igpt.run.logs import log_file, refuse, set_up_logging
from igpt.run.operations import resolve_steps
from igpt.run.run_config import RunConfig, to_dict
from igpt.run.run_dir import find_run_dir
from igpt.run.saved_overrides import search_path_arguments
from igpt.run.variants import apply_variant
from igpt.utils import files
from igpt.utils.program import program_arguments

log = logging.getLogger(__name__)


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
            _load_finished(jobs, configs, metric, sweep=name_sweep(folder))
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
