"""Layers of a block without attention: linear map, RMS norm, MLP.

Source: OpenAI's `model.py`, unless a layer says else. Weights are unset (NaN) until `GPT.init_weights` or a load.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from igpt.model.config import GPTConfig

NORM_EPS = 1e-5  # added to the mean square, inside the root (`model.py:norm`)
GELU_SLOPE = 1.702  # quick-GELU: x * sigmoid(1.702 x) (`model.py:gelu2`)


class Linear(nn.Module):
    """x @ (scale · weight).T: (…, in) → (…, out), no bias."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((n_out, n_in), math.nan))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.linear(x, self.weight if scale == 1.0 else self.weight * scale)


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
        self.is_narrow = False  # gives the dtype of its input, under autocast too; sums in float32 all the same

    def forward(self, x: Tensor) -> Tensor:
        if self.is_narrow:
            with torch.autocast(x.device.type, enabled=False):
                return F.rms_norm(x, self.g.shape, self.g.to(x.dtype), NORM_EPS)
        if x.device.type == "cpu" and x.dtype == self.g.dtype == torch.float32 and not torch.compiler.is_compiling():
            y: Tensor = _CPUNorm.apply(x, self.g)  # type: ignore[no-untyped-call]  # PyTorch has no type for it
            return y
        return F.rms_norm(x, self.g.shape, self.g.to(x.dtype), NORM_EPS)  # of queries and keys, under autocast


class MLP(nn.Module):
    """C → 4C → C with quick-GELU between, ReLU² (So et al. 2021, "Primer"), or SwiGLU (Shazeer 2020).

    quick_gelu(x) = x·sigmoid(1.702 x) = silu(1.702 x) / 1.702. Both factors are multiplied into the (smaller) weights,
    so the activations need one fused kernel, which saves only its input for the backward pass.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        is_gated = config.activation == "swiglu"  # rows of `c_fc`: gate, then values
        self.c_fc = Linear(config.n_embd, (2 if is_gated else 1) * config.hidden_size)
        self.c_proj = Linear(config.hidden_size, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if self.activation == "relu2":
            out = self.c_proj(F.relu(self.c_fc(x)).square())
        elif self.activation == "swiglu":
            gate, value = self.c_fc(x).chunk(2, dim=-1)
            out = self.c_proj(F.silu(gate) * value)
        elif torch.compiler.is_compiling():  # the compiler fuses this itself
            x = self.c_fc(x)
            out = self.c_proj(x * torch.sigmoid(GELU_SLOPE * x))
        else:
            out = self.c_proj(F.silu(self.c_fc(x, GELU_SLOPE)), 1 / GELU_SLOPE)
        return out
