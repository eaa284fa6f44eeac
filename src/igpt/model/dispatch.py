"""The fastest backend by shape and device: attention, decoding, matmul precision, compilation.

Backends are equal but for rounding (tests compare them), and a setting overrides each choice. Measurements:
`docs/performance.md`.
"""

import platform
from typing import get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from igpt.model import c_library, cpu
from igpt.settings.devices import AttentionBackend, DecodeBackend

ATTENTION = get_args(AttentionBackend)  # trainer.attention_backend
DECODING = get_args(DecodeBackend)[1:]  # trainer.decoding, generate(backend=)

X86 = ("x86_64", "AMD64")
SHORT = 128  # positions: one block
LONG = 512  # positions: beyond, float32 scores saved for the backward pass cost more memory than they save time
BLOCK = {torch.float32: 128, torch.bfloat16: 256}  # queries
DTYPES = (torch.float32, torch.bfloat16)  # supported by `attend.c`
NARROW = 128  # n_embd
FLEX_HEAD = 16  # smallest head that FlexAttention compiles
# lower bound of a training step's FLOP/s, and seconds of training from which compiling pays
WAIT = {"cpu": (4e10, 900.0), "cuda": (1e14, 120.0)}


def attention_backend(device: torch.device, dtype: torch.dtype, *, t: int, causal: bool) -> str:
    """Backend of self-attention over T positions: one of `ATTENTION`.

    On a CPU `attend.c`, which saves no scores and is mostly 1.5 to 3 times as fast as the others. Its backward pass
    runs one thread per image and head, so with fewer of these than threads some stay idle.
    """
    if device.type == "cpu" and dtype in DTYPES and c_library.is_available():
        return "native"
    return unfused_attention_backend(device, dtype, t=t, causal=causal)


def unfused_attention_backend(device: torch.device, dtype: torch.dtype, *, t: int, causal: bool) -> str:
    """Backend for separate q, k, v tensors (not the fused qkv) of T positions: `sdpa`, `blocks` or `bmm`.

    On a CPU, PyTorch's fused kernel (`sdpa`) is 3 to 8 times slower up to 128 positions in bfloat16 or with oneDNN's
    float32 products, which training uses, and in bfloat16 slower than `blocks` at every measured length. `blocks` and
    `bmm` save scores for the backward pass; when these take much memory (float32, or all T × T), `sdpa` saves none.
    """
    if device.type != "cpu":
        return "sdpa"
    if causal and t > SHORT:
        return "blocks" if t <= LONG or dtype == torch.bfloat16 else "sdpa"
    return "bmm" if t <= LONG else "sdpa"


def is_unfused_query(device: torch.device) -> bool:
    """Whether attention of one query is plain products on this device: cuDNN plans anew for every number of keys."""
    return device.type == "cuda"


def sparse_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    head_size: int = FLEX_HEAD,
    dense: bool = False,
) -> str:
    """Backend of attention through a sparse mask, `requested` if it can: one of `ATTENTION`.

    On a CPU `attend_sparse.c`, else `blocks`, on a GPU FlexAttention: all skip most hidden keys. PyTorch's fused kernel
    with a dense mask takes longer than full attention. `dense`: with a bias on the scores, or over a prompt, which
    `sdpa` and `bmm` alone compute.
    """
    if dense:
        return "bmm" if requested == "bmm" else "sdpa"
    if requested == "flex" or (requested == "auto" and device.type == "cuda"):
        return "flex" if head_size >= FLEX_HEAD else "sdpa"
    if requested != "auto":
        return requested
    if device.type != "cpu":
        return "sdpa"
    return "native" if dtype in DTYPES and c_library.is_available() else "blocks"


def block_size(dtype: torch.dtype) -> int:
    """Queries per block of the backend `blocks`."""
    return BLOCK.get(dtype, SHORT)


def count_saved_scores(dtype: torch.dtype, backend: str, *, t: int, causal: bool) -> int:
    """Number of scores saved for the backward pass, per image and head, by attention over T positions."""
    size = block_size(dtype)
    if backend == "blocks" and causal:
        return sum((min(start + size, t) - start) * min(start + size, t) for start in range(0, t, size))
    return t * t if backend in ("blocks", "bmm") else 0


def matmul_precision(device: torch.device) -> str:
    """Fastest setting of `torch.set_float32_matmul_precision` that does not round float32 operands.

    On an x86 CPU without AMX, `medium` only selects oneDNN's kernels, up to twice as fast as the default. With AMX, and
    on GPUs, it would round the operands.
    """
    x86 = device.type == "cpu" and platform.machine() in X86
    return "medium" if x86 and cpu.medium_format(device) == "fp32" else "highest"


def is_worth_compiling(device: torch.device, *, n_embd: int, flops: float, half: bool) -> bool:
    """Whether compiling the blocks pays in a training of `flops` operations per device; `half`: in bfloat16.

    On a CPU, bfloat16 and narrow float32 networks gain up to a quarter, because element-wise operations bound them;
    wide float32 networks gain nothing. On a GPU all gain.
    """
    rate, seconds = WAIT.get(device.type, WAIT["cpu"])
    return flops > rate * seconds and (device.type != "cpu" or half or n_embd <= NARROW)


def decode_backend(weight: Tensor, *, n_embd: int, n_head: int) -> str:
    """Decode backend for a network with such a weight: `native` (C) or `columns` on a CPU, `graphs` or `layers`."""
    if not is_unsharded(weight):
        return "layers"
    if weight.device.type == "cuda":
        return "graphs"
    if is_native_decodable(weight, n_embd=n_embd, n_head=n_head) and c_library.is_available():
        return "native"
    return "columns" if weight.device.type == "cpu" and weight.dtype == torch.float32 else "layers"


def is_native_decodable(weight: Tensor, *, n_embd: int, n_head: int) -> bool:
    """Whether `decode.c` supports these weights: unsharded float32 on a CPU, head size a multiple of `VECTOR`."""
    readable = is_unsharded(weight) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return readable and n_embd // n_head % c_library.VECTOR == 0


def is_unsharded(weight: Tensor) -> bool:
    """Whether a weight is unsharded, neither by FSDP nor by DeepSpeed."""
    return not isinstance(weight, DTensor) and not hasattr(weight, "ds_shape")
