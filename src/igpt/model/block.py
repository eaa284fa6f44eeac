"""A block of the network: attention and MLP, each after a norm, and what attention needs of earlier positions.

Sizes: B images, T positions, C width (n_embd), H heads, D = C / H.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.model import dispatch
from igpt.model.attention import attend, masked_attention, self_attention, split_heads
from igpt.model.config import GPTConfig
from igpt.model.layers import MLP, Linear, Norm
from igpt.model.linear_attention import attend_to_state, linear_attention, read_state
from igpt.model.patterns import relative_offsets
from igpt.model.positions import Positions
from igpt.model.sparse_mask import SparseMask

# settings with which attention in C computes a layer, unless it is linear
IN_C = tuple(name for name in GPTConfig.__dataclass_fields__ if name != "relative_bias")


@dataclass
class Cache:
    """What later positions need of those seen so far, allocated once, a pair of tensors for every block.

    Keys and values of all positions, 2 × (B, H, n_ctx, D); of linear attention `read_state`: (B, H, D), (B, H, D, D).
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0


class Offsets:
    """Index of each pair's offset in the table of `relative_bias`; not a module, as all blocks share it."""

    def __init__(self, config: GPTConfig) -> None:
        assert config.layout is not None
        self.layout, self.causal = config.layout, config.causal
        self.shape = (2 * self.layout.rows - 1, 2 * self.layout.row_length - 1)
        self.index = torch.empty(0, 0, dtype=torch.int32, device="cpu")

    def prepare(self, device: torch.device) -> None:
        """Computes `index` (T, T) on a device unless it is there."""
        if self.index.numel() == 0 or self.index.device != device:
            with torch.inference_mode(False):  # it serves training, too
                self.index = relative_offsets(self.layout, causal=self.causal, device=device)


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, C) → (B, T, C).

    The settings of `GPTConfig` beyond the paper's: queries and keys rotated by position (`rotations`), normed
    (`qk_norm`: Henry et al. 2020; Dehghani et al. 2023, §2) or scored by offset (`relative_bias`: Shaw et al. 2018; as
    a scalar per head Liu et al. 2021, "Swin Transformer", eq. 4); values mixed with the first block's
    (`value_residual`: Zhou et al. 2024, eq. 3); a `mask` of visible keys or no softmax at all (`linear`).
    """

    def __init__(
        self,
        config: GPTConfig,
        layer: int,
        rotations: list[Positions],
        mask: SparseMask | None,
        offsets: Offsets | None,
    ) -> None:
        super().__init__()
        self.n_head, self.causal, self.backend = config.n_head, config.causal, "auto"
        self.head_size = config.n_embd // config.n_head  # D
        self.mask, self.offsets = mask, offsets  # not modules: the blocks share them
        self.is_linear = config.patterns[layer] == "linear"
        self.rotate = [positions.rotate for positions in rotations]
        self.is_plain = not (rotations or config.qk_norm or config.value_residual)  # q, k, v are those of `c_attn`
        self.keeps_value = config.value_residual and layer == 0
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # q, k, v; in each, heads are blocks of D rows
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.q_norm = Norm(self.head_size) if config.qk_norm else None
        self.k_norm = Norm(self.head_size) if config.qk_norm else None
        # of this block's values and the first one's
        self.value_mix = nn.Parameter(torch.full((2,), math.nan)) if config.value_residual and layer else None
        self.relative = None
        if offsets is not None:
            self.relative = nn.Parameter(torch.full((self.n_head, *offsets.shape), math.nan))
        # settings that attention in C lacks
        self.not_in_c = "attention=linear" if self.is_linear else config.unsupported(IN_C)

    def forward(
        self, x: Tensor, first_value: Tensor | None = None, cache: Cache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, C) → (B, T, C), and with `value_residual` the first block's values (B, T, H, D)."""
        qkv = self.c_attn(x)  # (B, T, 3C)
        if not self.is_plain:
            qkv, first_value = self.transform(qkv, first_value, 0 if cache is None else cache.length)
        if cache is not None and x.shape[1] == 1:
            out = self._decode_step(qkv, cache, layer)
        else:
            if cache is not None:
                self._update_kv_cache(qkv, cache, layer)
            out = self._attend(qkv)
        projected: Tensor = self.c_proj(out)
        return projected, first_value

    def prepare_tables(self, device: torch.device, dtype: torch.dtype) -> None:
        """Computes this layer's mask and offsets for activations of a dtype on a device, unless they are there."""
        if self.offsets is not None:
            self.offsets.prepare(device)
        if self.mask is not None:
            backend = dispatch.sparse_backend(
                self.backend, device, dtype, head_size=self.head_size, dense=self.relative is not None
            )
            self.mask.prepare(device, backend)

    def transform(self, qkv: Tensor, first_value: Tensor | None, start: int) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values as attention reads them, of positions start, start + 1, …: (B, T, 3C) → the same."""
        b, t, width = qkv.shape
        q, k, v = qkv.view(b, t, 3, self.n_head, width // 3 // self.n_head).unbind(2)  # (B, T, H, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        for rotate in self.rotate:
            q, k = (rotate(each.transpose(1, 2), start).transpose(1, 2) for each in (q, k))
        if self.keeps_value:
            first_value = v
        if self.value_mix is not None:
            assert first_value is not None
            own, first = self.value_mix.to(v.dtype).unbind()
            v = own * v + first * first_value
        return torch.stack((q, k, v), 2).flatten(2), first_value

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attention of positions 0, 1, … over themselves: (B, T, 3C) → (B, T, C)."""
        if self.is_linear:
            q, k, v = split_heads(qkv, self.n_head)
            return linear_attention(q, k, v, causal=self.causal).transpose(1, 2).flatten(2)
        if self.not_in_c and self.mask is None and self.relative is None:
            q, k, v = split_heads(qkv, self.n_head)
            return attend(q, k, v, causal=self.causal, backend=self.backend).transpose(1, 2).flatten(2)
        if self.mask is None and self.relative is None:
            return self_attention(qkv, self.n_head, causal=self.causal, backend=self.backend)
        return masked_attention(
            qkv, self.n_head, mask=self.mask, causal=self.causal, bias=self._bias(qkv.shape[1]), backend=self.backend
        )

    def _bias(self, t: int) -> Tensor | None:
        """The scores of the offsets of positions 0 … t - 1: (H, t, t); None without `relative_bias`."""
        if self.relative is None or self.offsets is None:
            return None
        # bfloat16 under trainer=fsdp: its gradient, a sum over pairs, stays float32
        mixed = torch.is_autocast_enabled(self.relative.device.type)
        relative = self.relative.float() if mixed else self.relative
        table = F.pad(relative.flatten(1), (0, 1))  # the start vector has no offset: 0
        index = self.offsets.index[:t, :t]
        return table.index_select(1, index.flatten()).view(-1, t, t)

    def _update_kv_cache(self, qkv: Tensor, cache: Cache, layer: int) -> tuple[Tensor, ...]:
        """Writes these positions to the cache; returns queries, keys and values: 3 × (B, H, T, D)."""
        t = qkv.shape[1]
        start, end = cache.length, cache.length + t
        assert t == 1 or start == 0, "a cache is filled by one prompt, then by single positions"
        q, k, v = split_heads(qkv, self.n_head)
        if self.is_linear:
            for total, added in zip((cache.keys[layer], cache.values[layer]), read_state(k, v), strict=True):
                total += added
        else:
            cache.keys[layer][:, :, start:end] = k
            cache.values[layer][:, :, start:end] = v
        return q, k, v

    def _decode_step(self, qkv: Tensor, cache: Cache, layer: int) -> Tensor:
        """Attention of one new position, (B, 1, 3C), over all that it sees of the cache: (B, 1, C)."""
        q, end = self._update_kv_cache(qkv, cache, layer)[0], cache.length + 1
        k, v = cache.keys[layer], cache.values[layer]
        if self.is_linear:
            return attend_to_state(q, k, v).transpose(1, 2).flatten(2)
        seen: slice | Tensor = slice(end)
        if self.mask is not None:
            self.mask.prepare(q.device, "sdpa")
            assert self.mask.dense is not None
            seen = self.mask.dense[end - 1].nonzero()[:, 0]
        bias = None
        if self.relative is not None and self.offsets is not None:
            table = F.pad(self.relative.flatten(1), (0, 1))
            bias = table[:, self.offsets.index[end - 1, seen]][:, None]  # (H, 1, n)
        out = attend(q, k[:, :, seen], v[:, :, seen], causal=False, backend=self.backend, bias=bias)
        return out.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """A pre-norm GPT-2 block. The residual stream is (B, T, C), and what the MLP before adds to it comes beside it.

    So a compiled block fuses that addition with its first norm, forward and backward.
    """

    def __init__(self, config: GPTConfig, attention: Attention) -> None:
        super().__init__()
        self.ln_1 = Norm(config.n_embd)
        self.attn = attention
        self.ln_2 = Norm(config.n_embd)
        self.mlp = MLP(config)
        self.drop_attention: nn.Module = nn.Identity()  # or `Dropout`, by `add_dropout`
        self.drop_mlp: nn.Module = nn.Identity()

    def forward(
        self,
        h: Tensor,
        added: Tensor | None = None,
        first_value: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream `h + added`, with attention's output → with the MLP's beside it; and values for `value_residual`.

        The block's output is the sum of the first two; the third is the first block's values.
        """
        if added is not None:
            h = h + added
        out, first_value = self.attn(self.ln_1(h), first_value, cache, layer)
        h = h + self.drop_attention(out)
        return h, self.drop_mlp(self.mlp(self.ln_2(h))), first_value
