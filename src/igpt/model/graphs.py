"""Decode step on a GPU, recorded as a CUDA graph and replayed: Python does not launch its hundred small kernels."""

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.model.block import Cache
from igpt.model.gpt import GPT
from igpt.model.layers import GELU_SLOPE, NORM_EPS

log = logging.getLogger(__name__)

SPAN = 128  # positions per graph; each graph reads all keys up to its last position


class RecordedStep:
    """A network's decode step with fixed shapes: new tokens (B, 1) → logits (B, V).

    Under autocast, weights and cache are cast once instead of at every step. On a CPU the same step runs without a
    graph, for tests. Takes the keys and values over, emptying the cache.
    """

    def __init__(self, net: GPT, cache: Cache) -> None:
        device = net.wte.device
        mixed = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if mixed else net.wte.dtype
        self.net, self.now = net, cache.length
        self.keys = [keys.to(self.dtype) for keys in cache.keys]  # (B, H, n_ctx, D)
        self.values = [values.to(self.dtype) for values in cache.values]
        cache.keys.clear()
        cache.values.clear()
        for unwritten in (*self.keys, *self.values):  # masked, but uninitialised memory may hold NaN
            unwritten[:, :, self.now :] = 0
        self.weights = [
            [self._narrow(weight) for weight in
             (block.attn.c_attn.weight, block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)]
            for block in net.blocks
        ]  # fmt: skip
        self.head = self._narrow(net.wtet)
        self.table = net.position_table().detach()
        self.tokens = torch.zeros(self.keys[0].shape[0], dtype=torch.int64, device=device)
        self.position = torch.tensor([self.now], device=device)
        self.mask = torch.zeros(net.n_ctx, dtype=self.dtype, device=device)  # additive: 0 for positions seen
        self.mask[self.now :] = -math.inf
        self.logits = torch.empty(0)
        self._replay: Callable[[], None] = lambda: None
        self._end = 0  # positions that the recorded step reads
        self._device = device if device.type == "cuda" else -1  # -1: leave the current one
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == 1, "one new token for each image"
        assert self.now < self.net.n_ctx, "the cache is full"
        self.tokens.copy_(tokens[:, 0])
        with torch.cuda.device(self._device), torch.autocast(self.head.device.type, enabled=False):
            if self.now >= self._end:
                self._end = min(self.net.n_ctx, (self.now // SPAN + 1) * SPAN)
                try:
                    self._record()
                except RuntimeError as error:  # e.g. too little memory on a shared GPU
                    log.warning("a step is not recorded, tokens are drawn more slowly: %s", error)
                    self._replay = self._step
            self._replay()
        self.now += 1
        return self.logits

    def _narrow(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def _record(self) -> None:
        if self._pool is None:
            self._replay = self._step
            return
        position, mask = self.position.clone(), self.mask.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch has no type for it
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # warm-up: allocations of the first call must not be recorded
                for _ in range(2):
                    self._step()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            self.position.copy_(position)  # the replay writes the same keys again
            self.mask.copy_(mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step()
        self._replay = graph.replay

    def _step(self) -> None:
        """The step at `position`, which it increments. Branches of this code are fixed once it is recorded."""
        net, end = self.net, self._end
        b, c, h = len(self.tokens), net.n_embd, net.n_head
        self.mask.index_fill_(0, self.position, 0.0)
        x = F.embedding(self.tokens, net.wte) + self.table.index_select(0, self.position)  # (B, C)
        x = x if net.residual is None else x.to(net.residual)
        layers = zip(net.blocks, self.weights, self.keys, self.values, strict=True)
        for block, (c_attn, c_proj, c_fc, out), keys, values in layers:
            qkv = F.linear(self._normalize(x, block.ln_1.g), c_attn).view(b, 3, h, 1, c // h)
            q, k, v = qkv.unbind(1)  # (B, H, 1, D)
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            scores = torch.matmul(q, keys[:, :, :end].mT) * (c // h) ** -0.5 + self.mask[:end]  # (B, H, 1, end)
            seen = torch.matmul(scores.softmax(-1, dtype=torch.float32).to(self.dtype), values[:, :, :end])
            x = x + F.linear(seen.reshape(b, c), c_proj)
            wide = F.linear(self._normalize(x, block.ln_2.g), c_fc)
            x = x + F.linear(wide * torch.sigmoid(GELU_SLOPE * wide), out)
        self.logits = F.linear(self._normalize(x, net.ln_f.g), self.head)
        self.position.add_(1).clamp_(max=net.n_ctx - 1)

    def _normalize(self, x: Tensor, g: Tensor) -> Tensor:
        return F.rms_norm(x, g.shape, g.to(x.dtype), NORM_EPS).to(self.dtype)
