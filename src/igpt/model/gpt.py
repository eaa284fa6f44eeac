"""The Image GPT network: tokens → logits over the vocabulary, exactly as OpenAI's `model.py` computes them.

Sizes: B images, T tokens (n_ctx), C width (n_embd), H heads, D = C / H, V vocabulary (n_vocab), L blocks (n_layer).
Where the paper's text and the released code differ (norm, initialisation), we follow the code, because the released
weights have to load here. Names of parameters are those of the released checkpoints.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from igpt.distributed.sharding import copy_into_sharded, unsharded_shape
from igpt.model.attention import attend, self_attention, split_heads
from igpt.model.config import SIZES, GPTConfig
from igpt.model.positions import POSITIONS, Positions
from igpt.utils import keyed

NORM_EPS = 1e-5  # added to the mean square, inside the root (`model.py:norm`)
GELU_SLOPE = 1.702  # quick-GELU: x * sigmoid(1.702 x) (`model.py:gelu2`)


class Linear(nn.Module):
    """x @ (scale · weight).T: (…, in) → (…, out), no bias. Unset (NaN) until `GPT.init_weights` or a load."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((n_out, n_in), math.nan))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.linear(x, self.weight if scale == 1.0 else self.weight * scale)


@dataclass
class Cache:
    """Keys and values of every block for the positions seen so far, allocated once: L × 2 × (B, H, n_ctx, D)."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig, rotate: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.n_head, self.causal, self.backend = config.n_head, config.causal, "auto"
        self.rotate = rotate  # rotates queries and keys by position; None: no rotation
        self.not_in_c = config.unsupported(SIZES if rotate else (*SIZES, "positions"))  # settings `attend.c` lacks
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # q, k, v; in each, heads are blocks of D rows
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3C)
        if cache is not None and x.shape[1] == 1:
            out = self._decode_step(qkv, cache, layer)
        elif not self.not_in_c:
            if cache is not None:
                self._update_kv_cache(qkv, cache, layer)
            out = self_attention(qkv, self.n_head, causal=self.causal, backend=self.backend)
        else:
            q, k, v = self._split_heads(qkv, 0) if cache is None else self._update_kv_cache(qkv, cache, layer)
            out = attend(q, k, v, causal=self.causal, backend=self.backend).transpose(1, 2).flatten(2)
        projected: Tensor = self.c_proj(out)
        return projected

    def _split_heads(self, qkv: Tensor, start: int) -> tuple[Tensor, ...]:
        """Queries, keys (both rotated) and values of positions start, start + 1, …: 3 × (B, H, T, D)."""
        q, k, v = split_heads(qkv, self.n_head)
        return (q, k, v) if self.rotate is None else (self.rotate(q, start), self.rotate(k, start), v)

    def _update_kv_cache(self, qkv: Tensor, cache: Cache, layer: int) -> tuple[Tensor, ...]:
        """Writes the keys and values of these positions to the cache; returns `_split_heads`: 3 × (B, H, T, D)."""
        t = qkv.shape[1]
        start, end = cache.length, cache.length + t
        assert t == 1 or start == 0, "a cache is filled by one prompt, then by single positions"
        q, k, v = self._split_heads(qkv, start)
        cache.keys[layer][:, :, start:end] = k
        cache.values[layer][:, :, start:end] = v
        return q, k, v

    def _decode_step(self, qkv: Tensor, cache: Cache, layer: int) -> Tensor:
        """Attention of one new position, (B, 1, C), over all cached ones: nothing to mask."""
        q, end = self._update_kv_cache(qkv, cache, layer)[0], cache.length + 1
        k, v = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]
        return attend(q, k, v, causal=False, backend=self.backend).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """C → 4C → C with quick-GELU between.

    quick_gelu(x) = x·sigmoid(1.702 x) = silu(1.702 x) / 1.702. Both factors are multiplied into the (smaller) weights,
    so the activations need one fused kernel, which saves only its input for the backward pass.
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if torch.compiler.is_compiling():  # the compiler fuses this itself
            x = self.c_fc(x)
            out = self.c_proj(x * torch.sigmoid(GELU_SLOPE * x))
        else:
            out = self.c_proj(F.silu(self.c_fc(x, GELU_SLOPE)), 1 / GELU_SLOPE)
        return out


class _CPUNorm(torch.autograd.Function):
    """`Norm` with half the passes over memory of autograd's own backward; saves only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        r = mean_square.add_(NORM_EPS).rsqrt_()  # (…, 1)
        ctx.save_for_backward(x, g, r)
        y: Tensor = (x * r).mul_(g)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, g, r = ctx.saved_tensors
        product = (dy * x).flatten(0, -2)  # (N, C)
        dg = r.flatten() @ product  # Σ_n dy x r
        along = (product @ g).view(r.shape) * r**3 / x.shape[-1]  # the gradient through r, along x
        return (dy * g).mul_(r).addcmul_(x, along, value=-1), dg


class Norm(nn.Module):
    """RMS norm, x / √(mean(x²) + 1e-5) · g: no mean is subtracted and no bias added, despite OpenAI's name `ln`."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((n_embd,), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == self.g.dtype == torch.float32 and not torch.compiler.is_compiling():
            y: Tensor = _CPUNorm.apply(x, self.g)  # type: ignore[no-untyped-call]  # PyTorch has no type for it
            return y
        return F.rms_norm(x, self.g.shape, self.g, NORM_EPS)


class Block(nn.Module):
    """A pre-norm GPT-2 block, (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig, rotate: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.ln_1 = Norm(config.n_embd)
        self.attn = Attention(config, rotate)
        self.ln_2 = Norm(config.n_embd)
        self.mlp = MLP(config.n_embd)

    def forward(self, h: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        h = h + self.attn(self.ln_1(h), cache, layer)
        h = h + self.mlp(self.ln_2(h))
        return h


class GPT(nn.Module):
    """Tokens (B, T) int64 → logits (B, T, V); `logits[:, i]` predicts `tokens[:, i]`.

    `causal` (AR): a learned start vector `sos` shifts the input, so position i sees tokens 0 … i-1.
    Not causal (BERT): every position sees every position whose `visible` is True; the embedding of the others is
    zeroed before the position is added. No biases, no dropout. Source: Chen et al. 2020, §2, `model.py:model`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.n_layer, self.n_embd, self.n_head = config.n_layer, config.n_embd, config.n_head
        self.n_ctx, self.n_vocab, self.causal = config.n_ctx, config.n_vocab, config.causal
        self.checkpointing = False
        self.decoding = "auto"  # decode backend of `generate`, one of `dispatch.DECODING`
        self.wte = nn.Parameter(torch.full((self.n_vocab, self.n_embd), math.nan))  # input tokens
        self.positions: Positions | None = None
        if config.positions == "learned":
            self.wpe = nn.Parameter(torch.full((self.n_ctx, self.n_embd), math.nan))  # positions
        else:
            self.positions = POSITIONS[config.positions](config)
        if self.causal:
            self.sos = nn.Parameter(torch.full((self.n_embd,), math.nan))  # start of sequence
        rotates = self.positions is not None and type(self.positions).rotate is not Positions.rotate
        rotate = self.positions.rotate if self.positions is not None and rotates else None
        self.h = nn.ModuleList(Block(config, rotate) for _ in range(self.n_layer))
        self.ln_f = Norm(self.n_embd)
        self.wtet = nn.Parameter(torch.full((self.n_vocab, self.n_embd), math.nan))  # output head, not tied to wte

    def allocate(self, device: torch.device | str) -> None:
        """Allocates every weight of a network on the meta device, uninitialised, and computes its buffers."""
        self.to_empty(device=device)
        if self.positions is not None:
            rebuilt = type(self.positions)(self.config)
            for table, computed in zip(self.positions.buffers(), rebuilt.buffers(), strict=True):
                table.copy_(computed)

    @property
    def blocks(self) -> list[Block]:
        """`h`, typed."""
        return [block for block in self.h if isinstance(block, Block)]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every weight in place, keyed by its name: independent of order, sharding and device.

        The head starts at zero, so the first loss is exactly ln V. Only the attention's output projection depends
        on depth, as in the code (`model.py`, initialisers); the paper says "as in Sparse Transformer".
        """
        for name, weight in self.named_parameters():
            std = self._init_std(name)
            drawn = torch.full(unsharded_shape(weight), 1.0 if name.endswith(".g") else 0.0, device="cpu")
            if std:
                draw = torch.Generator().manual_seed(keyed.key(seed, "init", 0) ^ keyed.key(0, name))
                drawn.normal_(0, std, generator=draw)
            copy_into_sharded(weight, drawn)  # drawn on the CPU: every device gets the same weights

    def _init_std(self, name: str) -> float:
        if name.endswith("attn.c_attn.weight"):
            return 1 / math.sqrt(self.n_embd)
        if name.endswith("attn.c_proj.weight"):
            return 1 / math.sqrt(self.n_embd * self.n_layer)
        if name.endswith(".g"):
            return 0.0
        return {"wpe": 0.01, "wtet": 0.0}.get(name, 0.02)  # 0.02: wte, sos and both MLP matrices

    def embed(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """The embedding h^0 of content and position: (B, T) int64, visible (B, T) bool → (B, T, C)."""
        b, t = tokens.shape
        if t != self.n_ctx:
            raise ValueError(f"got {t} tokens an image, this network has {self.n_ctx} positions")
        content = F.embedding(tokens[:, :-1] if self.causal else tokens, self.wte)
        if visible is not None:
            content = content * (visible[:, :-1] if self.causal else visible)[..., None]
        if self.causal:
            content = torch.cat([self.sos.expand(b, 1, -1), content], dim=1)
        return self._add_positions(content, 0)

    def _add_positions(self, content: Tensor, start: int) -> Tensor:
        """Token embeddings with the encodings of positions start, start + 1, … added: (B, T, C) → (B, T, C)."""
        if self.positions is not None:
            return self.positions.add(content, start)
        end = start + content.shape[1]
        return content + (self.wpe if (start, end) == (0, self.n_ctx) else self.wpe[start:end])

    def hidden_states(self, tokens: Tensor, visible: Tensor | None = None) -> Iterator[Tensor]:
        """The residual stream h^0, …, h^L, one (B, T, C) at a time: the embedding, then after each block."""
        h = self.embed(tokens, visible)
        yield h
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h)
            yield h

    def trunk(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """The last hidden states after `ln_f`, input of the token and class heads: (B, T) → (B, T, C)."""
        last = deque(self.hidden_states(tokens, visible), maxlen=1).pop()  # the others are freed
        normed: Tensor = self.ln_f(last)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token: (…, C) → (…, V)."""
        return F.linear(hidden, self.wtet)

    def forward(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        return self.logits(self.trunk(tokens, visible))

    def new_cache(self, batch: int) -> Cache:
        """An empty key/value cache for `batch` images, in the network's dtype and on its device."""
        shape = (batch, self.n_head, self.n_ctx, self.n_embd // self.n_head)
        dtype, device = self.wte.dtype, self.wte.device  # plain tensors, also where wte is sharded
        keys, values = ([torch.empty(shape, dtype=dtype, device=device) for _ in self.h] for _ in range(2))
        return Cache(keys, values)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of the next position from the tokens (B, t) added since the last call.

        The first call takes the prompt, (B, 0) without one, and puts `sos` in front; later calls take (B, 1).
        """
        assert self.causal, "only a causal network predicts a next token"
        content = F.embedding(tokens, self.wte)
        if cache.length == 0:
            content = torch.cat([self.sos.expand(len(tokens), 1, -1), content], dim=1)
        h = self._add_positions(content, cache.length)
        for layer, block in enumerate(self.blocks):
            h = block(h, cache, layer)
        cache.length += content.shape[1]
        return self.logits(self.ln_f(h[:, -1]))  # (B, V)
