"""The picture of the loss by position, for the run directory and for loggers that take images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.fabric.loggers.logger import Logger

from igpt.report.bystanders import Bystander
from igpt.report.position_figure import position_figure
from igpt.training.loggers import save_picture

NAME = "loss_by_position"


def draw_loss_by_position(folder: Path, nats: np.ndarray, *, step: int, loggers: Sequence[Logger] = ()) -> Path | None:
    """Writes the mean nats of each cell (R, C) to `loss_by_position/step_….png` of the run directory; for loggers, too.

    Returns its place there; None if it could not be written.
    """
    path = Path(NAME, f"step_{step:07d}.png")
    with Bystander(folder / path) as bystander:
        position_figure(folder / path, nats)
        save_picture(loggers, NAME, folder / path, step)
    return None if bystander.error is not None else path
