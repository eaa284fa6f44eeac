"""Completes a finished run that is met again: its page, and loggers that it was run without."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igpt.report.bystanders import Bystander, describe_error
from igpt.report.closing_table import REPORT
from igpt.report.facts import read_names
from igpt.report.folder import RunFolder
from igpt.report.identity import format_run_name, identity
from igpt.report.page import write_page
from igpt.report.runs import RunRecord, read_run
from igpt.run.entries import logger_builder
from igpt.training import loggers
from igpt.training.loggers import RunInfo, trains
from igpt.utils import files

log = logging.getLogger(__name__)

SENT = "sent_to.json"  # in a run directory: the loggers that its result was sent to after its end


def complete_finished(folder: Path, requested: Mapping[str, Any] | None) -> None:
    """Sends a finished run's result to new loggers; if a kill left it without a page, to all, and writes the page.

    `requested`: the entries of `logger` asked for now. New are those that differ from the run's own and from those in
    SENT. Of a pipeline, its stages are completed. What fails is logged in a line: the result is there.
    """
    try:
        RunFolder(folder).check_links()
        run = read_run(folder)
    except ValueError as error:
        log.warning("%s cannot be read, neither page nor loggers are told: %s", folder, error)
        return
    for stage in run.stages:
        if stage.run is not None:
            complete_finished(stage.folder, requested)
    has_page = (folder / REPORT).is_file()  # the last that a run writes
    own, sent = run.config.get("logger") or {}, _read_sent(folder)
    for key, spec in (requested or {}).items():
        is_new = spec not in (own.get(key), sent.get(key))
        if spec is None or not (is_new or not has_page) or run.task == "pipeline":  # whose stages log
            continue
        if _send_result(run, key, spec, is_new=is_new):
            with Bystander(folder / SENT):
                files.write_json(folder / SENT, _read_sent(folder) | {key: spec})
    if not has_page:
        write_page(folder)


def _read_sent(folder: Path) -> dict[str, Any]:
    """The content of SENT; {} if it is missing or damaged."""
    try:
        sent = files.read_json(folder / SENT)
    except (ValueError, OSError):
        return {}
    return sent if isinstance(sent, dict) else {}


def _send_result(run: RunRecord, key: str, spec: Mapping[str, Any], *, is_new: bool) -> bool:
    """Sends config, numbers and pictures (W&B's) to a logger; to a new one also the curves over optimiser steps.

    Returns whether that succeeded; what fails is logged.
    """
    failed, started = True, []
    try:
        about = describe_finished(run, trains=is_new and trains(run.config["task"]))
        logger = logger_builder(spec, f"logger.{key}")(run.folder, about, run.config)
        if logger is None:  # of training only, and nothing was trained
            return False
        started.append(logger)
        for step, figures in sorted(list_figures(run).items()) if is_new else ():
            logger.log_metrics(figures, step=step)
        loggers.show(started, run.result, run.folder)
        failed = False
    except Exception as error:  # of any logger: the run has its result
        log.warning("%s is finished, and logger=%s was not told: %s", run.folder, key, describe_error(error))
        log.debug("traceback", exc_info=True)
    else:
        log.info("%s is finished; logger=%s was told what was found", run.folder, key)
    finally:
        loggers.close(started, failed)
    return not failed


def describe_finished(run: RunRecord, *, trains: bool) -> RunInfo:
    """The description of a finished run for loggers, with the id that it had or would have had there."""
    names, config = read_names(run), run.config
    digest = identity(config, run.begun.get("files_sha256", {}))
    parent = run.folder.absolute().parent
    return RunInfo(
        task=run.task,
        **names,
        run_id=f"{format_run_name(config['task'], names, config['seed'], digest)}-{run.begun.get('id', digest)}",
        first_step=0,
        trains=trains,
        pipeline=parent.name if (parent / "run.json").is_file() else None,
    )


def list_figures(run: RunRecord) -> dict[int, dict[str, float]]:
    """Optimiser step → the values of the curves that were logged during training."""
    figures: dict[int, dict[str, float]] = {}
    for name, curve in run.result.curves.items():
        if curve.x_unit == loggers.STEPS:
            for x, y in zip(curve.x, curve.y, strict=True):
                figures.setdefault(int(x), {})[name] = y
    return figures
