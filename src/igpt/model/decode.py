"""One more token for a batch of images, written for memory bandwidth: what `GPT.step` computes, several times faster.

A step reads every weight and every cached key and value once and computes little with each, so that reading them is
what takes time. Activations are kept as columns, (C, B): weight matrices lie row by row, and W @ x streams through
them, where x @ Wᵀ does not (`docs/performance.md`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from igpt.model.gpt import GELU_SLOPE, GPT, NORM_EPS, Cache

FEW = 16  # images; measured at 256 wide


def columns_pay(net: GPT) -> bool:
    """Whether `step` is the faster one: float32 weights that are whole, on a CPU, not under autocast."""
    weight = net.wte
    whole = not isinstance(weight, DTensor) and not hasattr(weight, "ds_shape")
    return (
        whole and weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    )


def step(net: GPT, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits (B, V) of the next position after one new token each, (B, 1): `GPT.step`, but for rounding.

    Raises:
        AssertionError: more tokens than one; a prompt is for `GPT.step`.
    """
    assert tokens.shape[1] == 1
    now, heads = cache.length, net.n_head
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


def _laid_out(x: Tensor) -> Tensor:
    """The same columns, each in one piece where they are few: products of a CPU's library are twice as fast so."""
    return x.t().contiguous().t() if x.shape[1] < FEW else x


def _normed(x: Tensor, g: Tensor) -> Tensor:
    """`Norm` of columns: (C, B) → (C, B)."""
    r = torch.rsqrt(x.square().mean(0) + NORM_EPS)  # (B,)
    return (x * r).mul_(g[:, None])
