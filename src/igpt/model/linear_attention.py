"""Linear attention: a kernel of queries and keys instead of the softmax, so that cost grows with T and not with T².

Sizes: B images, H heads, T positions, D the size of a head. Output i is Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j) over
the keys that it sees, with φ(x) = elu(x) + 1. Source: Katharopoulos et al. 2020, "Transformers are RNNs", §3; in chunks
as Hua et al. 2022, "Transformer Quality in Linear Time", §3.2. Computed in float32 or float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # positions computed at once as a masked product; any number gives the same but for rounding
EPS = 1e-6  # added to the sum of weights, as in the source's code


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, chunk: int = CHUNK) -> Tensor:
    """Linear attention over all positions, with `causal` over positions 0 … i: 3 × (B, H, T, D) → (B, H, T, D)."""
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = feature_map(q), feature_map(k), _widen(v)
        if not causal:
            return _divide(q @ (k.mT @ v), q @ k.sum(-2)[..., None]).to(dtype)
        b, h, t, d = q.shape
        shape = (b, h, -(-t // chunk), chunk, d)  # (B, H, N, c, D)
        q, k, v = (F.pad(x, (0, 0, 0, -t % chunk)).view(shape) for x in (q, k, v))
        states, sums = k.mT @ v, k.sum(-2)  # of each chunk: (B, H, N, D, D), (B, H, N, D)
        before = F.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]  # of all earlier chunks
        sums_before = F.pad(sums.cumsum(2), (0, 0, 1, 0))[:, :, :-1]
        weights = (q @ k.mT).tril()  # (B, H, N, c, c)
        out = _divide(weights @ v + q @ before, weights.sum(-1, keepdim=True) + q @ sums_before[..., None])
        return out.flatten(2, 3)[:, :, :t].to(dtype)


def read_state(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a later position needs of these keys and values: Σ φ(k) (B, H, D) and Σ φ(k) vᵀ (B, H, D, D), float32."""
    with torch.autocast(k.device.type, enabled=False):
        k = feature_map(k)
        return k.sum(-2), k.mT @ _widen(v)


def attend_to_state(q: Tensor, sums: Tensor, state: Tensor) -> Tensor:
    """Output of one query, (B, H, 1, D), over all that `read_state` has read: (B, H, 1, D)."""
    with torch.autocast(q.device.type, enabled=False):
        weights = feature_map(q)
        return _divide(weights @ state, weights @ sums[..., None]).to(q.dtype)


def feature_map(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, positive: float32, of float64 float64."""
    return F.elu(_widen(x)) + 1


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _divide(weighted: Tensor, total: Tensor) -> Tensor:
    return weighted / (total + EPS)
