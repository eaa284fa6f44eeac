"""Decode step (the next token of a batch of images) in four backends, equal but for rounding; `dispatch.py` picks one.

A step is bound by memory: it reads every weight and every cached key and value once and computes little with each.
The network's own layers, made for whole images, take many times as long (`docs/performance.md`). The other backends
reimplement the paper's block, so each lists the settings it supports and is compared with the network itself before
the first token is drawn (`is_verified`).
"""

import ctypes
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.model import c_library, dispatch
from igpt.model.block import Cache
from igpt.model.c_library import VECTOR
from igpt.model.config import SIZES, GPTConfig
from igpt.model.gpt import GPT
from igpt.model.graphs import RecordedStep
from igpt.model.layers import GELU_SLOPE, NORM_EPS

log = logging.getLogger(__name__)

Step = Callable[[Tensor], Tensor]  # the new token of each image, (B, 1) → logits (B, V) of the next position
FEW = 16  # images; measured at n_embd 256
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of logits, as a share of the largest

_verified: "WeakKeyDictionary[GPT, dict[tuple[str, torch.dtype], bool]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class DecodeBackend:
    """A decode step's constructor. Settings not in `supported_settings` are supported with the paper's value only."""

    make_step: Callable[[GPT, Cache], Step]
    supported_settings: tuple[str, ...]

    def list_lacking(self, net: GPT) -> str:
        """The settings of a network that this step does not compute; "" if it computes all.

        Encodings that add a vector per position are a learned table to it.
        """
        positions = ("positions",) if net.has_position_table else ()
        return net.config.unsupported((*self.supported_settings, *positions))


def make_decode_step(net: GPT, cache: Cache, backend: str = "auto") -> Step:
    """The decode step with one of the backends `dispatch.DECODING`; auto: `net.decoding`, or the fastest.

    Falls back to `layers` when the fastest backend does not support the network, and, with a warning, when a backend's
    logits differ from the network's.

    Raises:
        ValueError: a backend chosen by name does not support this network.
    """
    requested = backend if backend != "auto" else net.decoding
    name = requested
    if name == "auto":
        weight = net.blocks[0].mlp.c_fc.weight  # a block's weight: under FSDP, wte may be gathered for a while
        name = dispatch.decode_backend(weight, n_embd=net.n_embd, n_head=net.n_head)
    if lacking := BACKENDS[name].list_lacking(net):
        if requested != "auto":
            raise ValueError(f"trainer.decoding={name} does not compute {lacking}: choose auto")
        name = "layers"
    if not is_verified(net, name) and name != "layers":
        name = "layers"
        is_verified(net, name)
    return BACKENDS[name].make_step(net, cache)


@torch.inference_mode()
def is_verified(net: GPT, name: str) -> bool:
    """Whether a decode backend gives the network's own logits; checked once per network and precision.

    One image of random tokens goes through the full forward pass; the backend then computes the logits of three
    positions, in the first, a middle and the last row, from caches filled by the network's own step. Networks with
    sharded weights are not checked.

    Raises:
        ValueError: the network's own step differs in float32, so no backend is left.
    """
    if not dispatch.is_unsharded(net.blocks[0].mlp.c_fc.weight):
        return True
    device = net.wte.device
    mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if mixed else net.wte.dtype
    results = _verified.setdefault(net, {})
    if (name, dtype) in results:
        return results[name, dtype]
    t = net.n_ctx
    tokens = torch.randint(net.n_vocab, (1, t), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.compiler.set_stance("force_eager"):
        expected = net(tokens)[0].float()  # (T, V)
        largest = float(expected.abs().max())
        if not 0 < largest < math.inf:  # an untrained (zero) head hides all differences: check again later
            return True
        row = max(1, math.isqrt(t))
        differences = []
        for position in sorted({min(row // 2 + 1, t - 1), min(t // 2 + row // 2, t - 1), t - 1} - {0}):
            cache = net.new_cache(1)
            net.step(tokens[:, : position - 1], cache)
            try:
                logits = BACKENDS[name].make_step(net, cache)(tokens[:, position - 1 : position])[0].float()
            except RuntimeError as error:
                log.warning("decoding=%s is not used, tokens are drawn more slowly: %s", name, error)
                results[name, dtype] = False
                return False
            differences.append((logits - expected[position]).abs().max() / largest)
    off = float(torch.stack(differences).max()) if differences else 0.0  # NaN where there is any
    results[name, dtype] = off < TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if results[name, dtype]:
        return True
    text = f"its logits differ from the network's by {100 * off:.1f} % of the largest, so it computes another network"
    if name != "layers":
        log.warning("decoding=%s is not used, tokens are drawn more slowly: %s", name, text)
    elif dtype == torch.float32:
        del results[name, dtype]
        raise ValueError(f"the network's step of one token (GPT.step) is not its forward pass: {text}")
    else:
        log.warning("decoding=layers, the network's step of one token (GPT.step): %s, or rounds much", text)
    return False


def make_columns_step(net: GPT, cache: Cache) -> Step:
    """PyTorch only, for unsharded float32 weights on a CPU. Activations are columns, (C, B).

    Weight matrices are stored by rows, so W @ x reads them in order, where x @ Wᵀ does not.
    """
    heads, table = net.n_head, net.position_table().detach()

    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]  # PyTorch has no type for it
    def step(tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == 1, "one new token for each image"
        now = cache.length
        x = (F.embedding(tokens[:, 0], net.wte) + table[now]).t().contiguous()  # (C, B)
        c, b = x.shape
        for block, keys, values in zip(net.blocks, cache.keys, cache.values, strict=True):
            qkv = torch.mm(block.attn.c_attn.weight, _lay_out(_normalize(x, block.ln_1.g)))
            # contiguous: the fused kernel needs it, the unfused one would copy every key
            q, k, v = qkv.view(3, heads, c // heads, b).permute(0, 3, 1, 2).contiguous().unbind(0)  # 3 × (B, H, D)
            keys[:, :, now] = k
            values[:, :, now] = v
            seen = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, : now + 1], values[:, :, : now + 1])
            x = torch.addmm(x, block.attn.c_proj.weight, seen.view(b, c).t())
            normed = _lay_out(_normalize(x, block.ln_2.g))
            wide = torch.addmm(normed[:1, :1], block.mlp.c_fc.weight, normed, beta=0, alpha=GELU_SLOPE)
            x = torch.addmm(x, block.mlp.c_proj.weight, _lay_out(F.silu(wide, inplace=True)), alpha=1 / GELU_SLOPE)
        cache.length = now + 1
        return torch.mm(net.wtet, _lay_out(_normalize(x, net.ln_f.g))).t()

    return cast("Step", step)


def make_c_step(net: GPT, cache: Cache) -> Step:
    """`decode.c`, for unsharded float32 weights on a CPU. Moves keys and values to its own layout, emptying the cache.

    Raises:
        ValueError: a dtype, device or head size that `decode.c` does not read, or no C compiler.
    """
    if not dispatch.is_native_decodable(net.blocks[0].mlp.c_fc.weight, n_embd=net.n_embd, n_head=net.n_head):
        raise ValueError(
            f"trainer.decoding=native needs whole float32 weights on a CPU and heads of a multiple of {VECTOR}; these "
            f"are {net.wte.dtype} on {net.wte.device.type}, heads of {net.n_embd // net.n_head}: choose auto"
        )
    compiled = c_library.require_library("trainer.decoding=native")
    now, batch, table = cache.length, cache.keys[0].shape[0], net.position_table().detach()
    room_for = -(-net.n_ctx // VECTOR) * VECTOR  # positions
    lie: list[Tensor] = []
    while cache.keys:  # only one layer at a time is in memory twice
        lie += _interleave_keys(cache.keys.pop(0), cache.values.pop(0), room_for)
    weights = [
        weight.detach().contiguous()
        for block in net.blocks
        for weight in (
            block.ln_1.g, block.attn.c_attn.weight, block.attn.c_proj.weight,
            block.ln_2.g, block.mlp.c_fc.weight, block.mlp.c_proj.weight,
        )
    ] + [net.ln_f.g.detach().contiguous(), net.wtet.detach().contiguous()]  # fmt: skip
    threads = torch.get_num_threads()
    workspace = torch.empty(batch * 6 * net.n_embd + threads * (room_for + VECTOR), dtype=torch.float32, device="cpu")
    addresses = [(ctypes.c_void_p * len(many))(*(one.data_ptr() for one in many)) for many in (weights, lie)]
    sizes = (net.n_layer, net.n_embd, net.n_head, net.n_vocab, room_for, batch)

    def step(tokens: Tensor) -> Tensor:
        nonlocal now
        assert tokens.shape == (batch, 1), "one new token for each image"
        assert now < net.n_ctx, "the cache is full"
        assert weights  # the closure keeps them alive: C reads their addresses
        assert lie  # the same
        x = F.embedding(tokens[:, 0], net.wte) + table[now]  # (B, C)
        logits = torch.empty(batch, net.n_vocab, dtype=torch.float32, device="cpu")
        ends = (x.data_ptr(), workspace.data_ptr(), logits.data_ptr())
        compiled.igpt_step(*sizes, now, threads, NORM_EPS, *addresses, *ends)
        now += 1
        return logits

    return step


def _interleave_keys(keys: Tensor, values: Tensor, room_for: int) -> tuple[Tensor, Tensor]:
    """Keys (B, H, S / 8, D, 8) and values (B, H, S, D) in decode.c's layout, S padded to a multiple of 8."""
    short = room_for - keys.shape[2]
    keys = F.pad(keys, (0, 0, 0, short)).view(*keys.shape[:2], -1, VECTOR, keys.shape[3]).mT.contiguous()
    return keys, F.pad(values, (0, 0, 0, short)).contiguous()


def _lay_out(x: Tensor) -> Tensor:
    """The same (C, B) matrix; below `FEW` columns each is made contiguous, which makes CPU products twice as fast."""
    return x.t().contiguous().t() if x.shape[1] < FEW else x


def _normalize(x: Tensor, g: Tensor) -> Tensor:
    """`Norm` of each column: (C, B) → (C, B)."""
    r = torch.rsqrt(x.square().mean(0) + NORM_EPS)  # (B,)
    return (x * r).mul_(g[:, None])


BACKENDS = {
    "native": DecodeBackend(make_c_step, SIZES),
    "columns": DecodeBackend(make_columns_step, SIZES),
    "graphs": DecodeBackend(RecordedStep, SIZES),
    # the network's own step: any device, any precision, sharded weights
    "layers": DecodeBackend(lambda net, cache: partial(net.step, cache=cache), tuple(GPTConfig.__dataclass_fields__)),
}
