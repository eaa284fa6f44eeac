"""A palette and what it costs: the error of showing images in its colours, beside that of other palettes."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from igpt import keyed
from igpt.data.source import check_split_name, plain_pixels
from igpt.metric.result import Curve, Grid, Number, Result
from igpt.task.fit import Runner
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.kmeans import colour_distances
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer

OURS = "palette"
SHOWN = 8  # images
FURTHEST = 40  # grey levels: as far as the curve goes


def check(*, split: str, count: int, beside: list[str]) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    check_split_name(split)
    if count < 1:
        raise ValueError(f"task.count must be at least 1, got {count}")
    for path in beside:
        Palette.load(Path(path))


def run(
    *, runner: Runner, tokens: Callable[..., TokenDataModule], seed: int, split: str, count: int, beside: list[str]
) -> Result:
    """Leaves `palette.npy` in the released format; reports its error on `count` images, and that of others."""
    data = tokens()
    if not isinstance(data.tokenizer, PaletteTokenizer):
        raise ValueError(
            f"task=palette looks at colours, this run's tokens are {data.tokenizer.describe()}: tokens=fitted"
        )
    own = data.tokenizer.palette
    source = data.source.split(split)
    n = min(count, len(source))
    if n < 1:
        raise ValueError(f"the {split} split is empty: choose another with task.split")
    rows = np.sort(keyed.generator(seed, "palette images").permutation(len(source))[:n])
    pixels = plain_pixels(source, rows.tolist())  # (N, R, R, 3)
    path = runner.folder / "palette.npy"
    if runner.machine.rank.first:
        own.save(path)

    palettes = {OURS: own} | named({file: Palette.load(Path(file)) for file in beside})
    numbers, curves, columns = {}, {}, [pixels[:SHOWN]]
    for name, palette in palettes.items():
        distance = colour_distances(palette, pixels)  # (N, R, R), grey levels
        mse = float(np.mean(distance**2)) / 3
        numbers[f"{name}/colours"] = Number(palette.k, "colours", 1)
        numbers[f"{split}/{name}_mse"] = Number(mse, "grey levels²", n)
        if mse > 0:
            numbers[f"{split}/{name}_psnr"] = Number(10 * math.log10(255**2 / mse), "dB", n)
        levels = np.arange(FURTHEST + 1.0)
        share = np.searchsorted(np.sort(distance, axis=None), levels, side="right") / distance.size
        curves[name] = Curve(
            levels.tolist(), share.tolist(), "distance from the original colour, grey levels", "share of pixels"
        )
        columns.append(palette.decode(palette.encode(torch.from_numpy(pixels[:SHOWN]))))
    return Result(
        numbers=numbers,
        curves=curves,
        grids={"palette_images": Grid(np.stack(columns, axis=1), ("original", *palettes))},
        palettes={name: palette.colours for name, palette in palettes.items()},
        files={"palette": path.relative_to(runner.folder)},
        provenance={
            "palette": own.hash,
            "beside": {name: p.hash for name, p in palettes.items()},
            "split": split,
        },
    )


def named(of_files: dict[str, Palette]) -> dict[str, Palette]:
    """The same by the names of the files: with their folder's name or a number where the name is taken."""
    names: dict[str, Palette] = {}
    for file, palette in of_files.items():
        path = Path(file).absolute().with_suffix("")
        name, parent, number = path.name, path.parent, 2
        while name in {*names, OURS}:
            name = f"{parent.name}_{name}" if parent.name else f"{path.name}_{number}"
            parent, number = parent.parent, number + (not parent.name)
        names[name] = palette
    return names
