"""Where metrics go while a run goes on: a CSV file, Weights & Biases; and, at its end, what it found."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from pydantic import Field

from igpt.data.classes import format_class_name
from igpt.distributed.launcher import SWEEP
from igpt.distributed.process_state import kept_environment
from igpt.metric.result import Curve, Result
from igpt.report.figures import by_units

log = logging.getLogger(__name__)

STEPS = "optimiser step"  # curves over it were logged while the run went on
MOST_CLASSES = 100  # of which a confusion matrix is shown cell by cell


@dataclass(frozen=True)
class About:
    """What a run is, as loggers are told."""

    task: str
    model: str
    data: str
    objective: str
    run_id: str  # its folder's name and own number: the same when it is resumed, another when it is repeated
    first_step: int  # that this process takes
    trains: bool  # and so has figures to log on the way
    pipeline: str | None  # of which it is a stage


def csv(folder: Path, about: About) -> Logger | None:
    """`metrics/from_0000000/metrics.csv`: one file for each step a run went on from, written row by row."""
    if not about.trains:
        return None
    return CSVLogger(folder, name="metrics", version=f"from_{about.first_step:07d}", flush_logs_every_n_steps=1)


def wandb(
    folder: Path,
    about: About,
    *,
    project: str,
    entity: str | None,
    offline: bool,
    group: str | None,
    tags: list[str],
    timeout: Annotated[float, Field(ge=1, le=86400)],  # seconds
) -> Logger:
    """A W&B run of the run's own id, so that a resumed run goes on in it and a repeated one does not.

    Its group is `group`, or the sweep or the pipeline it belongs to. A W&B agent's own id is kept.

    Raises:
        ValueError: W&B is out of reach, or does not let this account write.
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
        with kept_environment("WANDB_MODE"):  # Lightning says offline by it, which would hold for later runs, too
            _ = logger.experiment  # begins it
    except library.errors.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"logger=wandb: {reason}. Log in (`wandb login`, or WANDB_API_KEY) and check logger.wandb.entity and "
            "project; or logger.wandb.offline=true, which keeps the run in its folder until `wandb sync`"
        ) from error
    return logger


def show(result: Result, folder: Path) -> None:
    """Adds what a run has found to its W&B run, if it has one: numbers, pictures, curves over layers, confusion.

    A W&B that fails now ends no run: everything is in the run's folder.
    """
    if (run := _run()) is None:
        return
    import wandb as library

    try:
        for name, number in result.numbers.items():
            run.summary[name] = number.value
            if number.stderr is not None:
                run.summary[f"{name}_stderr"] = number.stderr
        pictures = {name: folder / path for name, path in result.files.items() if path.suffix == ".png"}
        shown: dict[str, Any] = {f"pictures/{name}": library.Image(str(path)) for name, path in pictures.items()}
        shown |= {f"curves/{unit}": chart for unit, chart in _charts(result.curves).items()}
        for name, matrix in result.matrices.items():
            if len(matrix) <= MOST_CLASSES:
                axis = axis_of(len(matrix), result.class_names.get(name))
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
    except Exception as error:  # whatever it is: the run has ended well
        log.warning("W&B was not told all that was found: %s", error)


def axis_of(k: int, class_names: Sequence[str] | None) -> Sequence[str | int]:
    """What K classes are called on a chart that tells them apart by that alone: their names, or else their numbers."""
    if class_names is None:
        return range(k)
    shown = [format_class_name(name) for name in class_names]
    count = Counter(shown)
    return [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(shown)]


def _charts(curves: dict[str, Curve]) -> dict[str, Any]:
    """One chart for each pair of units, of the curves that are not over the steps of training."""
    import wandb as library

    plots = by_units({name: curve for name, curve in curves.items() if curve.x_unit != STEPS}, least=2)
    return {
        f"{y_unit} over {x_unit}": library.plot.line_series(
            [curve.x for curve in lines.values()],
            [curve.y for curve in lines.values()],
            keys=list(lines),
            title=f"{y_unit} over {x_unit}",
            xname=x_unit,
        )
        for (x_unit, y_unit), lines in plots.items()
    }


def close(failed: bool) -> None:
    """Ends the W&B run of this process, if there is one, so that the next one starts its own."""
    if _run() is None:
        return
    try:
        sys.modules["wandb"].finish(exit_code=int(failed))
    except Exception as error:  # it must not take the place of the run's own
        log.warning("the W&B run could not be closed: %s", error)


def _run() -> Any:
    """The W&B run of this process, or None."""
    return getattr(sys.modules.get("wandb"), "run", None)
