"""What each head of a network attends to: its softmax weights, their distance on the grid and their entropy.

Backends never hold these weights, so they are computed here from the network's own queries and keys.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.model.attention import split_heads
from igpt.model.block import Attention
from igpt.model.gpt import GPT
from igpt.model.patterns import TokenLayout

MOST_WEIGHTS = 1 << 24  # weights in memory at a time


@dataclass(frozen=True)
class AttentionMap:
    """The attention of one block over a batch of images, for the queries that are asked for."""

    attention: Attention
    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, H, T, D)

    def visible_keys(self, queries: Tensor) -> Tensor:
        """The keys that these queries see: (Q,) → (Q, T) bool."""
        if self.attention.mask is not None:
            return self.attention.mask.pattern.select_rows(queries)
        keys = torch.arange(self.k.shape[2], device=queries.device)
        return keys <= queries[:, None] if self.attention.causal else (keys >= 0).expand(len(queries), -1)

    def weights(self, queries: Tensor) -> Tensor:
        """Softmax weights of these queries over all keys: (Q,) → (B, H, Q, T) float32, 0 where a key is not seen."""
        attention = self.attention
        with torch.autocast(self.q.device.type, enabled=False):
            scores = self.q[:, :, queries].float() @ self.k.float().mT / math.sqrt(attention.head_size)
            if attention.relative is not None and attention.offsets is not None:
                table = F.pad(attention.relative.flatten(1), (0, 1)).float()  # the start vector has no offset: 0
                scores = scores + table[:, attention.offsets.index[queries]]
            return scores.masked_fill(~self.visible_keys(queries), -math.inf).softmax(-1)


@torch.no_grad()
def iterate_attention(net: GPT, tokens: Tensor, visible: Tensor | None = None) -> Iterator[AttentionMap | None]:
    """The attention of each block in turn, on tokens (B, T); None for linear attention, which has no such weights."""
    h = net.drop(net.embed(tokens, visible))
    net.prepare_tables()
    first_value: Tensor | None = None
    for block in net.blocks:
        attention = block.attn
        if attention.is_linear:
            yield None
        else:
            qkv = attention.c_attn(block.ln_1(h))
            qkv = qkv if attention.is_plain else attention.transform(qkv, first_value, 0)[0]
            yield AttentionMap(attention, *split_heads(qkv, net.n_head)[:2])
        h, added, first_value = block(h, None, first_value)
        h = h + added


class AttentionSpread(NamedTuple):
    """How far and how widely each head attends, means over queries and images; NaN for linear attention."""

    distance: Tensor  # (L, H) from a query's token to the tokens that its keys carry, in cells, weighted by attention
    entropy: Tensor  # (L, H) of a query's weights, in nats
    start_share: Tensor  # (L, H) of the weights, on the start vector; 0 without one
    uniform_distance: Tensor  # (L,) `distance` if every visible key had the same weight
    uniform_entropy: Tensor  # (L,)


@torch.no_grad()
def measure_spread(net: GPT, tokens: Tensor, layout: TokenLayout, visible: Tensor | None = None) -> AttentionSpread:
    """Distance and entropy of the attention of every head on tokens (B, T), float64 on the CPU.

    Distances are Euclidean, between cells of the grid. The start vector lies nowhere: distances are averaged over the
    weights on tokens. Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", §4.5 and Figure 7.
    """
    n_head, t, device = net.n_head, net.n_ctx, tokens.device
    by_head = [torch.full((net.n_layer, n_head + 1), math.nan, dtype=torch.float64) for _ in range(3)]  # last: uniform
    n_query = max(1, MOST_WEIGHTS // (len(tokens) * n_head * t))
    for layer, attention in enumerate(iterate_attention(net, tokens, visible)):
        if attention is None:
            continue
        sums = torch.zeros(3, n_head + 1, dtype=torch.float64, device=device)  # distance, entropy, weight on tokens
        for queries in torch.split(torch.arange(t, device=device), n_query):
            seen = attention.visible_keys(queries)
            uniform = (seen / seen.sum(-1, keepdim=True))[None, None]  # (1, 1, Q, T)
            distances = measure_distances(layout, queries, causal=net.causal)
            heads = [(attention.weights(queries), slice(n_head)), (uniform, slice(n_head, n_head + 1))]
            for weights, which in heads:
                sums[0, which] += (weights.mean(0) * distances).sum((1, 2))
                sums[1, which] += torch.special.entr(weights).sum((2, 3)).mean(0)
                sums[2, which] += weights[..., int(net.causal) :].sum((2, 3)).mean(0)  # but for the start vector
        distance, entropy, on_tokens = sums.cpu()
        for table, of_heads in zip(by_head, (distance / on_tokens, entropy / t, 1 - on_tokens / t), strict=True):
            table[layer] = of_heads
    distance, entropy, start_share = by_head
    return AttentionSpread(distance[:, :-1], entropy[:, :-1], start_share[:, :-1], distance[:, -1], entropy[:, -1])


def measure_distances(layout: TokenLayout, queries: Tensor, *, causal: bool) -> Tensor:
    """Cells between the token of each query and the one that each key carries: (Q,) → (Q, T); 0: the start vector."""
    query, key = layout.locate(queries), layout.keys(causal, queries.device)
    down = query.row[:, None] - key.row
    across = query.column[:, None] // layout.channels - key.column // layout.channels
    return torch.hypot(down.float(), across.float()).masked_fill(key.place < 0, 0.0)
