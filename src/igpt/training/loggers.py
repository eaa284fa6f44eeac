"""Loggers of a run (a CSV file, W&B, TensorBoard, any other of Lightning), and what they are sent of its result."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from lightning.fabric.loggers.logger import Logger  # of which all are, those of lightning.pytorch among them
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from pydantic import Field

from igpt.data.classes import label_classes
from igpt.distributed.launcher import SWEEP
from igpt.distributed.process_state import restore_environment
from igpt.metric.result import Result
from igpt.report.bystanders import Bystander
from igpt.report.figures import group_by_unit
from igpt.utils.files import resolve_below

STEPS = "optimiser step"  # x unit of curves that were logged during training
# keys of a config that TensorBoard's table of hyper-parameters leaves out
NO_HYPERPARAMETERS = (
    "_target_",
    "_partial_",
    "requires",
    "callbacks",
    "logger",
    "paths",
    "published",
    "rerun",
    "resume",
)
MOST_CLASSES = 100  # largest confusion matrix shown cell by cell


@dataclass(frozen=True)
class RunInfo:
    """Description of a run for loggers."""

    task: str
    model: str
    data: str
    objective: str
    run_id: str  # run directory name and a number: unchanged by a resume, new for a repetition
    first_step: int  # of this process
    trains: bool  # has metrics during the run
    pipeline: str | None  # the pipeline that it is a stage of


class StepTable(CSVLogger):
    """`metrics.csv` of a training: what was logged at its steps, not its result, which `result.json` has."""


def guard(logger: Logger, name: object = None) -> Logger:
    """The logger itself, its methods replaced by ones whose errors are logged, once, and end no run.

    These are the methods that training calls, be it in Lightning or here. TensorBoard's gets the `log_image` that W&B's
    has. `name`: what failed, for the message.
    """
    bystander = Bystander(name or f"logger {type(logger).__name__}")
    if isinstance(logger, TensorBoardLogger) and not hasattr(logger, "log_image"):
        setattr(logger, "log_image", partial(_log_image_to_tensorboard, logger))  # noqa: B010  # no such attribute
    hooks = ("log_hyperparams", "log_graph", "log_metrics", "log_image", "after_save_checkpoint", "save", "finalize")
    for method in hooks:
        if hasattr(logger, method):
            setattr(logger, method, bystander.guard(getattr(logger, method)))
    return logger


def trains(task: Mapping[str, Any]) -> bool:
    """Whether a task of these settings takes optimiser steps."""
    return not {"network", "tokenizer"}.isdisjoint(task["requires"]) or task.get("solver") == "sgd"


def csv(folder: Path, about: RunInfo) -> Logger | None:
    """A CSV logger to `metrics/from_0000000/metrics.csv`: one file per start or resume; None if nothing trains.

    None, too, if its folder cannot be written, which is logged.
    """
    if not about.trains:
        return None
    logger = StepTable(folder, name="metrics", version=f"from_{about.first_step:07d}", flush_logs_every_n_steps=1)
    with Bystander(logger.log_dir):
        _ = logger.experiment  # makes the folder
        return guard(logger, f"{logger.log_dir}/metrics.csv")
    return None


def wandb(
    folder: Path,
    about: RunInfo,
    *,
    project: str,
    entity: str | None,
    offline: bool,
    group: str | None,
    tags: list[str],
    timeout: Annotated[float, Field(ge=1, le=86400)],  # seconds
) -> Logger:
    """A W&B logger with the run's id, so that a resumed run continues its W&B run and a repetition starts another.

    The group is `group`, else the sweep or pipeline. The id of a W&B agent (`WANDB_RUN_ID`) takes precedence.

    Raises:
        ValueError: W&B cannot be reached, or refuses write access.
    """
    import wandb as library

    settings = library.Settings(init_timeout=timeout, silent=True)
    if offline:
        settings.mode = "offline"
    logger = WandbLogger(
        name=about.run_id,
        id=_choose_wandb_id(about),
        project=project,
        entity=entity,
        offline=offline,
        save_dir=folder,
        resume="allow",
        group=group or os.environ.get(SWEEP) or about.pipeline,
        job_type=about.task,
        tags=[*dict.fromkeys([about.task, about.model, about.data, about.objective, *tags])],
        settings=settings,
    )
    try:
        with restore_environment("WANDB_MODE"):  # Lightning sets it when offline, which would affect later runs
            _ = logger.experiment  # starts the W&B run
    except library.errors.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"logger=wandb: {reason}. Log in (`wandb login`, or WANDB_API_KEY) and check logger.wandb.entity and "
            "project; or logger.wandb.offline=true, which keeps the run in its folder until `wandb sync`"
        ) from error
    return logger


def _choose_wandb_id(about: RunInfo) -> str:
    """The id of a W&B agent, which has created the run; else the run's own."""
    return os.environ.get("WANDB_RUN_ID", about.run_id)


def tensorboard(folder: Path, about: RunInfo) -> Logger:
    """A TensorBoard logger to `tensorboard/`, where a resumed run continues: `tensorboard --logdir runs` shows all.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        return TensorBoardLogger(**own_settings(TensorBoardLogger, {}, folder, about))
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs the package of that name: pip install tensorboard") from error


def own_settings(kind: type[Logger], given: Mapping[str, Any], folder: Path, about: RunInfo) -> dict[str, Any]:
    """Arguments of a class of loggers that a run knows and that are not `given`: where it writes, and its name there.

    TensorBoard and W&B continue the run that is resumed.
    """
    found: dict[str, Any] = {}
    if issubclass(kind, TensorBoardLogger):
        # it would import TensorFlow where that is installed, for seconds; its own stub writes the same files
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        is_elsewhere = "save_dir" in given
        found = {"version": about.run_id} if is_elsewhere else {"name": "tensorboard", "version": ""}
        # what a killed process logged after the step that this one resumes from is not shown
        found |= {"default_hp_metric": False, "purge_step": about.first_step + 1 if about.trains else None}
    elif issubclass(kind, WandbLogger):
        found = {"name": about.run_id, "id": _choose_wandb_id(about), "resume": "allow"}
    accepted = signature(kind).parameters
    places = dict.fromkeys(("save_dir", "root_dir", "folder"), folder)
    for name, value in {**places, "run_name": about.run_id, "about": about}.items():
        if name in accepted and accepted[name].default in (Parameter.empty, None, "."):
            found[name] = value
    return {name: value for name, value in found.items() if name not in given}


def save_picture(loggers: Iterable[Logger], name: str, path: Path, step: int) -> None:
    """Sends a PNG file to every logger that takes images, as the image `name` of an optimiser step."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [str(path)], step=step)


def show(loggers: Iterable[Logger], result: Result, folder: Path) -> None:
    """Adds a result to the loggers of its run: numbers, pictures, curves over layers, confusion matrices.

    W&B and TensorBoard show them in ways of their own, others as metrics and images. An error of a logger is only
    logged: the result is in the run directory already.
    """
    paths = {name: resolve_below(folder, path) for name, path in result.files.items() if path.suffix == ".png"}
    pictures = {name: path for name, path in paths.items() if path is not None and path.is_file()}
    for logger in loggers:
        with Bystander(f"logger {type(logger).__name__} was not told all that was found"):
            if isinstance(logger, WandbLogger):
                _show_in_wandb(logger.experiment, result, pictures)
            elif not isinstance(logger, StepTable):
                _show_as_metrics(logger, result, pictures)


def _show_as_metrics(logger: Logger, result: Result, pictures: Mapping[str, Path]) -> None:
    """Numbers at the last step, TensorBoard's as those of its hyper-parameters; curves with x, a layer, as step."""
    step = int(max((curve.x[-1] for curve in result.curves.values() if curve.x_unit == STEPS and curve.x), default=0))
    numbers = {name: number.value for name, number in result.numbers.items()}
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(_list_hyperparameters(dict(logger.hparams)), numbers, step)
    else:
        logger.log_metrics(numbers, step=step)
    logger.log_metrics(_list_bounds(result), step=step)
    for name, curve in result.curves.items():
        if curve.x_unit != STEPS and all(float(x).is_integer() for x in curve.x):
            key = f"{curve.y_unit} over {curve.x_unit}/{name.replace(', ', ' ')}"  # MLflow refuses commas
            for x, y in zip(curve.x, curve.y, strict=True):
                logger.log_metrics({key: y}, step=int(x))
    for name, path in pictures.items():
        save_picture([logger], f"pictures/{name}", path, step)


def _list_hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that a table of runs compares: no class names, and none that are null."""
    return {
        key: _list_hyperparameters(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None and key not in NO_HYPERPARAMETERS
    }


def _list_bounds(result: Result) -> dict[str, float]:
    """Standard errors and 95 % intervals of the numbers: `name_stderr`, `name_low`, `name_high`."""
    found = {}
    for name, number in result.numbers.items():
        if number.stderr is not None:
            found[f"{name}_stderr"] = number.stderr
        found |= {f"{name}_{end}": x for end, x in zip(("low", "high"), number.confidence_interval or (), strict=False)}
    return found


def _log_image_to_tensorboard(
    logger: TensorBoardLogger, key: str, images: Sequence[str], step: int | None = None
) -> None:
    for path in images:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        logger.experiment.add_image(key, pixels, step, dataformats="HWC")


def _show_in_wandb(run: Any, result: Result, pictures: Mapping[str, Path]) -> None:
    """Numbers as the summary of a W&B run; pictures, curves and confusion matrices (a cell each) as its media."""
    import wandb as library

    for name, number in result.numbers.items():
        run.summary[name] = number.value
    for name, bound in _list_bounds(result).items():
        run.summary[name] = bound
    shown: dict[str, Any] = {f"pictures/{name}": library.Image(str(path)) for name, path in pictures.items()}
    untrained = {name: curve for name, curve in result.curves.items() if curve.x_unit != STEPS}
    for (x_unit, y_unit), lines in group_by_unit(untrained, least=2).items():
        x, y = [curve.x for curve in lines.values()], [curve.y for curve in lines.values()]
        title = f"{y_unit} over {x_unit}"
        shown[f"curves/{title}"] = library.plot.line_series(x, y, keys=list(lines), title=title, xname=x_unit)
    for name, matrix in result.matrices.items():
        if len(matrix) <= MOST_CLASSES:
            axis = label_classes(len(matrix), result.class_names.get(name))
            rows = zip(axis, matrix.tolist(), strict=True)
            cells = [[row, column, n] for row, counts in rows for column, n in zip(axis, counts, strict=True)]
            shown[f"{name}_cells"] = library.plot_table(
                "wandb/confusion_matrix/v1",
                library.Table(["Actual", "Predicted", "nPredictions"], cells),
                {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
                {"title": name},
            )
    if shown:
        run.log(shown)


def close(loggers: Iterable[Logger], failed: bool) -> None:
    """Ends the run in every logger, and the W&B run of this process, so that the next run starts its own."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
    if getattr(library := sys.modules.get("wandb"), "run", None) is not None:
        with Bystander("the W&B run could not be closed"):
            library.finish(exit_code=int(failed))  # type: ignore[union-attr]  # it has a run
