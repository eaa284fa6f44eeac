"""`task=palette`: the quantisation error of a palette, the bits that it leaves out, and other palettes beside it."""

import logging
import math
from pathlib import Path

import numpy as np
import torch

from igpt.data.source import Source, Split, plain_pixels
from igpt.metric.result import Curve, Grid, Number, Result
from igpt.run.components import Components
from igpt.settings.reading import PaletteTaskSettings
from igpt.task.reconstruction_score import AMPLIFIED
from igpt.tokens.colour_remainder import ColourRemainder
from igpt.tokens.kmeans import colour_distances
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.utils import keyed

log = logging.getLogger(__name__)

OURS = "palette"
SHOWN = 8  # images
FURTHEST = 40  # grey levels: upper end of the curve


def run(components: Components, settings: PaletteTaskSettings) -> Result:
    """Writes `palette.npy` in the released format; returns the error of all palettes on `count` images.

    The bits that a palette leaves out are those of a distribution fitted to as many other images of the training split,
    and are not measured where it has none.
    """
    split, run_dir = settings.split, components.run_dir
    others = {file: Palette.load(Path(file)) for file in settings.compare_with}
    data = components.build_datamodule()
    if not isinstance(data.tokenizer, PaletteTokenizer):
        raise ValueError(
            f"task=palette looks at colours, this run's tokens are {data.tokenizer.describe()}: tokens=fitted"
        )
    run_palette = data.tokenizer.palette
    source = data.source.split(split)
    if not len(source):
        raise ValueError(f"the {split} split is empty: choose another with task.split")
    pixels = read_images(source, settings.count, components.seed)  # (N, R, R, 3)
    n = len(pixels)
    fitted_on = read_training_images(data.source, n if split == "train" else 0, settings.count, components.seed)
    if not len(fitted_on):
        log.warning("the bits that a palette leaves out are not measured: there are no training images to fit them to")
    path = run_dir / "palette.npy"
    if components.hardware.rank.is_first:
        run_palette.save(path)

    palettes = {OURS: run_palette} | name_palettes(others)
    numbers, curves = {}, {}
    shown: list[np.ndarray] = [pixels[:SHOWN]]
    titles = ["original"]
    for name, palette in palettes.items():
        distance = colour_distances(palette, pixels)  # (N, R, R), grey levels
        mse = float(np.mean(distance**2)) / 3
        numbers[f"{name}/colours"] = Number(palette.k, "colours", 1)
        numbers[f"{split}/{name}_mse"] = Number(mse, "grey levels²", n)
        exact = "exact"
        if mse > 0:
            psnr = numbers[f"{split}/{name}_psnr"] = Number(10 * math.log10(255**2 / mse), "dB", n)
            exact = f"PSNR {psnr.value:.1f} dB"
        if len(fitted_on):
            bits = ColourRemainder.fit(palette, fitted_on).bits(pixels).mean(axis=(1, 2))  # (N,), of each image
            stderr = float(np.std(bits, ddof=1)) / n**0.5 if n > 1 else None
            numbers[f"{split}/{name}_remainder"] = Number(float(bits.mean()), "bits/pixel", n, stderr)
        levels = np.arange(FURTHEST + 1.0)
        share = np.searchsorted(np.sort(distance, axis=None), levels, side="right") / distance.size
        curves[name] = Curve(
            levels.tolist(), share.tolist(), "distance from the original colour, grey levels", "share of pixels"
        )
        images = palette.decode(palette.encode(torch.from_numpy(pixels[:SHOWN])))
        shown.append(images)
        titles.append(f"{name}: {palette.k} colours, {exact}")
        if mse > 0:
            error = np.abs(images.astype(np.int64) - pixels[:SHOWN]) * AMPLIFIED
            shown.append(error.clip(max=255).astype(np.uint8))
            titles.append(f"its error, {AMPLIFIED} times as bright")
    return Result(
        numbers=numbers,
        curves=curves,
        grids={"palette_images": Grid(np.stack(shown), row_titles=tuple(titles))},
        palettes={name: palette.colours for name, palette in palettes.items()},
        files={"palette": path.relative_to(run_dir)},
        provenance={
            "palette": run_palette.hash,
            "beside": {name: p.hash for name, p in palettes.items()},
            "split": split,
        },
    )


def read_images(split: Split, count: int, seed: int, *, skip: int = 0) -> np.ndarray:
    """At most `count` images of a split, drawn by the seed after the first `skip`: (N, R, R, 3) uint8."""
    rows = np.sort(keyed.generator(seed, "palette images").permutation(len(split))[skip : skip + count])
    return plain_pixels(split, rows.tolist())


def read_training_images(source: Source, skip: int, count: int, seed: int) -> np.ndarray:
    """As `read_images` of the training split; (0, R, R, 3) where the source has no more, or none at all."""
    train = source.split("train")
    try:
        n = len(train)
    except ValueError as error:  # OpenAI's arrays, of which only the splits that are evaluated may be there
        log.warning("%s", error)
        n = 0
    if n <= skip:
        return np.empty((0, source.resolution, source.resolution, 3), dtype=np.uint8)
    return read_images(train, count, seed, skip=skip)


def name_palettes(of_files: dict[str, Palette]) -> dict[str, Palette]:
    """The palettes by file stem; a duplicate is prefixed with its folder, or numbered at the root."""
    names: dict[str, Palette] = {}
    for file, palette in of_files.items():
        path = Path(file).absolute().with_suffix("")
        name, parent, number = path.name, path.parent, 2
        while name in {*names, OURS}:
            name = f"{parent.name}_{name}" if parent.name else f"{path.name}_{number}"
            parent, number = parent.parent, number + (not parent.name)
        names[name] = palette
    return names
