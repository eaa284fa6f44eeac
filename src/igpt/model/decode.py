"""One more token for a batch of images, in four ways that agree but for rounding; `choice.py` says which is used.

A step reads every weight and every cached key and value once and computes little with each, so that reading them is
what takes time: a network's own layers, made for whole images, take many times as long (`docs/performance.md`).
"""

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.model import choice, native
from igpt.model.gpt import GELU_SLOPE, GPT, NORM_EPS, Cache
from igpt.model.graphs import recorded
from igpt.model.native import VECTOR

Step = Callable[[Tensor], Tensor]  # one new token each, (B, 1) → logits (B, V) of the next position
FEW = 16  # images; measured at 256 wide


def stepping(net: GPT, cache: Cache, way: str = "auto") -> Step:
    """What computes the next tokens from here on, in one of `choice.DECODING`; auto: its own, or the fastest."""
    if way == "auto":
        way = net.decoding
    if way == "auto":
        weight = net.blocks[0].mlp.c_fc.weight  # of a block: sharded, wte alone may be whole for a while
        way = choice.decoding(weight, n_embd=net.n_embd, n_head=net.n_head)
    ways: dict[str, Callable[[GPT, Cache], Step]] = {
        "native": natively, "columns": by_columns, "graphs": recorded, "layers": by_layers
    }  # fmt: skip
    return ways[way](net, cache)


def by_layers(net: GPT, cache: Cache) -> Step:
    """The network's own step: any device, any precision, weights in parts."""
    return lambda tokens: net.step(tokens, cache)


def by_columns(net: GPT, cache: Cache) -> Step:
    """PyTorch alone, for whole float32 weights on a CPU: activations are columns, (C, B), because weight matrices lie
    row by row, and W @ x streams through them, where x @ Wᵀ does not."""
    heads = net.n_head

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return exactly(tokens)

    def exactly(tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == 1, "one new token for each image"
        now = cache.length
        x = (F.embedding(tokens[:, 0], net.wte) + net.wpe[now]).t().contiguous()  # (C, B)
        c, b = x.shape
        for block, keys, values in zip(net.blocks, cache.keys, cache.values, strict=True):
            qkv = torch.mm(block.attn.c_attn.weight, _laid_out(_normed(x, block.ln_1.g)))
            # in one piece: the fused attention takes no other, and without it every key would be copied
            q, k, v = qkv.view(3, heads, c // heads, b).permute(0, 3, 1, 2).contiguous().unbind(0)  # 3 × (B, H, D)
            keys[:, :, now] = k
            values[:, :, now] = v
            seen = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, : now + 1], values[:, :, : now + 1])
            x = torch.addmm(x, block.attn.c_proj.weight, seen.view(b, c).t())
            normed = _laid_out(_normed(x, block.ln_2.g))
            wide = torch.addmm(normed[:1, :1], block.mlp.c_fc.weight, normed, beta=0, alpha=GELU_SLOPE)
            x = torch.addmm(x, block.mlp.c_proj.weight, _laid_out(F.silu(wide, inplace=True)), alpha=1 / GELU_SLOPE)
        cache.length = now + 1
        return torch.mm(net.wtet, _laid_out(_normed(x, net.ln_f.g))).t()

    return step


def natively(net: GPT, cache: Cache) -> Step:
    """`decode.c`, for whole float32 weights on a CPU. What the cache holds is laid out anew; the cache is used up.

    Raises:
        ValueError: it cannot work on this network, or there is no C compiler.
    """
    if not choice.suits_native(net.blocks[0].mlp.c_fc.weight, n_embd=net.n_embd, n_head=net.n_head):
        raise ValueError(
            f"trainer.decoding=native needs whole float32 weights on a CPU and heads of a multiple of {VECTOR}; these "
            f"are {net.wte.dtype} on {net.wte.device.type}, heads of {net.n_embd // net.n_head}: choose auto"
        )
    compiled = native.needed("trainer.decoding=native")
    now, batch = cache.length, cache.keys[0].shape[0]
    room_for = -(-net.n_ctx // VECTOR) * VECTOR  # positions
    lie: list[Tensor] = []
    while cache.keys:  # one layer at a time is held twice
        lie += _streamed(cache.keys.pop(0), cache.values.pop(0), room_for)
    weights = [
        weight.detach().contiguous()
        for block in net.blocks
        for weight in (
            block.ln_1.g, block.attn.c_attn.weight, block.attn.c_proj.weight,
            block.ln_2.g, block.mlp.c_fc.weight, block.mlp.c_proj.weight,
        )
    ] + [net.ln_f.g.detach().contiguous(), net.wtet.detach().contiguous()]  # fmt: skip
    threads = torch.get_num_threads()
    room = torch.empty(batch * 6 * net.n_embd + threads * (room_for + VECTOR), dtype=torch.float32, device="cpu")
    addresses = [(ctypes.c_void_p * len(many))(*(one.data_ptr() for one in many)) for many in (weights, lie)]
    sizes = (net.n_layer, net.n_embd, net.n_head, net.n_vocab, room_for, batch)

    def step(tokens: Tensor) -> Tensor:
        nonlocal now
        assert tokens.shape == (batch, 1), "one new token for each image"
        assert now < net.n_ctx, "the cache is full"
        assert weights  # they stay while this function does,
        assert lie  # and so do these
        x = F.embedding(tokens[:, 0], net.wte) + net.wpe[now]  # (B, C)
        logits = torch.empty(batch, net.n_vocab, dtype=torch.float32, device="cpu")
        ends = (x.data_ptr(), room.data_ptr(), logits.data_ptr())
        compiled.igpt_step(*sizes, now, threads, NORM_EPS, *addresses, *ends)
        now += 1
        return logits

    return step


def _streamed(keys: Tensor, values: Tensor, room_for: int) -> tuple[Tensor, Tensor]:
    """2 × (B, H, S, D) as decode.c reads them: (B, H, S / 8, D, 8) and (B, H, S, D), S rounded up to eights."""
    short = room_for - keys.shape[2]
    keys = F.pad(keys, (0, 0, 0, short)).view(*keys.shape[:2], -1, VECTOR, keys.shape[3]).mT.contiguous()
    return keys, F.pad(values, (0, 0, 0, short)).contiguous()


def _laid_out(x: Tensor) -> Tensor:
    """The same columns, each in one piece where they are few: products of a CPU's library are twice as fast so."""
    return x.t().contiguous().t() if x.shape[1] < FEW else x


def _normed(x: Tensor, g: Tensor) -> Tensor:
    """`Norm` of columns: (C, B) → (C, B)."""
    r = torch.rsqrt(x.square().mean(0) + NORM_EPS)  # (B,)
    return (x * r).mul_(g[:, None])
