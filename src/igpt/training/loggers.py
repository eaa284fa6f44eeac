"""Loggers: a CSV file and Weights & Biases for metrics during a run; W&B also for its result."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from pydantic import Field

from igpt.data.classes import label_classes
from igpt.distributed.launcher import SWEEP
from igpt.distributed.process_state import restore_environment
from igpt.metric.result import Result
from igpt.report.bystanders import Bystander
from igpt.report.figures import group_by_unit
from igpt.utils.files import resolve_below

STEPS = "optimiser step"  # x unit of curves that were logged during training
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


def guard(logger: Logger, name: object = None) -> Logger:
    """The logger itself, its methods replaced by ones whose errors are logged, once, and end no run.

    These are the methods that training calls, be it in Lightning or here. `name`: what failed, for the message.
    """
    bystander = Bystander(name or f"logger {type(logger).__name__}")
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
    logger = CSVLogger(folder, name="metrics", version=f"from_{about.first_step:07d}", flush_logs_every_n_steps=1)
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
    run_id = os.environ.get("WANDB_RUN_ID", about.run_id)
    logger = WandbLogger(
        name=about.run_id,
        id=run_id,
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


def show(result: Result, folder: Path) -> None:
    """Adds a result to the current W&B run, if any: numbers, pictures, curves over layers, confusion matrices.

    W&B errors are only logged: the result is in the run directory already.
    """
    if (run := _run()) is None:
        return
    import wandb as library

    with Bystander("W&B was not told all that was found"):
        for name, number in result.numbers.items():
            run.summary[name] = number.value
            if number.stderr is not None:
                run.summary[f"{name}_stderr"] = number.stderr
            for end, bound in zip(("low", "high"), number.confidence_interval or (), strict=False):
                run.summary[f"{name}_{end}"] = bound
        paths = {name: resolve_below(folder, path) for name, path in result.files.items() if path.suffix == ".png"}
        pictures = {name: str(path) for name, path in paths.items() if path is not None and path.is_file()}
        shown: dict[str, Any] = {f"pictures/{name}": library.Image(path) for name, path in pictures.items()}
        untrained = {name: curve for name, curve in result.curves.items() if curve.x_unit != STEPS}
        for (x_unit, y_unit), lines in group_by_unit(untrained, least=2).items():
            x, y = [curve.x for curve in lines.values()], [curve.y for curve in lines.values()]
            title = f"{y_unit} over {x_unit}"
            shown[f"curves/{title}"] = library.plot.line_series(x, y, keys=list(lines), title=title, xname=x_unit)
        for name, matrix in result.matrices.items():
            if len(matrix) <= MOST_CLASSES:
                axis = class_axis(len(matrix), result.class_names.get(name))
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


def class_axis(k: int, class_names: Sequence[str] | None) -> list[str]:
    """Unique axis labels of K classes, as `label_classes` has them."""
    return label_classes(k, class_names)


def close(failed: bool) -> None:
    """Finishes the W&B run of this process, if any, so that the next run starts its own."""
    if _run() is None:
        return
    with Bystander("the W&B run could not be closed"):
        sys.modules["wandb"].finish(exit_code=int(failed))


def _run() -> Any:
    """The W&B run of this process, or None."""
    return getattr(sys.modules.get("wandb"), "run", None)
