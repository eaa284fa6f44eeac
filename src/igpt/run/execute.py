"""Executes a task in its run directory, writes its result and page, and logs the result; also a pipeline's stages."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

from omegaconf import DictConfig

from igpt.distributed import ranks
from igpt.distributed.signals import StoppedError
from igpt.metric.result import Result
from igpt.report.closing_table import closing_table
from igpt.report.folder import RunFolder
from igpt.report.identity import DEBUG
from igpt.report.page import write_page
from igpt.report.runs import read_finished, summarize_metadata
from igpt.run.components import Components
from igpt.run.finished import complete_finished
from igpt.run.operations import resolve_steps
from igpt.run.pipeline_stages import stage_configs
from igpt.run.recipes import CHECKPOINT, describe_recipe, keep_recorded
from igpt.run.run_config import RunConfig
from igpt.run.targets import checked_task
from igpt.training import loggers
from igpt.training.hardware import HardwareConfig
from igpt.training.hardware_checks import check_small_network

log = logging.getLogger(__name__)


def run_and_report(components: Components) -> Result:
    """Executes the task; writes the result and the page into the run directory, logs the closing table."""
    run, folder = components.run, RunFolder(components.run_dir)
    start = time.perf_counter()
    with ExitStack() as at_end:
        at_end.push(lambda kind, *_: loggers.close(components.loggers, failed=kind not in (None, StoppedError)))
        task = prepare_task(components)
        if not run.trains:
            components.build_loggers()
        result = task(components)
        seconds = time.perf_counter() - start
        if (option := run.config.get(DEBUG)) and folder.path.parent.name == DEBUG:  # not of each stage of a pipeline
            result.provenance.setdefault("warning", f"debug={option}: a trial, its numbers count for nothing")
        if run.weights is not None:
            result.provenance["init"] = summarize_metadata(run.weights.metadata.to_dict())
        if components.hardware.rank.is_first:
            folder.finish(run.task, result, seconds=seconds)
            loggers.show(components.loggers, result, folder.path)
            write_page(folder.path)  # last: where it is, all is done
    ranks.barrier()  # the next stage of a pipeline reads this one's files
    table = closing_table(result, folder.path, seconds, published=run.config["published"])
    log.info("%s\n%s", run.task, table)
    return result


def prepare_task(components: Components) -> Callable[[Components], Result]:
    """The task, to be called with the components, after its settings and weights were checked."""
    task = checked_task(components.run.config["task"])
    components.check_weights()
    if "stages" in components.run.requires and not hasattr(components, "run_stage"):  # of a pipeline inside another
        resolve_steps(components.run)
        components.run_stage = stage_runner(components)
    return task


def check_training(hardware: HardwareConfig, task: DictConfig) -> None:
    """Raises ValueError when a task that trains a network cannot under these settings, or not with its batch size."""
    if "network" in task.requires:
        hardware.check_training()
    if "tokenizer" in task.requires:
        check_small_network(hardware)
    if ("network" in task.requires or "tokenizer" in task.requires) and isinstance(task.get("batch_size"), int):
        hardware.train_batch_layout(task.batch_size)


def stage_runner(pipeline: Components) -> Callable[..., tuple[Result, Path]]:
    """A function that runs one stage of a pipeline. All stages' settings are checked here, before the first starts.

    (name, folder=, init=, tokenizer=) → (result, folder); `tokenizer`: the run directory of the one trained before.

    Raises:
        ValueError: a task that cannot be a stage, an invalid setting, a stand-in run that differs from its stage.
    """
    stages = stage_configs(pipeline.run)
    has_tokenizer = False
    for stage in stages.values():
        check_training(pipeline.hardware, stage.cfg.task)
        if stage.is_independent:
            try:
                run = RunConfig(stage.cfg, stage.choices)
                components = Components(run)
                components.check_settings()
                if run.weights is not None and run.takes_from_weights("tokens"):
                    components.check_weights()
                if not has_tokenizer:
                    components.check_tokenizer()
            except ValueError as error:
                raise ValueError(f"task.stages.{stage.name}: {error}") from error
        has_tokenizer |= stage.trains_tokenizer

    def run_stage(
        name: str, *, folder: Path, init: str | list[str] | None, tokenizer: str | None
    ) -> tuple[Result, Path]:
        stage = stages[name]
        stage_dir = RunFolder(folder if stage.stand_in is None else stage.stand_in)
        if isinstance(init, list):
            stage.cfg.task.runs = init
        elif not stage.trains_tokenizer:
            stage.cfg.init = init
        if tokenizer is not None and stage.choices["tokens"] != CHECKPOINT and not stage.trains_tokenizer:
            stage.cfg.tokens.path = tokenizer
        keep_recorded(stage.cfg, stage_dir.path)
        components = Components(RunConfig(stage.cfg, stage.choices))
        components.run_dir = stage_dir.path
        if ranks.broadcast_from_rank0(lambda: stage_dir.is_finished):
            if stage.stand_in is not None:
                stage.check_stand_in_files(components.run.input_hashes)
            log.info("%s is finished", stage_dir.path)
            if components.hardware.rank.is_first:
                complete_finished(stage_dir.path, components.run.config.get("logger"))
            return read_finished(stage_dir.path).result, stage_dir.path
        with stage_dir.remove_if_refused() if components.hardware.rank.is_first else nullcontext():
            if components.hardware.rank.is_first:
                stage_dir.start(
                    components.run.recorded_config, None, components.run.input_hashes, components.run.subject,
                    precision=components.hardware.precision,
                )  # fmt: skip
            ranks.barrier()
            if recipe := describe_recipe(stage.cfg):
                log.info("stage %s: %s", name, recipe)
            return run_and_report(components), stage_dir.path

    return run_stage
