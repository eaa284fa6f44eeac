"""What each head of a network attends to: maps over the image of some queries, and curves over depth."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from igpt.metric.result import Curve, Grid
from igpt.model.attention_maps import AttentionSpread, iterate_attention
from igpt.model.gpt import GPT
from igpt.model.patterns import TokenLayout
from igpt.task.heat_maps import draw_attention, find_token_pixels, locate_pixel, mark_query, spread_over_pixels
from igpt.tokens.tokenizer import Tokenizer

MOST_LAYERS, MOST_HEADS = 8, 4  # drawn unless others are asked for, evenly spread
MOST_LINES = 8  # heads with a curve each; of more the mean, the lowest and the highest


def choose_queries(queries: int | Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[int]:
    """Positions of the query tokens: of these pixels, or of so many on the diagonal, evenly spread.

    Raises:
        ValueError: a pixel outside of the image.
    """
    if isinstance(queries, int):
        places = [tokenizer.side * (i + 1) // (queries + 1) for i in range(queries)]
        queries = [(place, place) for place in places]
    return [locate_pixel(tokenizer, row, column) for row, column in queries]


def choose_numbers(chosen: Sequence[int] | None, n: int, *, most: int, setting: str) -> list[int]:
    """The numbers from 1 to `n` that are drawn: `chosen`, or at most `most`, evenly spread, the last one among them.

    Raises:
        ValueError: a number beyond `n`.
    """
    if chosen is None:
        return [n * (i + 1) // min(n, most) for i in range(min(n, most))]
    if too_large := [number for number in chosen if number > n]:
        raise ValueError(f"{setting}={list(chosen)}: the network has 1 … {n}, not {too_large[0]}")
    return list(chosen)


def describe_layout(tokenizer: Tokenizer) -> TokenLayout:
    """Where the tokens of an image lie."""
    return TokenLayout(*tokenizer.grid, None if tokenizer.order.is_raster else tokenizer.order.permutation)


@torch.inference_mode()
def draw_attention_maps(
    net: GPT,
    tokens: Tensor,
    images: np.ndarray,
    tokenizer: Tokenizer,
    *,
    visible: Tensor | None,
    queries: Sequence[int],
    layers: Sequence[int],
    heads: Sequence[int],
) -> Grid | None:
    """Attention of `queries` over images: a row for every image, query and head, a column for every layer (from 1).

    tokens (B, T), images (B, R, R, 3) uint8, `visible` (B, T) of a masked objective. The first column is the image with
    the query's cell in green. Layers of linear attention are left out; None if nothing is left.
    """
    positions = torch.tensor(queries, device=tokens.device)
    cells = [find_token_pixels(tokenizer, query) for query in queries]
    drawn = {}
    for layer, attention in enumerate(iterate_attention(net, tokens, visible), start=1):
        if attention is None or layer not in layers:
            continue
        weights = attention.weights(positions)[:, [head - 1 for head in heads]]  # (B, H, Q, T)
        heat = spread_over_pixels(_place_keys(weights, net.causal), tokenizer, add=True)
        seen = spread_over_pixels(_place_keys(attention.visible_keys(positions).float(), net.causal), tokenizer) > 0
        drawn[layer] = [
            draw_attention(image, heat[i, head, query], seen[query], cells[query])
            for i, image in enumerate(images)
            for query in range(len(queries))
            for head in range(len(heads))
        ]
    if not drawn:
        return None
    first = [mark_query(image, cell) for image in images for cell in cells for _ in heads]
    columns = [first, *drawn.values()]
    places = ["pixel {}, {}".format(*np.argwhere(cell)[0]) for cell in cells]  # its row and column, or a cell's first
    captions = [
        caption
        for place in places * len(images)
        for head in heads
        for caption in (place, *(f"layer {layer}, head {head}" for layer in drawn))
    ]
    return Grid(np.stack(columns, axis=1), ("query", *(f"layer {layer}" for layer in drawn)), captions=tuple(captions))


def _place_keys(of_keys: Tensor, causal: bool) -> Tensor:
    """Values of keys at the tokens that these carry: (…, T) → (…, T); the start vector has none, the last token 0."""
    return torch.cat([of_keys[..., 1:], torch.zeros_like(of_keys[..., :1])], dim=-1) if causal else of_keys


def list_spread_curves(spread: AttentionSpread, *, cell: int, causal: bool) -> dict[str, Curve]:
    """Curves over depth of each head's distance (in pixels, `cell` a side of a token), entropy, and start vector."""
    measures: dict[str, tuple[Tensor, str, Tensor | None]] = {
        "distance": (spread.distance * cell, "attention distance in pixels", spread.uniform_distance * cell),
        "entropy": (spread.entropy, "attention entropy in nats", spread.uniform_entropy),
    }
    if causal:
        measures["start"] = spread.start_share, "share of attention on the start vector", None
    curves: dict[str, Curve] = {}
    softmax = (~spread.distance[:, 0].isnan()).nonzero()[:, 0]
    x = [float(layer + 1) for layer in softmax]
    for name, (table, unit, uniform) in measures.items():
        by_head, n_head = table[softmax], table.shape[1]  # (L', H)
        if n_head <= MOST_LINES:
            lines = {f"{name}, head {head + 1}": by_head[:, head] for head in range(n_head)}
        else:
            lines = {
                f"{name}, mean of {n_head} heads": by_head.mean(1),
                f"{name}, lowest head": by_head.amin(1),
                f"{name}, highest head": by_head.amax(1),
            }
        if uniform is not None:
            lines[f"{name}, uniform attention"] = uniform[softmax]
        curves |= {key: Curve(x, y.tolist(), "layer", unit) for key, y in lines.items() if x}
    return curves
