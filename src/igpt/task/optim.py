"""The paper's optimiser and schedule."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, *, warmup_steps: int, steps: int) -> float:
    """The share of the peak learning rate at a step: linear up to step `warmup_steps`, then a cosine to 0 at `steps`.

    Source: Chen et al. 2020, §3.1 (one epoch of warm-up, then cosine to zero; linear is the usual reading).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adam(
    parameters: Iterable[nn.Parameter], *, learning_rate: float, beta1: float, beta2: float, weight_decay: float
) -> Adam:
    """Adam as in Chen et al. 2020, §3.1, in PyTorch's fused form."""
    return Adam(parameters, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)


def scheduled(optimizer: Adam, *, warmup_steps: int, steps: int) -> LambdaLR:
    """`warmup_cosine` of the optimiser's rate."""
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps=warmup_steps, steps=steps))


def check_schedule(*, learning_rate: float, warmup_steps: int, steps: int) -> None:
    """Raises ValueError on a rate that is not above 0, or a warm-up that is not shorter than the run."""
    if not learning_rate > 0:
        raise ValueError(f"task.learning_rate must be above 0, got {learning_rate}")
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"task.warmup_steps {warmup_steps} must be below task.steps {steps}, and not negative")
