"""From a composed config to a finished run folder: one command, or one call from Python."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.distributed import launcher, ranks
from igpt.distributed.signals import STOPPED, StoppedError, pass_on
from igpt.metric.result import Result
from igpt.report.closing_table import closing_table, columns
from igpt.report.folder import environment, result_of
from igpt.run.arguments import absolute, expand_home, prepare
from igpt.run.components import Components
from igpt.run.execute import check_batch, execute_task, run_and_report
from igpt.run.logs import log_file, set_up_logging
from igpt.run.run_config import OF_LAUNCH, RunConfig
from igpt.run.run_dir import resolve_run_dir
from igpt.run.targets import task_settings
from igpt.training.nan_guard import NonFiniteLossError
from igpt.training.plan import planned
from igpt.utils import files

log = logging.getLogger(__name__)

REQUEUE_SECONDS = 60


def main(cfg: DictConfig) -> None:
    """One command: exit code 2 and one line when the input was bad, 75 when a signal stopped it and it saved."""
    set_up_logging(quiet=not ranks.this_rank().first)
    choices = dict(HydraConfig.get().runtime.choices)
    overrides = list(HydraConfig.get().overrides.task)
    try:
        launch(cfg, choices=choices, overrides=overrides)
    except StoppedError as error:
        if pass_on(error.number) and not ranks.this_rank().first:
            time.sleep(REQUEUE_SECONDS)  # whoever was told has the first rank queue the job again, and ends us all
        sys.exit(STOPPED)
    except (ValueError, NonFiniteLossError, OSError, OmegaConfBaseException) as error:
        log.debug("traceback", exc_info=True)
        log.error("error: %s", (str(error).splitlines() or [type(error).__name__])[0])
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if (said := out_of_memory(error) or lost_worker(error)) is None:
            raise
        log.debug("traceback", exc_info=True)
        log.error("error: %s", said)
        sys.exit(2)


def out_of_memory(error: BaseException) -> str | None:
    """What to do about an error, where it says that memory ran out: PyTorch has several that do."""
    said = str(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in said:
        return None
    where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this machine"
    return (
        f"the memory of {where} is full: the same command with trainer.plan=true says what a training run takes; "
        "trainer.micro_batch=N (fewer images at a time), trainer.activation_checkpointing=true, "
        "trainer.precision=bf16-mixed and trainer=fsdp take less"
    )


def lost_worker(error: BaseException) -> str | None:
    """What to do about an error, where it says that a process that reads images has died."""
    said = f"{error.__cause__ or error.__context__} {error}"  # by which signal, PyTorch says in the first
    if re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", said) is None:
        return None
    found = re.search(r"killed by signal: [\w ]+", said)
    how = found[0] if found else "it ended unexpectedly"
    return (
        f"a process that reads images has died ({how}): the system ends one that takes too much memory, or whose file "
        "became shorter; trainer.num_workers=0 reads in this process, and resume=RUN_FOLDER goes on"
    )


def run(*overrides: str, conf: Path | str = "conf") -> tuple[Result, Path | None]:
    """One run from Python, in this process, as `python train.py OVERRIDES` does it: its result and its folder
    (None where it leaves none: a plan, a page).

    `conf`: the folder of settings, of a clone of this repository. Paths are seen from the current folder.

    Raises:
        ValueError: whatever the command would say in one line.
    """
    folders: list[Path] = []
    with _composed(overrides, conf) as (cfg, choices, arguments):
        result = launch(cfg, choices=choices, overrides=arguments, tell=folders.append)
    return result, folders[0] if folders else None


def build_components(*overrides: str, conf: Path | str = "conf") -> Components:
    """The parts of a run (its images, tokenizer, network …) from Python, each built when it is asked for.

    Raises:
        ValueError: whatever the command would say in one line.
    """
    with _composed(overrides, conf) as (cfg, choices, _):
        return Components(RunConfig(cfg, choices))


@contextmanager
def _composed(overrides: Sequence[str], conf: Path | str) -> Iterator[tuple[DictConfig, dict[str, Any], list[str]]]:
    """The config, the option that was chosen in each group, the overrides that made them; Hydra stays initialised."""
    folder = Path(conf).resolve()
    arguments = prepare(list(overrides), folder)
    with initialize_config_dir(str(folder), version_base="1.3"):
        cfg = hydra.compose("config", overrides=arguments, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        yield OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), choices, arguments


def launch(
    cfg: DictConfig, *, choices: dict[str, Any], overrides: list[str], tell: Callable[[Path], None] | None = None
) -> Result:
    """Runs a composed config in its run folder; a finished identical run is not repeated, its result is returned.

    `tell` is given the run's folder.
    """
    expand_home(cfg)
    if not cfg.task.requires:
        return run_without_folder(cfg)
    run = RunConfig(cfg, choices)
    components = Components(run)
    if components.hardware.plan:
        return show_plan(components)
    components.check_settings()
    check_batch(components.hardware, cfg.task)
    if not run.keeps_run:
        return run_interactive(components)
    with ranks.joined(components.hardware.device) as rank:
        check_ranks(run)
        folder, finished = ranks.from_first(lambda: resolve_run_dir(run))
        if tell is not None:
            tell(folder.path)
        if finished:
            record = folder.read_result()
            result = result_of(record)
            log.info(
                "%s is finished; force=true repeats it\n%s",
                folder.path,
                closing_table(result, folder.path, record["seconds"], published=run.config["published"]),
            )
            return result
        with ExitStack() as while_it_runs:
            if rank.first:
                while_it_runs.enter_context(folder.lock())
            if ranks.from_first(lambda: folder.finished):  # by the process that held the lock until now
                return result_of(folder.read_result())
            if rank.first:
                folder.start(run.config, absolute(overrides), run.input_hashes, run.subject)
                files.remove_parts(folder.path)
                while_it_runs.enter_context(log_file(folder.path / "log.txt"))
            ranks.barrier()  # from here on the others may read what is there
            components.run_dir = folder.path
            components.hardware.warn_of_rounding()
            processes_text = f", {rank.count} processes" if rank.count > 1 else ""
            log.info("%s, in %s%s", describe_run(run), folder.path, processes_text)
            while_it_runs.enter_context(components.hardware.kernel_cache())
            try:
                return run_and_report(components)
            except StoppedError as error:
                log.warning("%s; continue with `python train.py resume=%s`", error, folder.path)
                raise


def describe_run(run: RunConfig) -> str:
    """What a run is about to do, in a line."""
    if "finished_runs" in run.requires:
        return run.task
    task = run.config["task"]
    subject = f"{run.task}: {run.model_name} on {run.data_name}, {run.objective_settings['name']}"
    if "steps" in task and isinstance(task.get("batch_size"), int):
        return f"{subject}, {task['steps']:,} steps of {task['batch_size']:,} images"
    return subject


def run_without_folder(cfg: DictConfig) -> Result:
    """Runs a task that requires nothing, and so has no folder of its own: it adds to those of finished runs."""
    spec = OmegaConf.to_container(cfg.task, resolve=True)
    assert isinstance(spec, dict)
    target = cfg.task["_target_"]
    settings = task_settings(target, {str(key): value for key, value in spec.items() if key not in OF_LAUNCH})
    task: Callable[..., Result] = get_object(target)
    return task(settings) if ranks.this_rank().first else Result()


def show_plan(components: Components) -> Result:
    """Logs what a training run would take, of its settings alone; nothing is made.

    Raises:
        ValueError: a task that trains no network.
    """
    run, task = components.run, components.run.cfg.task
    if "steps" not in task or "network" not in run.requires:
        raise ValueError(f"trainer.plan=true is for tasks that train a network, not task={run.task}")
    rows = planned(components.hardware, components.planned_network, batch_size=task.batch_size, steps=task.steps)
    log.info("%s", columns([(f"{run.task} {run.model_name} on {run.data_name}", "planned"), *rows]))
    return Result()


def run_interactive(components: Components) -> Result:
    """Runs a task that leaves no run folder, until the person who started it ends it.

    Raises:
        ValueError: it is to be resumed or repeated, is a job of a sweep, or was given several processes.
    """
    run = components.run
    if run.cfg.force or run.cfg.resume is not None or launcher.TELL in os.environ:
        raise ValueError(f"task={run.task} leaves no run: it cannot be resumed, repeated (force=true) or swept over")
    hardware = components.hardware
    if hardware.rank.count > 1:
        raise ValueError(f"task={run.task} runs in one process: trainer.devices=1, got {hardware.rank.count}")
    hardware.warn_of_rounding()
    with hardware.kernel_cache():
        components.run_dir = Path(run.cfg.paths.runs) / run.name
        return execute_task(components)


def check_ranks(run: RunConfig) -> None:
    """Raises ValueError unless every process of this run has the same settings, files and libraries."""
    settings = {key: json.dumps(value, sort_keys=True, default=str) for key, value in run.config.items()}
    ranks.check_same("settings", settings)
    ranks.check_same("files", run.input_hashes)
    own = environment()
    known = {commit for commit in ranks.gathered(own["commit"]) if commit != "unknown"}
    ranks.check_same("versions", {**own["versions"], "commit": own["commit"] if len(known) > 1 else "the same"})
