"""`task=sample`: unconditional samples from the model."""

import logging
import time
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from igpt.distributed import ranks
from igpt.metric.result import Grid, Number, Result
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.run.components import Components
from igpt.settings.generation import SampleSettings
from igpt.tokens.tokenizer import token_dtype
from igpt.utils import keyed

log = logging.getLogger(__name__)


def draw_images(
    net: GPT,
    sampling: Sampling,
    *,
    rng_keys: Tensor,
    batch_size: int,
    prompts: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Samples one image per key, `batch_size` at a time, with a progress bar: keys (N,) → tokens (N, T) on the CPU.

    Image i depends only on its key and its row of `prompts` (N, T), not on its batch or rank. Ranks divide the images
    among them, and each returns all.
    """
    device, rank = net.wte.device, ranks.this_rank()
    drawn = [torch.empty(0, net.n_ctx, dtype=torch.int64)]
    start = time.perf_counter()
    n_new = net.n_ctx if known is None else int((~known).sum())
    mine = torch.arange(rank.index, len(rng_keys), rank.count)
    total = len(mine) * n_new
    with tqdm(total=total, unit="token", unit_scale=True, desc="sampling", disable=None, leave=False) as bar:
        for rows in torch.split(mine, batch_size):
            uniforms = keyed.uniform(rng_keys[rows], net.n_ctx).to(device)  # (b, T)
            tokens = generate(
                net,
                uniforms,
                sampling,
                prompts=None if prompts is None else prompts[rows].to(device),
                known=known,
                on_token=partial(_update_bar, bar, len(rows)),
            )
            drawn.append(tokens.cpu())
    everyone = ranks.all_gather_object(torch.cat(drawn))
    tokens = torch.empty(len(rng_keys), net.n_ctx, dtype=torch.int64)
    for index, batch_keys in enumerate(everyone):
        tokens[index :: rank.count] = batch_keys
    seconds = time.perf_counter() - start
    log.info("drew %d images in %.1f s: %.0f tokens/s", len(rng_keys), seconds, len(rng_keys) * n_new / seconds)
    return tokens


def _update_bar(bar: "tqdm[None]", images: int, position: int) -> None:
    bar.update(images)


def run(components: Components, settings: SampleSettings) -> Result:
    """`count` samples as one picture, and their tokens in `samples_tokens.npy`."""
    weights, hardware, seed, count = components.trained_weights, components.hardware, components.seed, settings.count
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
    tokenizer = weights.tokenizer
    rng_keys = keyed.per_example_keys(keyed.key(seed, "sample"), torch.arange(count))
    with hardware.inference(weights.build_network, weights.load_into) as net:
        start = time.perf_counter()
        tokens = draw_images(net, sampling, rng_keys=rng_keys, batch_size=settings.batch_size)
        seconds = time.perf_counter() - start
    return Result(
        numbers={"sample/pixels_per_s": Number(count * tokenizer.side**2 / seconds, "pixels/s", count)},
        grids={"samples": Grid.square(tokenizer.decode(tokens))},
        arrays={"samples": tokens.to(token_dtype(tokenizer.n_vocab)).numpy()},
        provenance={"weights": weights.sha256, "tokenizer": tokenizer.hash, "sampling": vars(sampling), "seed": seed},
    )
