"""Builds, in flow order, what a task needs, runs it and reports its result. The only place that knows all stages."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt import files, processes, ranks
from igpt.arguments import absolute, expand_home, prepare
from igpt.build import Build
from igpt.metric.result import Result
from igpt.places import chosen_folder
from igpt.report import loggers
from igpt.report.folder import RunFolder, environment, result_of
from igpt.report.logs import log_file, set_up_logging
from igpt.report.page import write_page
from igpt.report.table import closing_table, columns
from igpt.settings import factory
from igpt.stages import OF_LAUNCH, RUN, check_given, check_paper_key, check_task, stage_config
from igpt.stopping import STOPPED, StoppedError, pass_on
from igpt.task.guard import NonFiniteLossError
from igpt.task.machine import Machine
from igpt.task.pipeline import FROM
from igpt.task.plan import planned

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
    folder = Path(conf).resolve()
    arguments = prepare(list(overrides), folder)
    with initialize_config_dir(str(folder), version_base="1.3"):
        cfg = hydra.compose("config", overrides=arguments, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        folders: list[Path] = []
        result = launch(cfg, choices=choices, overrides=arguments, tell=folders.append)
        return result, folders[0] if folders else None


def launch(
    cfg: DictConfig, *, choices: dict[str, Any], overrides: list[str], tell: Callable[[Path], None] | None = None
) -> Result:
    """Runs a composed config in its run folder; a finished identical run is not repeated, its result is returned.

    `tell` hears which folder it is.
    """
    expand_home(cfg)
    if not cfg.task.needs:
        return without_folder(cfg)
    check_paper_key(cfg.task, "task")
    build = Build(cfg, choices)
    if build.machine.plan:
        return plan_of(build)
    check_batch(build.machine, cfg.task)
    if not keeps_a_run(cfg.task):
        return looked_at(build)
    with ranks.joined(build.machine.device) as rank:
        check_ranks(build)
        folder, finished = ranks.from_first(lambda: chosen_folder(build))
        if tell is not None:
            tell(folder.path)
        if finished:
            record = folder.read_result()
            result = result_of(record)
            log.info(
                "%s is finished; force=true repeats it\n%s",
                folder.path,
                closing_table(result, folder.path, record["seconds"], published=build.config["published"]),
            )
            return result
        with ExitStack() as while_it_runs:
            if rank.first:
                while_it_runs.enter_context(folder.lock())
            if ranks.from_first(lambda: folder.finished):  # by the process that held the lock until now
                return result_of(folder.read_result())
            if rank.first:
                folder.start(build.config, absolute(overrides), build.files_sha256, build.of)
                files.remove_parts(folder.path)
                while_it_runs.enter_context(log_file(folder.path / "log.txt"))
            ranks.barrier()  # from here on the others may read what is there
            build.machine.warn_of_rounding()
            log.info("%s, in %s%s", said(build), folder.path, f", {rank.count} processes" if rank.count > 1 else "")
            while_it_runs.enter_context(build.machine.kernel_cache())
            try:
                return perform(build, folder)
            except StoppedError as error:
                log.warning("%s; continue with `python train.py resume=%s`", error, folder.path)
                raise


def said(build: Build) -> str:
    """What a run is about to do, in a line."""
    task = build.config["task"]
    if "found" in task["needs"]:
        return build.task
    of = f"{build.task}: {build.model_name} on {build.data_name}, {build.objective_settings['name']}"
    if "steps" in task and isinstance(task.get("batch_size"), int):
        return f"{of}, {task['steps']:,} steps of {task['batch_size']:,} images"
    return of


def without_folder(cfg: DictConfig) -> Result:
    """Does a task that needs nothing built, and so has no folder of its own: it adds to those of finished runs."""
    spec = OmegaConf.to_container(cfg.task, resolve=True)
    assert isinstance(spec, dict)
    settings = {str(key): value for key, value in spec.items() if key not in ("name", "needs")}
    run = factory(settings, "task")
    check_task(settings)
    result: Result = run() if ranks.this_rank().first else Result()
    return result


def plan_of(build: Build) -> Result:
    """Says what a pretraining run would take, of its settings alone; nothing is made.

    Raises:
        ValueError: another task.
    """
    if "steps" not in build.cfg.task or "net" not in build.cfg.task.needs:
        raise ValueError(f"trainer.plan=true is for tasks that train a network, not task={build.task}")
    rows = planned(
        build.machine, build.planned_network, batch_size=build.cfg.task.batch_size, steps=build.cfg.task.steps
    )
    log.info("%s", columns([(f"{build.task} {build.model_name} on {build.data_name}", "planned"), *rows]))
    return Result()


def keeps_a_run(task: DictConfig) -> bool:
    """Whether a task leaves a run folder; if not, it is for a person to look at, and nothing is a result."""
    return bool(task.get("run_folder", True))


def looked_at(build: Build) -> Result:
    """Runs a task that leaves no run folder, until the person who started it ends it.

    Raises:
        ValueError: it is to be resumed or repeated, is a job of a sweep, or was given several processes.
    """
    if build.cfg.force or build.cfg.resume is not None or processes.TELL in os.environ:
        raise ValueError(f"task={build.task} leaves no run: it cannot be resumed, repeated (force=true) or swept over")
    if build.machine.rank.count > 1:
        raise ValueError(f"task={build.task} runs in one process: trainer.devices=1, got {build.machine.rank.count}")
    build.machine.warn_of_rounding()
    with build.machine.kernel_cache():
        return carried_out(build, RunFolder(Path(build.cfg.paths.runs) / build.name))


def check_batch(machine: Machine, task: DictConfig) -> None:
    """Raises ValueError when the processes of this run cannot share out the images of a step."""
    if "net" in task.needs and isinstance(task.get("batch_size"), int):
        machine.training_plan(task.batch_size)


def check_ranks(build: Build) -> None:
    """Raises ValueError unless every process of this run has the same settings, files and libraries."""
    settings = {key: json.dumps(value, sort_keys=True, default=str) for key, value in build.config.items()}
    ranks.check_same("settings", settings)
    ranks.check_same("files", build.files_sha256)
    own = environment()
    known = {commit for commit in ranks.gathered(own["commit"]) if commit != "unknown"}
    ranks.check_same("versions", {**own["versions"], "commit": own["commit"] if len(known) > 1 else "the same"})


def perform(build: Build, folder: RunFolder) -> Result:
    """Builds what the task needs, runs it, writes and shows its result."""
    start = time.perf_counter()
    failed = True
    try:
        if not build.trains:
            build.loggers(folder)
        result = carried_out(build, folder)
        seconds = time.perf_counter() - start
        if build.weights is not None:
            result.provenance["init"] = build.began_with
        if build.machine.rank.first:
            folder.finish(build.task, result, seconds=seconds)
            write_page(folder.path)
            loggers.show(result, folder.path)
        failed = False
    except StoppedError:
        failed = False
        raise
    finally:
        loggers.close(failed)
    ranks.barrier()  # the next stage of a pipeline reads what this one left
    table = closing_table(result, folder.path, seconds, published=build.config["published"])
    log.info("%s\n%s", build.task, table)
    return result


def carried_out(build: Build, folder: RunFolder) -> Result:
    """Checks a task's settings, builds what it needs, runs it."""
    spec = {key: value for key, value in build.config["task"].items() if key not in OF_LAUNCH}
    run = factory(spec, "task")
    check_task(spec)
    build.check_weights()
    needs = {
        need: stages(build) if need == "stage" else getattr(build, f"need_{need}")(folder)
        for need in build.cfg.task.needs
    }
    result: Result = run(**needs)
    return result


def stages(build: Build) -> Callable[..., tuple[Result, Path]]:
    """What runs one stage of a pipeline; every stage's settings are checked before the first one starts."""
    listed = {str(name): own for name, own in build.cfg.task.stages.items() if own is not None}
    configs = {name: stage_config(build, name, own) for name, own in listed.items()}
    for name, (cfg, _) in configs.items():
        check_batch(build.machine, cfg.task)
        if not keeps_a_run(cfg.task):
            raise ValueError(f"task.stages.{name}: task={cfg.task.name} leaves no run: it is no stage of a pipeline")
        if (FROM in listed[name] and OmegaConf.is_list(listed[name][FROM])) != ("runs" in cfg.task):
            raise ValueError(f"task.stages.{name}.from: a list of stages is for tasks with runs, and these need one")
        if (run := listed[name].get(RUN)) is not None:
            check_given(name, RunFolder(Path(run)), cfg)

    def stage(name: str, *, folder: Path, init: str | list[str] | None) -> tuple[Result, Path]:
        cfg, choices = configs[name]
        given = listed[name].get(RUN)
        place = RunFolder(folder if given is None else Path(given))
        if isinstance(init, list):
            cfg.task.runs = init
        else:
            cfg.init = init
        of_stage = Build(cfg, choices)
        if ranks.from_first(lambda: place.finished):
            if given is not None and (saved := place.read_run()["files_sha256"]) != of_stage.files_sha256:
                differs = ", ".join(key for key in saved if saved[key] != of_stage.files_sha256.get(key))
                raise ValueError(f"task.stages.{name}.run={given}: it began from other files ({differs})")
            log.info("%s is finished", place.path)
            return result_of(place.read_result()), place.path
        if of_stage.machine.rank.first:
            place.start(of_stage.config, None, of_stage.files_sha256, of_stage.of)
        ranks.barrier()
        return perform(of_stage, place), place.path

    return stage
