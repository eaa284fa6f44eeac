"""Attention in C (`attend.c`) as custom PyTorch operators, registered with autograd and `torch.compile`."""

from typing import Any

import torch
from torch import Tensor

from igpt.model import c_library, dispatch


@torch.library.custom_op("igpt::attend", mutates_args=(), device_types="cpu")
def attend(qkv: Tensor, n_head: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention output (B, T, C) and float32 logsumexp of the scores (B, H, T), of (B, T, 3C) float32 or bfloat16."""
    qkv = qkv.contiguous()
    out, lse = _empty_outputs(qkv, n_head)
    _call_library("igpt_attend", qkv, n_head, causal, out, lse, backward=False)
    return out, lse


@attend.register_fake
def _fake_attend(qkv: Tensor, n_head: int, causal: bool) -> tuple[Tensor, Tensor]:
    return _empty_outputs(qkv, n_head)


@torch.library.custom_op("igpt::attend_backward", mutates_args=(), device_types="cpu")
def attend_backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, causal: bool) -> Tensor:
    """Gradient of `qkv`, (B, T, 3C), from the gradient of `out`. Not differentiable a second time."""
    qkv = qkv.contiguous()
    d_qkv = torch.empty_like(qkv)
    inputs = (out.contiguous(), lse.contiguous(), d_out.to(qkv.dtype).contiguous())
    _call_library("igpt_attend_backward", qkv, n_head, causal, *inputs, d_qkv, backward=True)
    return d_qkv


@attend_backward.register_fake
def _fake_attend_backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, causal: bool) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _set_up_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.n_head, ctx.causal = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    d_qkv = None if d_out is None else attend_backward(d_out, *ctx.saved_tensors, ctx.n_head, ctx.causal)
    return d_qkv, None, None


attend.register_autograd(_backward, setup_context=_set_up_context)


def _empty_outputs(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    b, t, width = qkv.shape
    if width % (3 * n_head):
        raise ValueError(f"queries, keys and values of {n_head} heads cannot be {width} numbers")
    return qkv.new_empty(b, t, width // 3), qkv.new_empty(b, n_head, t, dtype=torch.float32)


def _call_library(name: str, qkv: Tensor, n_head: int, causal: bool, *others: Tensor, backward: bool) -> None:
    """Calls a function of `attend.c` on contiguous tensors, with at most PyTorch's number of threads."""
    library = c_library.require_library("attention_backend=native")
    if qkv.dtype not in dispatch.DTYPES:
        raise ValueError(f"attention_backend=native reads float32 or bfloat16, got {qkv.dtype}: choose auto")
    b, t, width = qkv.shape
    depth, tasks = width // 3 // n_head, b * n_head if backward else b * n_head * t
    threads = max(1, min(torch.get_num_threads(), tasks))
    floats = threads * library.igpt_attend_room(t, depth, int(backward))
    # explicit: the default dtype and device may differ
    workspace = torch.empty(floats, dtype=torch.float32, device="cpu")
    sizes = (b, t, n_head, depth, int(causal), int(qkv.dtype == torch.bfloat16), threads)
    getattr(library, name)(*sizes, *(tensor.data_ptr() for tensor in (qkv, *others, workspace)))
