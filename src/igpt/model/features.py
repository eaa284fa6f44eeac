"""Pooled features of every layer in one forward pass."""

from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from igpt.model.gpt import GPT
from igpt.settings.fields import Norm

NORMS = get_args(Norm)


def layer_features(
    net: GPT,
    tokens: Tensor,
    visible: Tensor | None = None,
    *,
    norm: str = "ln_1",
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Hidden states of all L + 1 layers, averaged over positions: tokens (B, T) → (L + 1, B, C).

    Layer 0 is the embedding, layer l the residual stream after l blocks. With `ln_1`, layer l < L goes through `ln_1`
    of the next block, and layer L through `ln_f` (Chen et al. 2020, §3.2). With `raw`, no norm is applied (the first
    author's answer in openai/image-gpt#12). Only one layer's stream is in memory at a time. `layers`: only those, in
    ascending order; blocks above the last of them are not computed.

    Raises:
        ValueError: another `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    wanted = range(net.n_layer + 1) if layers is None else layers
    return net.pool_layers(tokens, visible, layers=wanted, last=max(wanted), normed=norm == "ln_1")
