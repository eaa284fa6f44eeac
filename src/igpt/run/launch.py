"""Runs a composed config in its run directory; from the command line (`main`) or from Python (`run`)."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.distributed import launcher, ranks
from igpt.distributed.process_state import one_thread_per_core
from igpt.distributed.signals import STOPPED, StoppedError, forward_signal
from igpt.metric.result import Result
from igpt.report.bystanders import describe_error
from igpt.report.closing_table import align_columns, closing_table
from igpt.report.folder import RunFolder, environment
from igpt.report.runs import read_finished
from igpt.run.arguments import prepare_arguments, resolve_paths, search_path_as_override
from igpt.run.components import Components
from igpt.run.execute import check_training, prepare_task, run_and_report, stage_runner
from igpt.run.explained_errors import (
    explain_lost_rank,
    explain_lost_worker,
    explain_missing_metric,
    explain_out_of_memory,
)
from igpt.run.finished import complete_finished
from igpt.run.init_defaults import describe_taken
from igpt.run.logs import log_file, set_up_logging
from igpt.run.operations import resolve_steps
from igpt.run.recipes import describe_recipe, keep_recorded
from igpt.run.run_config import RunConfig, to_dict
from igpt.run.run_dir import resolve_run_dir, resume_command
from igpt.run.saved_overrides import record_overrides, search_path_arguments
from igpt.run.targets import checked_task
from igpt.run.variants import apply_variant
from igpt.settings.run import check_structure
from igpt.training.compiling import explain_compile_failure
from igpt.training.nan_guard import NonFiniteLossError
from igpt.training.plan import plan_run, plan_tokenizer
from igpt.training.precision import describe_device, list_precision_notes
from igpt.utils import files
from igpt.utils.program import find_conf

log = logging.getLogger(__name__)

REQUEUE_SECONDS = 60


def main(cfg: DictConfig) -> None:
    """Runs the composed config; exits with 2 and a one-line error on bad input, with 75 when a signal stopped it."""
    set_up_logging(quiet=not ranks.this_rank().is_first)
    hydra_cfg = HydraConfig.get()
    overrides, search_path = list(hydra_cfg.overrides.task), search_path_arguments(hydra_cfg)
    try:
        launch(cfg, choices=dict(hydra_cfg.runtime.choices), overrides=overrides, search_path=search_path)
    except StoppedError as error:
        if forward_signal(error.number) and not ranks.this_rank().is_first:
            time.sleep(REQUEUE_SECONDS)  # submitit requeues from rank 0, then kills the job; wait for that
        sys.exit(STOPPED)
    except (ValueError, NonFiniteLossError, OSError, OmegaConfBaseException, MisconfigurationException) as error:
        log.debug("traceback", exc_info=True)
        log.error("error: %s", (str(error).splitlines() or [""])[0].strip() or describe_error(error))
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        lost_rank = explain_lost_rank(error)
        known = explain_out_of_memory(error) or explain_lost_worker(error) or explain_missing_metric(error)
        if (message := known or explain_compile_failure(error) or lost_rank) is None:
            raise
        log.debug("traceback", exc_info=True)
        log.error("error: %s", message)
        sys.exit(2 if lost_rank is None else 1)  # 2 of all ranks means that each was refused the same


def run(*overrides: str, conf: Path | str | None = None) -> tuple[Result, Path | None]:
    """Runs `python train.py OVERRIDES` in this process; returns (result, run directory).

    The run directory is None for a plan or a page, which write none. `conf`: another folder in place of igpt's own
    `conf/`; `--config-dir FOLDER` among the overrides adds one. Relative paths are relative to the working directory.

    Raises:
        ValueError: bad input, with the command's one-line message.
    """
    folders: list[Path] = []
    with _composed(overrides, conf) as (cfg, hydra_cfg, arguments):
        choices, search_path = dict(hydra_cfg.runtime.choices), search_path_arguments(hydra_cfg)
        result = launch(cfg, choices=choices, overrides=arguments, search_path=search_path, tell=folders.append)
    return result, folders[0] if folders else None


def build_components(*overrides: str, conf: Path | str | None = None) -> Components:
    """The parts of a run (images, tokenizer, network …) for use from Python, each built at its first use.

    Raises:
        ValueError: bad input, with the command's one-line message.
    """
    with _composed(overrides, conf) as (cfg, hydra_cfg, arguments):
        apply_variant(cfg, arguments)
        run = RunConfig(cfg, dict(hydra_cfg.runtime.choices))
        resolve_steps(run, arguments)
        return Components(run)


@contextmanager
def _composed(overrides: Sequence[str], conf: Path | str | None) -> Iterator[tuple[DictConfig, DictConfig, list[str]]]:
    """Yields (config, Hydra's config, overrides); Hydra stays initialised inside the block."""
    folder = Path(find_conf() if conf is None else conf).resolve()
    arguments = search_path_as_override(prepare_arguments(list(overrides), folder))
    with initialize_config_dir(str(folder), version_base="1.3"):
        cfg = hydra.compose("config", overrides=arguments, return_hydra_config=True)
        yield OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), cfg.hydra, arguments


@one_thread_per_core()
def launch(
    cfg: DictConfig,
    *,
    choices: dict[str, Any],
    overrides: list[str],
    search_path: Sequence[str] = (),
    tell: Callable[[Path], None] | None = None,
) -> Result:
    """Runs a composed config in its run directory; returns the saved result where an identical run is finished.

    `search_path`: the arguments that named additional config folders. `tell`: called with the run directory once it is
    known.
    """
    check_structure(to_dict(cfg, resolve=False))
    resolve_paths(cfg)
    apply_variant(cfg, overrides)
    if not cfg.task.requires:
        # `task=report` has no run directory, it writes into finished ones
        if cfg.resume not in (None, "auto"):
            raise ValueError(f"task={cfg.task.name} leaves no run: it cannot be resumed")
        task = checked_task(to_dict(cfg.task))
        return task() if ranks.this_rank().is_first else Result()
    if isinstance(cfg.resume, str) and cfg.resume != "auto":
        keep_recorded(cfg, Path(cfg.resume))
    run = RunConfig(cfg, choices, search_path)
    of_operations = resolve_steps(run, overrides)
    components = Components(run)
    if components.hardware.plan:
        return show_plan(components, [*of_operations, *filter(None, [describe_recipe(cfg)])])
    components.check_settings()
    components.check_tokenizer()
    check_training(components.hardware, cfg.task)
    if "stages" in run.requires:
        components.run_stage = stage_runner(components)
    taken = describe_taken(cfg, overrides)
    if not cfg.task.get("run_folder", True):
        return run_interactive(components, taken)
    with ranks.process_group(components.hardware.device) as rank:
        check_ranks(run)
        folder, finished = ranks.broadcast_from_rank0(lambda: resolve_run_dir(run))
        if tell is not None:
            tell(folder.path)
        if finished:
            return report_finished(run, folder)
        with ExitStack() as while_it_runs:
            if rank.is_first:
                while_it_runs.enter_context(folder.lock())
            if ranks.broadcast_from_rank0(lambda: folder.is_finished):  # finished by the previous holder of the lock
                return report_finished(run, folder)
            if rank.is_first:
                while_it_runs.enter_context(folder.remove_if_refused())
                folder.start(
                    run.recorded_config, record_overrides(overrides, cfg), run.input_hashes, run.subject,
                    run.search_path, precision=components.hardware.precision,
                )  # fmt: skip
                files.remove_parts(folder.path)
                files.remove_parts(components.cache_dir, "*/.*.part")
                while_it_runs.enter_context(log_file(folder.path / "log.txt"))
            ranks.barrier()  # the other ranks may read the directory from here on
            components.run_dir = folder.path
            components.hardware.warn_of_rounding()
            trains = not run.requires.isdisjoint({"network", "stages"})  # its weights
            device = describe_device(components.hardware, trains=trains) if run.computes else ""
            where = ", ".join(filter(None, (f"in {folder.path}", device)))
            log.info("%s", describe_run(run, f", {where}", taken))
            for line in (*of_operations, *list_precision_notes(components.hardware, trains=run.trains)):
                log.info("%s", line)
            while_it_runs.enter_context(components.hardware.kernel_cache())
            try:
                return run_and_report(components)
            except StoppedError as error:
                log.warning("%s; continue with `%s`", error, resume_command(folder.path, run.search_path, overrides))
                raise


def report_finished(run: RunConfig, folder: RunFolder) -> Result:
    """The saved result of a finished run; logs its table, after its page and new loggers were seen to."""
    if ranks.this_rank().is_first:
        complete_finished(folder.path, run.config.get("logger"))
    finished = read_finished(folder.path)
    seconds, published = finished.record["seconds"], run.config["published"]
    table = closing_table(finished.result, folder.path, seconds, published=published)
    log.info("%s is finished; rerun=true repeats it\n%s", folder.path, table)
    return finished.result


def describe_run(run: RunConfig, where: str = "", taken: str = "") -> str:
    """The run in a line: task, model, data, objective, steps and batch size, `where`, what is `taken`, its recipe."""
    if "finished_runs" in run.requires:
        return run.task + where
    task = run.config["task"]
    subject = f"{run.task}: {run.model_name} on {run.data_name}, {run.objective_settings['name']}"
    if "steps" in task and isinstance(task.get("batch_size"), int):
        subject += f", {task['steps']:,} steps of {task['batch_size']:,} images"
    return "; ".join(filter(None, (subject + where, taken, describe_recipe(run.cfg))))


def show_plan(components: Components, lines: Sequence[str] = ()) -> Result:
    """Logs the memory and time that a training run would take, from its settings alone; builds and trains nothing.

    `lines`: of text, logged before it.

    Raises:
        ValueError: a task that trains no network.
    """
    run, task = components.run, components.run.cfg.task
    if "steps" not in task or run.requires.isdisjoint({"network", "tokenizer"}):
        hint = ": plan its pretraining, task=pretrain with the same model and data" if run.task == "pipeline" else ""
        raise ValueError(f"trainer.plan=true is for tasks that train a network, not task={run.task}{hint}")
    of_run = {"batch_size": task.batch_size, "steps": task.steps}
    if "tokenizer" in run.requires:
        side = task.crop or run.cfg.data.resolution
        rows = plan_tokenizer(components.hardware, components.vqvae_settings, side=side, **of_run)
    else:
        rows = plan_run(
            components.hardware, components.planned_network, **of_run, optimizer=task.get("optimizer", "adam"),
            has_average=task.get("ema") is not None,
        )  # fmt: skip
    table = align_columns([(f"{run.task} {run.model_name} on {run.data_name}", "planned"), *rows])
    log.info("%s", "\n".join([*lines, table]))
    return Result()


def run_interactive(components: Components, taken: str = "") -> Result:
    """Runs a task without a run directory (`task=demo`) until the user ends it. `taken`: as of `describe_run`.

    Raises:
        ValueError: `resume=`, `rerun=true`, a sweep, or several processes.
    """
    run = components.run
    if run.cfg.rerun or run.cfg.resume is not None or launcher.RUN_DIR_FILE in os.environ:
        raise ValueError(f"task={run.task} leaves no run: it cannot be resumed, repeated (rerun=true) or swept over")
    hardware = components.hardware
    if hardware.rank.count > 1:
        raise ValueError(f"task={run.task} runs in one process: trainer.devices=1, got {hardware.rank.count}")
    hardware.warn_of_rounding()
    log.info("%s", describe_run(run, "".join(f", {device}" for device in [describe_device(hardware)] if device), taken))
    for line in list_precision_notes(hardware, trains=False):
        log.info("%s", line)
    with hardware.kernel_cache():
        components.run_dir = Path(run.cfg.paths.runs) / run.name
        return prepare_task(components)(components)


def check_ranks(run: RunConfig) -> None:
    """Raises ValueError unless all ranks have the same settings, input files and library versions."""
    settings = {key: json.dumps(value, sort_keys=True, default=str) for key, value in run.config.items()}
    ranks.check_agree("settings", settings)
    ranks.check_agree("files", run.input_hashes)
    local = environment()
    keys = {commit for commit in ranks.all_gather_object(local["commit"]) if commit != "unknown"}
    ranks.check_agree("versions", {**local["versions"], "commit": local["commit"] if len(keys) > 1 else "the same"})
