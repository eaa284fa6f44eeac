"""The Image GPT network: tokens → logits over the vocabulary, exactly as OpenAI's `model.py` computes them.

Sizes: B images, T tokens (n_ctx), C width (n_embd), H heads, D = C / H, V vocabulary (n_vocab), L blocks (n_layer).
Where the paper's text and the released code differ (norm, initialisation), we follow the code, because the released
weights have to load here. Names of parameters are those of the released checkpoints.
"""

import math
from collections import deque
from collections.abc import Container, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt.distributed.sharding import copy_into_sharded, unsharded_shape
from igpt.model.block import Attention, Block, Cache, Offsets
from igpt.model.config import GPTConfig
from igpt.model.layers import Norm
from igpt.model.patterns import Pattern
from igpt.model.positions import POSITIONS, Factorised, Positions
from igpt.model.sparse_mask import SparseMask
from igpt.utils import keyed

# weights that are not drawn: gains; a block's values and the first one's in equal parts (as Zhou et al. 2024); no bias
INITIAL = {"g": 1.0, "value_mix": 0.5, "relative": 0.0}
# methods that read weights and are called from outside `forward`: where weights are sharded, each gathers them
FORWARD_METHODS = ("trunk", "step", "logits", "pool_layers")


class GPT(nn.Module):
    """Tokens (B, T) int64 → logits (B, T, V); `logits[:, i]` predicts `tokens[:, i]`.

    `causal` (AR): a learned start vector `sos` shifts the input, so position i sees tokens 0 … i-1.
    Not causal (BERT): every position sees every position whose `visible` is True; the embedding of the others is
    zeroed before the position is added. No biases; dropout only by `add_dropout`. Source: Chen et al. 2020, §2,
    `model.py:model`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.n_layer, self.n_embd, self.n_head = config.n_layer, config.n_embd, config.n_head
        self.n_ctx, self.n_vocab, self.causal = config.n_ctx, config.n_vocab, config.causal
        self.checkpointing = False
        self.drop: nn.Module = nn.Identity()  # of the embedding; or `Dropout`, by `add_dropout`
        self.decoding = "auto"  # decode backend of `generate`, one of `dispatch.DECODING`
        self.wte = nn.Parameter(torch.full((self.n_vocab, self.n_embd), math.nan))  # input tokens
        if "learned" in config.positions.split("+"):
            self.wpe = nn.Parameter(torch.full((self.n_ctx, self.n_embd), math.nan))  # positions
        self.positions = nn.ModuleDict({name: POSITIONS[name](config) for name in config.encodings})
        if self.causal:
            self.sos = nn.Parameter(torch.full((self.n_embd,), math.nan))  # start of sequence
        rotations = [each for each in self.encodings if type(each).rotate is not Positions.rotate]
        masks = {pattern: SparseMask(pattern) for pattern in config.patterns if isinstance(pattern, Pattern)}
        offsets = Offsets(config) if config.relative_bias else None
        self.h = nn.ModuleList(
            Block(
                config,
                Attention(
                    config, layer, rotations, masks.get(pattern) if isinstance(pattern, Pattern) else None, offsets
                ),
            )
            for layer, pattern in enumerate(config.patterns)
        )
        self.ln_f = Norm(self.n_embd)
        self.wtet = nn.Parameter(torch.full((self.n_vocab, self.n_embd), math.nan))  # output head, not tied to wte

    @property
    def encodings(self) -> list[Positions]:
        """The position encodings beside `wpe`."""
        return [each for each in self.positions.values() if isinstance(each, Positions)]

    def allocate(self, device: torch.device | str) -> None:
        """Allocates every weight of a network on the meta device, uninitialised, and computes its buffers."""
        self.to_empty(device=device)
        for positions in self.encodings:
            rebuilt = type(positions)(self.config)
            for table, computed in zip(positions.buffers(), rebuilt.buffers(), strict=True):
                table.copy_(computed)

    def prepare_tables(self) -> None:
        """Computes masks and offsets on this network's device, unless present; compiled blocks only read them."""
        device = self.wte.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.wte.dtype
        for block in self.blocks:
            block.attn.prepare_tables(device, dtype)

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
            drawn = torch.full(unsharded_shape(weight), INITIAL.get(name.rpartition(".")[2], 0.0), device="cpu")
            if std:
                draw = torch.Generator().manual_seed(keyed.key(seed, "init", 0) ^ keyed.key(0, name))
                drawn.normal_(0, std, generator=draw)
            copy_into_sharded(weight, drawn)  # drawn on the CPU: every device gets the same weights

    def _init_std(self, name: str) -> float:
        if name.endswith("attn.c_attn.weight"):
            return 1 / math.sqrt(self.n_embd)
        if name.endswith("attn.c_proj.weight"):
            return 1 / math.sqrt(self.n_embd * self.n_layer)
        if name.rpartition(".")[2] in INITIAL:
            return 0.0
        if name.startswith("positions."):
            return POSITIONS[name.split(".")[1]].init_std
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
        end = start + content.shape[1]
        if hasattr(self, "wpe"):
            content = content + (self.wpe if (start, end) == (0, self.n_ctx) else self.wpe[start:end])
        for positions in self.encodings:
            content = positions.add(content, start)
        return content

    @property
    def has_position_table(self) -> bool:
        """Whether positions are one table of vectors that are added to the embeddings, and nothing else."""
        is_added = all(isinstance(each, Factorised) for each in self.encodings)
        return is_added and len(self.encodings) + hasattr(self, "wpe") == 1

    def position_table(self) -> Tensor:
        """The vectors that are added to the embeddings, (T, C); only with `has_position_table`, of whole weights."""
        assert self.has_position_table, "make_decode_step has seen to it"
        encodings = [each for each in self.encodings if isinstance(each, Factorised)]
        return encodings[0].table(0, self.n_ctx) if encodings else self.wpe

    def hidden_states(self, tokens: Tensor, visible: Tensor | None = None) -> Iterator[Tensor]:
        """The residual stream h^0, …, h^L, one (B, T, C) at a time: the embedding, then after each block."""
        h = self.drop(self.embed(tokens, visible))
        yield h
        self.prepare_tables()
        first_value: Tensor | None = None
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h, first_value = checkpoint(block, h, first_value, use_reentrant=False, preserve_rng_state=False)
            else:
                h, first_value = block(h, first_value)
            yield h

    def trunk(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """The last hidden states after `ln_f`, input of the token and class heads: (B, T) → (B, T, C)."""
        last = deque(self.hidden_states(tokens, visible), maxlen=1).pop()  # the others are freed
        normed: Tensor = self.ln_f(last)
        return normed

    def pool_layers(
        self, tokens: Tensor, visible: Tensor | None, *, layers: Container[int], last: int, normed: bool
    ) -> Tensor:
        """Means over positions of the hidden states after `layers` blocks: (B, T) → (P, B, C), P of 0 … `last`.

        `normed`: after the norm that reads them, `ln_1` of the next block or `ln_f`. Later blocks are not computed.
        """
        norms = [*(block.ln_1 for block in self.blocks), self.ln_f]
        up_to_last = zip(norms[: last + 1], self.hidden_states(tokens, visible), strict=False)
        pooled = [
            (norm(h) if normed else h).mean(dim=1)  # (B, T, C) → (B, C)
            for layer, (norm, h) in enumerate(up_to_last)
            if layer in layers
        ]
        return torch.stack(pooled)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token: (…, C) → (…, V)."""
        return F.linear(hidden, self.wtet)

    def forward(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        return self.logits(self.trunk(tokens, visible))

    def new_cache(self, batch: int) -> Cache:
        """An empty key/value cache for `batch` images, in the network's dtype and on its device."""
        b, h, t, d = batch, self.n_head, self.n_ctx, self.n_embd // self.n_head
        dtype, device = self.wte.dtype, self.wte.device  # plain tensors, also where wte is sharded
        cache = Cache([], [])
        for block in self.blocks:
            if block.attn.is_linear:  # sums, begun at zero
                cache.keys.append(torch.zeros(b, h, d, device=device))
                cache.values.append(torch.zeros(b, h, d, d, device=device))
            else:
                cache.keys.append(torch.empty(b, h, t, d, dtype=dtype, device=device))
                cache.values.append(torch.empty(b, h, t, d, dtype=dtype, device=device))
        return cache

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of the next position from the tokens (B, t) added since the last call.

        The first call takes the prompt, (B, 0) without one, and puts `sos` in front; later calls take (B, 1).
        """
        assert self.causal, "only a causal network predicts a next token"
        content = F.embedding(tokens, self.wte)
        if cache.length == 0:
            content = torch.cat([self.sos.expand(len(tokens), 1, -1), content], dim=1)
        h = self._add_positions(content, cache.length)
        self.prepare_tables()
        first_value: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            h, first_value = block(h, first_value, cache, layer)
        cache.length += content.shape[1]
        return self.logits(self.ln_f(h[:, -1]))  # (B, V)
