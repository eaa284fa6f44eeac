"""A palette and what it costs: the error of showing images in its colours."""

import math
from collections.abc import Callable

import numpy as np
import torch

from igpt.data.source import check_split_name
from igpt.metric.result import Grid, Number, Result
from igpt.task.fit import Runner
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.kmeans import reconstruction_error


def check(*, split: str, count: int) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    check_split_name(split)
    if count < 1:
        raise ValueError(f"task.count must be at least 1, got {count}")


def run(*, runner: Runner, tokens: Callable[..., TokenDataModule], split: str, count: int) -> Result:
    """Leaves `palette.npy` in the released format; reports its error on up to `count` images of a split."""
    data = tokens()
    source = data.source.split(split)
    n = min(count, len(source))
    if n < 1:
        raise ValueError(f"the {split} split is empty: choose another with task.split")
    pixels = source.read(list(range(n)), [0] * n).pixels  # (N, R, R, 3)
    error = reconstruction_error(data.palette, pixels)
    path = runner.folder / "palette.npy"
    data.palette.save(path)
    numbers = {
        "palette/colours": Number(data.palette.k, "colours", 1),
        f"{split}/palette_mse": Number(error, "grey levels²", n),
    }
    if error > 0:
        numbers[f"{split}/palette_psnr"] = Number(10 * math.log10(255**2 / error), "dB", n)
    few = pixels[:8]
    in_colours = data.palette.decode(data.palette.encode(torch.from_numpy(few)))
    return Result(
        numbers=numbers,
        grids={"palette_images": Grid(np.stack([few, in_colours], axis=1), ("original", "in palette"))},
        palettes={"palette": data.palette.colours},
        files={"palette": path.relative_to(runner.folder)},
        provenance={"palette": data.palette.hash, "split": split},
    )
