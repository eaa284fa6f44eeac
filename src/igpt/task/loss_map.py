"""Where a network is surprised: its loss at every pixel of some images, whose mean is their loss."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from igpt.metric.result import Grid
from igpt.model.gpt import GPT
from igpt.objective.base import Objective, hidden_nats
from igpt.task.heat_maps import draw_heat, spread_over_pixels
from igpt.tokens.batches import Batch
from igpt.tokens.tokenizer import Tokenizer
from igpt.utils import keyed

PAIRS = 4  # images in a row of the picture, each beside its loss
BRIGHTEST = 0.995  # quantile of the shown losses that has the brightest colour


class TokenLosses(NamedTuple):
    """The loss of the tokens of some images."""

    nats: Tensor  # (N, T) of each token, the mean over the masks that hid it; NaN where none did
    per_image: Tensor  # (N,) nats per predicted token, as the objective has it; the mean over masks


@torch.inference_mode()
def measure_token_losses(net: GPT, objective: Objective, batch: Batch, *, eval_masks: int) -> TokenLosses:
    """The loss of every token of a batch, float64 on the CPU.

    An objective without masks (AR) predicts all tokens at once: the mean of `nats` over an image is its `per_image`.
    One with masks (BERT) predicts those hidden by each of `eval_masks` masks; the first is that of `task=evaluate`.
    """
    tokens = batch.tokens
    total, count = (torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device) for _ in range(2))
    per_image = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    masks = 1 if objective.causal else eval_masks
    for mask in range(masks):
        rng_keys = keyed.fold_in(batch.rng_keys, 100 + mask) if mask else batch.rng_keys
        visible = objective.visible_mask(tokens, rng_keys)
        nats = net(tokens, visible, partial(hidden_nats, net, tokens=tokens))  # (B, T)
        hidden = torch.ones_like(total) if visible is None else (~visible).double()
        total, count = total + nats * hidden, count + hidden
        per_image += objective.average_tokens(nats, visible).double()
    return TokenLosses((total / count).cpu(), (per_image / masks).cpu())  # 0 / 0: NaN


def draw_losses(images: np.ndarray, losses: TokenLosses, tokenizer: Tokenizer, names: Sequence[str]) -> Grid:
    """Images (N, R, R, 3), each beside its loss per pixel as heat, all on one scale: black is 0.

    `names`: the captions of the images; that of the heat is the image's loss.
    """
    heat = spread_over_pixels(losses.nats, tokenizer)  # (N, R, R)
    most = float(np.nanquantile(heat, BRIGHTEST))
    pairs = np.stack([images, draw_heat(heat, most=most)], axis=1)  # (N, 2, R, R, 3)
    n, columns = len(pairs), min(PAIRS, len(pairs))
    filled = np.full((-(-n // columns) * columns, *pairs.shape[1:]), 255, dtype=np.uint8)
    filled[:n] = pairs
    grid = filled.reshape(-1, 2 * columns, *images.shape[1:])
    captions = [text for name, nats in zip(names, losses.per_image, strict=True) for text in (name, f"{nats:.2f} nats")]
    return Grid(grid, ("image", f"0 to {most:.1f} nats") * columns, captions=tuple(captions))
