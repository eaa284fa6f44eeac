"""Which way of computing is the fastest, by shape and device: every such choice of this project, in one place.

The ways of each choice agree but for rounding (tests compare them), and every choice can be overridden by a setting.
What they rest on is measured in `docs/performance.md`.
"""

import os
import platform
import shlex
from typing import get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from igpt.model import c_library, cpu
from igpt.settings.devices import AttentionBackend, DecodeBackend

ATTENTION = get_args(AttentionBackend)  # trainer.attention
DECODING = get_args(DecodeBackend)[1:]  # trainer.decoding, generate(backend=)

X86 = ("x86_64", "AMD64")
SHORT = 128  # positions: one block
LONG = 512  # positions: beyond, scores that are kept in float32 cost more memory than they save time
BLOCK = {torch.float32: 128, torch.bfloat16: 256}  # queries
DTYPES = (torch.float32, torch.bfloat16)  # that `attend.c` reads
NARROW = 128  # width
# FLOP/s that a step reaches at least there, and the seconds of training from which compiling pays
WAIT = {"cpu": (4e10, 900.0), "cuda": (1e14, 120.0)}


def attention_backend(device: torch.device, dtype: torch.dtype, *, t: int, causal: bool) -> str:
    """How attention of T positions over themselves is computed: one of `ATTENTION`.

    On a CPU by `attend.c`, which keeps no scores and is mostly one and a half to three times as fast as all else. It
    shares out heads of images: where those are fewer than threads, its backward pass leaves threads idle.
    """
    if device.type == "cpu" and dtype in DTYPES and c_library.available():
        return "native"
    return unfused_attention_backend(device, dtype, t=t, causal=causal)


def unfused_attention_backend(device: torch.device, dtype: torch.dtype, *, t: int, causal: bool) -> str:
    """The same of T queries where they, keys and values lie apart: `sdpa` (fused), `blocks` or `bmm` (products).

    On a CPU, PyTorch's fused kernel is 3 to 8 times slower up to 128 positions in bfloat16 or with the float32 products
    of oneDNN that training uses, and in bfloat16 slower than `blocks` at any length that was measured. Products keep
    the scores for the backward pass: where those are many, in float32 or with all T × T of them, `sdpa` goes without.
    """
    if device.type != "cpu":
        return "sdpa"
    if causal and t > SHORT:
        return "blocks" if t <= LONG or dtype == torch.bfloat16 else "sdpa"
    return "bmm" if t <= LONG else "sdpa"


def block(dtype: torch.dtype) -> int:
    """Queries that `blocks` takes at a time."""
    return BLOCK.get(dtype, SHORT)


def scores_kept(dtype: torch.dtype, path: str, *, t: int, causal: bool) -> int:
    """Scores that attention of T positions keeps for the backward pass, of one head of one image."""
    size = block(dtype)
    if path == "blocks" and causal:
        return sum((min(start + size, t) - start) * min(start + size, t) for start in range(0, t, size))
    return t * t if path in ("blocks", "bmm") else 0


def matmul_precision(device: torch.device) -> str:
    """How float32 matrices are multiplied (`torch.set_float32_matmul_precision`): the fastest that computes in float32.

    `medium` on an x86 CPU without AMX only picks oneDNN's kernels, up to twice as fast as the default. With AMX, and on
    GPUs, it rounds the operands.
    """
    x86 = device.type == "cpu" and platform.machine() in X86
    return "medium" if x86 and cpu.medium_format(device) == "fp32" else "highest"


def pays_to_compile(device: torch.device, *, n_embd: int, flops: float, half: bool) -> bool:
    """Whether compiling blocks pays in a training that takes `flops` operations on each device, `half`: in bfloat16.

    On a CPU narrow networks gain up to a quarter, being bound by what lies between the products, as all do in bfloat16;
    in float32 wide ones gain nothing. On a GPU all do.
    """
    if device.type == "cpu":
        gains = half or n_embd <= NARROW
        if not gains:
            return False
    rate, seconds = WAIT.get(device.type, WAIT["cpu"])
    if flops <= rate * seconds:
        return False
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return device.type != "cpu" or c_library.compiler_version(compiler) is not None


def decode_backend(weight: Tensor, *, n_embd: int, n_head: int) -> str:
    """How a network with such a weight draws tokens: `native` (C) or `columns` on a CPU, `graphs`, `layers`."""
    if not is_whole(weight):
        return "layers"
    if weight.device.type == "cuda":
        return "graphs"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "layers"
    native_too = suits_native(weight, n_embd=n_embd, n_head=n_head) and c_library.available()
    return "native" if native_too else "columns"


def suits_native(weight: Tensor, *, n_embd: int, n_head: int) -> bool:
    """Whether `decode.c` can read these weights where they lie."""
    readable = is_whole(weight) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return readable and n_embd // n_head % c_library.VECTOR == 0


def is_whole(weight: Tensor) -> bool:
    """Whether a weight lies in one piece: neither FSDP nor DeepSpeed has shared it out."""
    return not isinstance(weight, DTensor) and not hasattr(weight, "ds_shape")
