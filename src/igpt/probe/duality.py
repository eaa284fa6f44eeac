"""Bounds of the minimum of a logistic regression, from its dual problem."""

import torch
from torch import Tensor

BIAS_STEPS = 10  # of Newton's method, at most
ENTRIES = 1 << 24  # size of the logits at a time: heads × images × classes
CHUNK = 1 << 18  # size of the features converted to float64 at a time: images × width, 2 MB


def bound_minima(x: Tensor, hot: Tensor, weight: Tensor, bias: Tensor, penalties: list[float]) -> tuple[Tensor, Tensor]:
    """(objectives of S heads, lower bounds of their minima), each (S,) in nats per image; a bound holds for any head.

    The objective is the mean loss + penalty / 2 · ‖W‖². Features (N, D), one-hot labels (N, K), weight (S, K, D), bias
    (S, K); computed in float64.

    Weak duality: probabilities (N, K) whose mean is the frequency of each class give the lower bound mean entropy -
    ‖(probabilities - hot)ᵀ x / N‖² / (2 · penalty). Taken are those of the head, its bias changed towards that
    mean, mixed with the constant that is missing. If nothing is missing, the gap is ‖gradient‖² / (2 · penalty).
    """
    size = max(1, ENTRIES // hot.numel())
    penalty = torch.tensor(penalties, dtype=torch.float64, device=x.device)
    heads = (torch.split(each, size) for each in (weight.double(), bias.double(), penalty))
    objectives, minima = zip(*(_bound(x, hot, *some) for some in zip(*heads, strict=True)), strict=True)
    return torch.cat(objectives), torch.cat(minima)


def _bound(x: Tensor, hot: Tensor, weight: Tensor, bias: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    n, frequency = len(hot), hot.mean(dim=0)  # (K,)
    columns = weight.flatten(0, 1).mT  # (D, S K)
    rows = torch.split(x, max(1, CHUNK // x.shape[1]))
    without_bias = torch.cat([some.double() @ columns for some in rows])
    without_bias = without_bias.view(n, *bias.shape).transpose(0, 1).contiguous()  # (S, N, K)
    logits = without_bias + bias[:, None]
    loss = (logits.logsumexp(dim=-1) - (logits * hot).sum(dim=-1)).mean(dim=-1)
    objective = loss + penalty / 2 * weight.square().sum(dim=(1, 2))
    absent = frequency == 0
    bias = bias.masked_fill(absent, -torch.inf)
    null_space = 1 / len(frequency) + absent.to(hot).diag()  # a constant in all biases changes nothing
    for step in range(BIAS_STEPS + 1):
        p = (without_bias + bias[:, None]).softmax(dim=-1)
        mean = p.mean(dim=1)  # (S, K)
        excess = torch.where(absent, 0.0, 1 - frequency / mean).amax(dim=-1).clamp(min=0)  # (S,) share of the mean
        if step == BIAS_STEPS or bool((excess < 1e-13).all()):
            break
        hessian = mean.diag_embed() - p.mT @ p / n + null_space
        change = torch.linalg.solve_ex(hessian, mean - frequency).result
        bias = bias - change.nan_to_num(0.0, 1.0, -1.0).clamp(-1, 1)
    kept = 1 - excess[:, None]  # (S, 1)
    p = (kept[:, None] * p + (frequency - kept * mean)[:, None]).clamp(min=0)
    error = torch.split((p - hot).transpose(0, 1).flatten(1) / n, len(rows[0]))  # of (N, S K)
    slope = torch.zeros_like(columns.mT)  # (S K, D)
    for some, of_some in zip(rows, error, strict=True):
        slope.addmm_(of_some.mT, some.double())
    squares = slope.view(weight.shape).square().sum(dim=(1, 2))
    return objective, -torch.xlogy(p, p).sum(dim=-1).mean(dim=-1) - squares / (2 * penalty)
