"""Completions: the top of real images is given, the model continues it, several times."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from igpt import keyed
from igpt.checkpoint.native import Weights
from igpt.data.source import check_split_name, plain_pixels
from igpt.metric.result import Grid, Number, Result
from igpt.model.generate import Sampling
from igpt.task.fit import Runner
from igpt.task.sample import check as check_sampling
from igpt.task.sample import draw
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.tokenizer import token_dtype, whole_rows

log = logging.getLogger(__name__)

HIDDEN = 127  # grey of the part that was not given


def prompt_rows(fraction: float, rows: int | None, side: int) -> int:
    """How many rows are given: `rows` when stated, else `fraction` of the image in whole rows.

    Raises:
        ValueError: a fraction outside [0, 1], or more rows than the image has.
    """
    if rows is None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"task.fraction must lie in [0, 1], got {fraction}")
        rows = round(fraction * side)
    if not 0 <= rows <= side:
        raise ValueError(f"task.rows must lie in 0 … {side}, the image's height; got {rows}")
    return rows


def check(*, split: str, completions: int, fraction: float, rows: int | None, **settings: Any) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    check_split_name(split)
    if completions < 1:
        raise ValueError(f"task.completions must be at least 1, got {completions}")
    prompt_rows(fraction, rows, side=rows or 1)  # the image's height is not known yet
    check_sampling(**settings)


def run(
    *,
    runner: Runner,
    weights: Weights,
    tokens: Callable[..., TokenDataModule],
    seed: int,
    split: str,
    count: int,
    completions: int,
    fraction: float,
    rows: int | None,
    batch_size: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Result:
    """Each of `count` images of `split` beside what was given and `completions` continuations, as one picture."""
    sampling = Sampling(temperature, top_k, top_p)
    data = tokens()
    side = data.tokenizer.side
    n_row = prompt_rows(fraction, rows, side)
    source = data.source.split(split)
    if count > len(source):
        raise ValueError(f"task.count={count} images asked for, the {split} split has {len(source)}")
    chosen = np.sort(keyed.generator(seed, "complete").permutation(len(source))[:count])
    pixels = plain_pixels(source, chosen.tolist())  # (N, R, R, 3)
    originals = data.encode(torch.from_numpy(pixels))  # (N, T)

    image = torch.from_numpy(chosen).repeat_interleave(completions)  # (N·M,)
    which = torch.arange(completions).repeat(count)
    keys = keyed.item_keys(keyed.item_keys(keyed.key(seed, "complete"), image), which)
    known = data.tokenizer.known_tokens(n_row)  # (T,)
    if (whole := whole_rows(data.tokenizer, n_row)) < n_row:
        log.warning("%d of the %d rows are given: a token shows several rows at once", whole, n_row)
    given = originals.repeat_interleave(completions, 0)  # (N·M, T)
    with runner.machine.inference(weights.net()) as net:
        drawn = draw(net, sampling, keys=keys, batch_size=batch_size, given=given, known=known)
    quantised = data.decode(originals)
    shown = quantised.copy()
    shown[:, ~data.tokenizer.visible_pixels(known).numpy()] = HIDDEN
    continued = data.decode(drawn).reshape(count, completions, side, side, 3)
    grid = np.concatenate([quantised[:, None], shown[:, None], continued], axis=1)
    titles = ("original", "given", *(f"completion {i + 1}" for i in range(completions)))
    agree = (drawn == given)[:, ~known].double()
    numbers = {}
    if agree.numel():
        numbers["complete/pixels_as_original"] = Number(float(agree.mean()), "share", count * completions)
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
        },
    )
