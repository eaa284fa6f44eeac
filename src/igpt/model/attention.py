"""Softmax attention with four backends, equal but for rounding; `dispatch.attention_backend` picks one.

Sizes: B images, H heads, T queries, S keys, D the size of a head. Source: `model.py:attn`; its -1e10 for masked scores
and -inf give the same float32 softmax.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import flex_attention

from igpt.model import c_attention, dispatch
from igpt.model.sparse_mask import SparseMask


def self_attention(qkv: Tensor, n_head: int, *, causal: bool, backend: str = "auto") -> Tensor:
    """Softmax self-attention over all positions; with `causal`, each sees itself and earlier ones only.

    qkv (B, T, 3C): queries, keys, values, each with its heads as contiguous blocks of D. → (B, T, C). `backend`: one of
    `dispatch.ATTENTION`; `native` is the C code on a CPU, the others as in `attend`.
    """
    b, t, width = qkv.shape
    if backend == "auto":
        backend = dispatch.attention_backend(qkv.device, qkv.dtype, t=t, causal=causal)
    if backend == "native":
        out: Tensor = c_attention.attend(qkv, n_head, causal)[0]
        return out
    q, k, v = split_heads(qkv, n_head)
    return attend(q, k, v, causal=causal, backend=backend).transpose(1, 2).reshape(b, t, width // 3)


def masked_attention(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool,
    mask: SparseMask | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`self_attention` through a sparse mask, with a bias (H, T, T) added to the scores, or with both: → (B, T, C).

    Without a mask, all positions are visible, or with `causal` itself and earlier ones. With one, its pattern says
    which, and qkv may be a prompt, the first positions only. Prompts and biases are computed by `sdpa` or `bmm`, whose
    masks are dense.
    """
    b, t, width = qkv.shape
    is_dense = mask is None or bias is not None or t < mask.pattern.layout.n_ctx
    head_size = width // 3 // n_head
    backend = dispatch.sparse_backend(backend, qkv.device, qkv.dtype, head_size=head_size, dense=is_dense)
    if mask is not None:
        mask.prepare(qkv.device, backend)
    out: Tensor
    if backend == "native":
        assert mask is not None
        assert mask.lanes is not None
        out = c_attention.attend_sparse(qkv, n_head, *mask.lanes)[0]
        return out
    q, k, v = split_heads(qkv, n_head)
    if backend == "flex":
        assert mask is not None
        out = _attend_flex(q, k, v, mask)
    elif backend == "blocks":
        assert mask is not None
        assert mask.blocks is not None
        flat = (part.reshape(b * n_head, t, head_size) for part in (q, k, v))
        out = _SparseBlocks.apply(*flat, *mask.blocks)  # type: ignore[no-untyped-call]  # PyTorch has no type
        out = out.view(b, n_head, t, head_size)
    else:
        visible = None
        if mask is not None:
            assert mask.dense is not None
            visible = mask.dense[:t, :t]
        elif causal:
            visible = torch.ones(t, t, dtype=torch.bool, device=qkv.device).tril()
        out = _attend_dense(q, k, v, visible, None if bias is None else bias[:, :t, :t].to(q.dtype), backend)
    return out.transpose(1, 2).reshape(b, t, width // 3)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: SparseMask) -> Tensor:
    """PyTorch's FlexAttention, which skips blocks of hidden keys where it is compiled: → (B, H, T, D)."""
    if q.device.type != "cuda" and torch.is_grad_enabled() and q.requires_grad:
        raise ValueError(f"attention_backend=flex has no backward pass on a {q.device.type}, only on CUDA: choose auto")
    compiled = q.device.type == "cuda" and not torch.compiler.is_compiling()
    attend: Any = _compile_flex() if compiled else flex_attention
    out: Tensor = attend(q, k, v, block_mask=mask.flex)
    return out


@functools.cache
def _compile_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, bias: Tensor | None, backend: str) -> Tensor:
    """Attention where `visible` (T, T) is True, with `bias` (H, T, T) added to the scores: → (B, H, T, D)."""
    if backend == "sdpa":
        if bias is None or visible is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible if bias is None else bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~visible, -math.inf))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    scores = scores if visible is None else scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """Queries, keys and values split into heads, as views: (B, T, 3C) → 3 × (B, H, T, D).

    Unbound before heads and positions change places, so that the backward pass joins their gradients in one copy.
    """
    b, t, width = qkv.shape
    parts = qkv.view(b, t, 3, n_head, width // 3 // n_head).unbind(2)  # 3 × (B, T, H, D)
    return tuple(part.transpose(1, 2) for part in parts)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, backend: str = "auto", bias: Tensor | None = None
) -> Tensor:
    """Softmax attention of q over k and v: (B, H, T, D), 2 × (B, H, S, D) → (B, H, T, D), scaled by 1/√D.

    `bias` (H, T, S) is added to the scores; only without `causal`. With `causal`, position i sees positions 0 … i.
    `backend`: `sdpa` (PyTorch's fused kernels), `bmm` (batched matrix products), `blocks` (matrix products that skip
    most masked keys; without `causal` the same as `bmm`), or `auto`. One query is never computed by fused kernels on
    CUDA (`dispatch.is_unfused_query`).
    """
    if not causal and q.shape[2] == 1 and dispatch.is_unfused_query(q.device):
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, 1, S)
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    if backend in ("auto", "native", "flex"):
        backend = dispatch.unfused_attention_backend(q.device, q.dtype, t=q.shape[2], causal=causal)
    if bias is not None:
        assert not causal, "a bias of causal attention is -∞ for later keys"
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    b, h, t, d = q.shape
    s = k.shape[2]
    q, k, v = q.reshape(b * h, t, d), k.reshape(b * h, s, d), v.reshape(b * h, s, d)
    if backend == "blocks" and causal:
        out: Tensor = _CausalBlocks.apply(q, k, v)  # type: ignore[no-untyped-call]  # PyTorch has no type for it
        return out.view(b, h, t, d)
    scale = 1 / math.sqrt(d)
    if causal and not torch.compiler.is_compiling():
        scores = torch.baddbmm(_causal_bias(t, q, s), q, k.mT, alpha=scale)  # (B·H, T, S)
    else:  # the compiler fuses scale and mask with the softmax
        scores = torch.bmm(q, k.mT) * scale
        scores = scores + _causal_bias(t, q, s) if causal else scores
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d)


def _causal_bias(t: int, like: Tensor, s: int | None = None) -> Tensor:
    """Additive causal mask (t, s): -∞ where the key comes after the query, else 0."""
    return torch.full((t, s or t), -math.inf, dtype=like.dtype, device=like.device).triu(1)


class _CausalBlocks(torch.autograd.Function):
    """Causal attention, one block of queries at a time against keys 0 … the block's end: about half of all products.

    Plain matrix products, which CPUs compute fastest. The softmax of every block is saved for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, size = q.shape[1], dispatch.block_size(q.dtype)
        scale = 1 / math.sqrt(q.shape[-1])
        out, saved = torch.empty_like(v), []
        with torch.autocast(q.device.type, enabled=False):
            for start in range(0, t, size):
                end = min(start + size, t)
                scores = torch.bmm(q[:, start:end], k[:, :end].mT).mul_(scale)  # (B·H, end - start, end)
                scores[:, :, start:].add_(_causal_bias(end - start, q))
                p = scores.softmax(-1)
                out[:, start:end] = torch.bmm(p, v[:, :end])
                saved.append(p)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.size, ctx.scale = size, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *saved = ctx.saved_tensors
        d_out = d_out.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, p in reversed(list(enumerate(saved))):
            start, end = block * ctx.size, p.shape[2]
            along = d_out[:, start:end]
            dv[:, :end] += torch.bmm(p.mT, along)
            dp = torch.bmm(along, v[:, :end].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dk[:, :end] += torch.bmm(ds.mT, q[:, start:end])
            dq[:, start:end] = torch.bmm(ds, k[:, :end])
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv


class _SparseBlocks(torch.autograd.Function):
    """Attention through a sparse mask, one block of queries at a time against the keys that any of them sees.

    `tables` are `SparseMask.blocks`. The softmax of every block is saved for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        out, saved = torch.empty_like(v), []
        with torch.autocast(q.device.type, enabled=False):
            for queries, keys, hidden in zip(tables[::3], tables[1::3], tables[2::3], strict=True):
                scores = torch.bmm(q[:, queries], k[:, keys].mT).mul_(scale)  # (B·H, n, m)
                p = scores.masked_fill_(hidden, -math.inf).softmax(-1)
                out[:, queries] = torch.bmm(p, v[:, keys])
                saved.append(p)
        ctx.save_for_backward(q, k, v, *tables, *saved)
        ctx.n_block, ctx.scale = len(saved), scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *others = ctx.saved_tensors
        tables, saved = others[: 3 * ctx.n_block], others[3 * ctx.n_block :]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, p in zip(tables[::3], tables[1::3], saved, strict=True):
            along = d_out[:, queries]
            dv.index_add_(1, keys, torch.bmm(p.mT, along))
            dp = torch.bmm(along, v[:, keys].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dk.index_add_(1, keys, torch.bmm(ds.mT, q[:, queries]))
            dq[:, queries] = torch.bmm(ds, k[:, keys])
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, *([None] * len(tables))
