"""Image GPT as one would first write it in PyTorch: what our network's own speed is measured against.

Fused q, k, v; `scaled_dot_product_attention` or plain batched products; `x * sigmoid(1.702 x)`; `F.rms_norm`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int, bmm: bool) -> None:
        super().__init__()
        self.n_head, self.bmm = n_head, bmm
        self.norm_1, self.norm_2 = nn.RMSNorm(n_embd, eps=1e-5), nn.RMSNorm(n_embd, eps=1e-5)
        self.qkv, self.proj = nn.Linear(n_embd, 3 * n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)
        self.fc, self.out = nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(4 * n_embd, n_embd, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, self.n_head, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.bmm:
            scores = q @ k.mT / math.sqrt(c / self.n_head)
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1), -math.inf)
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attend(self.norm_1(h))
        x = self.fc(self.norm_2(h))
        return h + self.out(x * torch.sigmoid(1.702 * x))


class PlainGPT(nn.Module):
    def __init__(self, n_layer: int, n_embd: int, n_head: int, n_ctx: int, n_vocab: int, bmm: bool) -> None:
        super().__init__()
        self.wte, self.sos = nn.Embedding(n_vocab, n_embd), nn.Parameter(torch.zeros(n_embd))
        self.wpe = nn.Parameter(torch.zeros(n_ctx, n_embd))
        self.h = nn.ModuleList(PlainBlock(n_embd, n_head, bmm) for _ in range(n_layer))
        self.ln_f, self.head = nn.RMSNorm(n_embd, eps=1e-5), nn.Linear(n_embd, n_vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        sos = self.sos.expand(len(tokens), 1, -1)
        h = torch.cat([sos, self.wte(tokens[:, :-1])], dim=1) + self.wpe
        for block in self.h:
            h = block(h)
        return self.head(self.ln_f(h))
