"""-log p of tokens from hidden states, without the logits of all tokens in memory at once."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 25  # logits in memory at a time: 128 MB in float32
LARGE_VOCABULARY = 1024  # tokens; up to it all logits are computed at once


def is_large(n_token: int, n_vocab: int) -> bool:
    """Whether the logits of this many tokens are computed in chunks."""
    return n_vocab > LARGE_VOCABULARY and n_token * n_vocab > CHUNK


def chunked_nats(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    """-log p of every token: hidden (B, T, C), head (V, C), tokens (B, T) → (B, T) float32.

    As `F.cross_entropy` of `F.linear(hidden, head)`, under autocast in its dtype; the backward pass computes the logits
    again, and sums the gradient of the head over chunks in float32.
    """
    nats: Tensor = _ChunkedNats.apply(hidden.flatten(0, 1), head, tokens.flatten())  # type: ignore[no-untyped-call]
    return nats.view(tokens.shape)


class _ChunkedNats(torch.autograd.Function):
    """PyTorch's own `linear_cross_entropy` in chunks gives bfloat16 losses of bfloat16 operands: 2 to 3 digits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            weight = head.to(ctx.dtype)
            for part in _split(len(hidden), len(head)):
                logits = F.linear(hidden[part].to(ctx.dtype), weight).float()
                nats[part] = F.cross_entropy(logits, tokens[part], reduction="none")
        ctx.save_for_backward(hidden, head, tokens)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nats: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, head, tokens = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(ctx.dtype)
            for part in _split(len(hidden), len(head)):
                x = hidden[part].to(ctx.dtype)
                d_logits = F.linear(x, weight).float().softmax(-1)  # (n, V): p, less 1 at the token, times d_nats
                d_logits.scatter_add_(1, tokens[part, None], d_logits.new_full((len(x), 1), -1.0))
                scaled = d_logits.mul_(d_nats[part, None]).to(ctx.dtype)
                if d_hidden is not None:
                    d_hidden[part] = scaled @ weight
                if d_head is not None:
                    d_head += scaled.mT @ x
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None


def _split(n_token: int, n_vocab: int) -> Iterator[slice]:
    """Consecutive parts of `n_token` tokens with at most `CHUNK` logits."""
    size = max(1, CHUNK // n_vocab)
    return (slice(start, min(start + size, n_token)) for start in range(0, n_token, size))
