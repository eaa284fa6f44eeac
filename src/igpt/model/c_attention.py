"""Attention in C (`attend.c`, `attend_sparse.c`) as custom operators with autograd and `torch.compile`."""

import ctypes
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


@torch.library.custom_op("igpt::attend_sparse", mutates_args=(), device_types="cpu")
def attend_sparse(
    qkv: Tensor, n_head: int, order: Tensor, starts: Tensor, keys: Tensor, bits: Tensor
) -> tuple[Tensor, Tensor]:
    """`attend` through a sparse mask: `order`, `starts`, `keys` and `bits` are `SparseMask.lanes`."""
    qkv = qkv.contiguous()
    out, lse = _empty_outputs(qkv, n_head)
    _call_sparse("igpt_attend_sparse", qkv, n_head, (order, starts, keys, bits), out, lse, backward=False)
    return out, lse


@attend_sparse.register_fake
def _fake_attend_sparse(
    qkv: Tensor, n_head: int, order: Tensor, starts: Tensor, keys: Tensor, bits: Tensor
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(qkv, n_head)


@torch.library.custom_op("igpt::attend_sparse_backward", mutates_args=(), device_types="cpu")
def attend_sparse_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    order: Tensor,
    starts: Tensor,
    keys: Tensor,
    bits: Tensor,
) -> Tensor:
    """Gradient of `qkv`, (B, T, 3C), from the gradient of `out`. Not differentiable a second time."""
    qkv = qkv.contiguous()
    d_qkv = torch.empty_like(qkv)
    inputs = (out.contiguous(), lse.contiguous(), d_out.to(qkv.dtype).contiguous())
    _call_sparse("igpt_attend_sparse_backward", qkv, n_head, (order, starts, keys, bits), *inputs, d_qkv, backward=True)
    return d_qkv


@attend_sparse_backward.register_fake
def _fake_attend_sparse_backward(d_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _set_up_sparse_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.n_head, *lanes = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, *lanes)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _sparse_backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    qkv, out, lse, *lanes = ctx.saved_tensors
    d_qkv = None if d_out is None else attend_sparse_backward(d_out, qkv, out, lse, ctx.n_head, *lanes)
    return d_qkv, None, None, None, None, None


attend_sparse.register_autograd(_sparse_backward, setup_context=_set_up_sparse_context)


def _empty_outputs(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    b, t, width = qkv.shape
    if width % (3 * n_head):
        raise ValueError(f"queries, keys and values of {n_head} heads cannot be {width} numbers")
    return qkv.new_empty(b, t, width // 3), qkv.new_empty(b, n_head, t, dtype=torch.float32)


def _call_library(name: str, qkv: Tensor, n_head: int, causal: bool, *others: Tensor, backward: bool) -> None:
    """Calls a function of `attend.c` on contiguous tensors, with at most PyTorch's number of threads."""
    library = _require_library(qkv)
    depth, threads = qkv.shape[2] // 3 // n_head, _count_threads(qkv, n_head, backward)
    workspace = _empty_workspace(threads * library.igpt_attend_room(qkv.shape[1], depth, int(backward)))
    sizes = (*qkv.shape[:2], n_head, depth, int(causal), int(qkv.dtype == torch.bfloat16), threads)
    getattr(library, name)(*sizes, *(tensor.data_ptr() for tensor in (qkv, *others, workspace)))


def _call_sparse(
    name: str, qkv: Tensor, n_head: int, lanes: tuple[Tensor, ...], *others: Tensor, backward: bool
) -> None:
    """The same of `attend_sparse.c`."""
    library = _require_library(qkv)
    order, starts, *_ = lanes
    assert len(order) == qkv.shape[1], "a sparse mask is for all positions"
    depth, threads = qkv.shape[2] // 3 // n_head, _count_threads(qkv, n_head, backward)
    room = library.igpt_attend_sparse_room(qkv.shape[1], depth, int(backward), starts.data_ptr())
    workspace = _empty_workspace(threads * room)
    sizes = (*qkv.shape[:2], n_head, depth, int(qkv.dtype == torch.bfloat16), threads)
    getattr(library, name)(*sizes, *(tensor.data_ptr() for tensor in (*lanes, qkv, *others, workspace)))


def _require_library(qkv: Tensor) -> ctypes.CDLL:
    if qkv.dtype not in dispatch.DTYPES:
        raise ValueError(f"attention_backend=native reads float32 or bfloat16, got {qkv.dtype}: choose auto")
    return c_library.require_library("attention_backend=native")


def _count_threads(qkv: Tensor, n_head: int, backward: bool) -> int:
    tasks = qkv.shape[0] * n_head * (1 if backward else qkv.shape[1])
    return max(1, min(torch.get_num_threads(), tasks))


def _empty_workspace(floats: int) -> Tensor:
    # explicit: the default dtype and device may differ
    return torch.empty(floats, dtype=torch.float32, device="cpu")
