"""`task=complete`: the model completes real images from their top rows, several times each."""

import logging

import numpy as np
import torch

from igpt.data.source import plain_pixels
from igpt.metric.result import Grid, Number, Result
from igpt.metric.share import wilson_interval
from igpt.model.generate import Sampling
from igpt.run.components import Components
from igpt.settings.generation import CompleteSettings
from igpt.task.sample import draw_images
from igpt.tokens.tokenizer import count_decided_rows, token_dtype
from igpt.utils import keyed

log = logging.getLogger(__name__)

HIDDEN = 127  # grey level of the hidden part


def prompt_rows(fraction: float, rows: int | None, side: int) -> int:
    """Number of rows of the prompt: `rows`, else `fraction` of the image rounded to rows.

    Raises:
        ValueError: `rows` exceeds the image height.
    """
    n_row = round(fraction * side) if rows is None else rows
    if n_row > side:
        raise ValueError(f"task.rows must lie in 0 … {side}, the image's height; got {rows}")
    return n_row


def run(components: Components, settings: CompleteSettings) -> Result:
    """One picture of `count` images of `split`, each with its prompt and `completions` completions."""
    weights, seed, split = components.trained_weights, components.seed, settings.split
    count, completions = settings.count, settings.completions
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
    data = components.build_datamodule()
    side = data.tokenizer.side
    n_row = prompt_rows(settings.fraction, settings.rows, side)
    source = data.source.split(split)
    if count > len(source):
        raise ValueError(f"task.count={count} images asked for, the {split} split has {len(source)}")
    chosen = np.sort(keyed.generator(seed, "complete").permutation(len(source))[:count])
    pixels = torch.from_numpy(plain_pixels(source, chosen.tolist()))  # (N, R, R, 3)
    originals = data.encode(pixels)  # (N, T)
    given = data.tokenizer.encode_top(pixels, n_row)  # (N, T) of which `prompt_mask` tells the given ones

    image = torch.from_numpy(chosen).repeat_interleave(completions)  # (N·M,)
    which = torch.arange(completions).repeat(count)
    rng_keys = keyed.per_example_keys(keyed.per_example_keys(keyed.key(seed, "complete"), image), which)
    prompt_mask = data.tokenizer.known_tokens(n_row)  # (T,)
    warning = {}
    if (n_full_row := count_decided_rows(data.tokenizer, n_row)) < n_row:
        stay = f"the upper {n_full_row} of the {n_row} given rows stay as they are"
        warning["warning"] = f"{stay}: the others change with what is drawn below"
        log.warning("%s", warning["warning"])
    prompts = given.repeat_interleave(completions, 0)  # (N·M, T)
    with components.hardware.inference(weights.build_network, weights.load_into) as net:
        drawn = draw_images(
            net, sampling, rng_keys=rng_keys, batch_size=settings.batch_size, prompts=prompts, known=prompt_mask
        )
    quantised = data.decode(originals)
    shown = data.decode(given)
    shown[:, ~data.tokenizer.visible_pixels(prompt_mask).numpy()] = HIDDEN
    continued = data.decode(drawn).reshape(count, completions, side, side, 3)
    grid = np.concatenate([quantised[:, None], shown[:, None], continued], axis=1)
    titles = ("original", "given", *(f"completion {i + 1}" for i in range(completions)))
    cells = (count, completions, -1, data.tokenizer.grid.channels)  # a pixel, or a token that shows several
    is_given = prompt_mask.view(cells[2:]).all(-1)  # (R²,), or fewer
    agree = (drawn == originals.repeat_interleave(completions, 0)).view(cells).all(-1)[:, :, ~is_given].double()
    numbers = {}
    if agree.numel():
        share = float(agree.mean())
        interval = wilson_interval(share, count)  # completions of one image are no further images
        what = "pixels" if data.tokenizer.grid.rows == side else "tokens"
        numbers[f"complete/{what}_as_original"] = Number(share, "share", count, interval=interval)
    return Result(
        numbers=numbers,
        grids={"completions": Grid(grid, titles)},
        arrays={"completions": drawn.to(token_dtype(data.tokenizer.n_vocab)).numpy()},
        provenance={
            "weights": weights.sha256,
            "tokenizer": data.tokenizer.hash,
            "sampling": vars(sampling),
            "seed": seed,
            "split": split,
            "images": chosen.tolist(),
            "rows": n_row,
            **warning,
        },
    )
