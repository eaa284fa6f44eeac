"""Optimisers (the paper's Adam, and Muon) and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Adam, Muon, Optimizer
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from torch.optim.lr_scheduler import LambdaLR

from igpt.checkpoint.training_state import is_block_matrix


def warmup_cosine(step: int, *, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up over `warmup_steps`, then a cosine to 0 at `steps`.

    Source: Chen et al. 2020, §3.1 (one epoch of warm-up, then cosine to zero; linear is the usual reading).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_stable_decay(step: int, *, warmup_steps: int, decay_share: float, ends: Sequence[int]) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the peak, and linear to 0 at each of `ends`.

    After each but the last, the training's, it returns to the peak at once. `decay_share`: the share of the steps up to
    an end in which it falls. Sources: Hu et al. 2024, "MiniCPM" (WSD); Wen et al. 2024, "Understanding
    warmup-stable-decay learning rates: a river valley loss landscape view" (several ends: WSD-S).
    """
    end = next((end for end in ends if step < end), ends[-1])
    return min(1.0, (step + 1) / max(1, warmup_steps), (end - step) / max(1.0, decay_share * end))


def make_adam(
    parameters: Iterable[nn.Parameter], *, learning_rate: float, beta1: float, beta2: float, weight_decay: float
) -> Adam:
    """Adam as in Chen et al. 2020, §3.1, PyTorch's fused implementation."""
    adam = Adam(parameters, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
    adam._step_supports_amp_scaling = False  # no loss is scaled; if True, Lightning refuses to clip under bf16-mixed
    return adam


class MuonAdam(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, Adam for all else: `task.optimizer=muon`.

    Combines PyTorch's Muon and Adam as one optimiser with one learning rate: Muon's updates are scaled to the RMS of
    Adam's, so that a rate tuned for Adam fits (Liu et al. 2025, "Muon is scalable for LLM training"). Muon stores one
    moment per weight, Adam two. Under FSDP2 every rank gathers each update, in bfloat16, and orthogonalises it whole.
    """

    def __init__(
        self, net: nn.Module, *, learning_rate: float, beta1: float, beta2: float, weight_decay: float
    ) -> None:
        named = list(net.named_parameters())
        matrices = [weight for name, weight in named if is_block_matrix(name, weight.ndim)]
        chosen = {id(weight) for weight in matrices}
        self._muon = Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        others = [weight for _, weight in named if id(weight) not in chosen]
        self._adam = make_adam(others, learning_rate=learning_rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        super().__init__([*self._muon.param_groups, *self._adam.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of both; returns the closure's loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part, groups in ((self._muon, self.param_groups[:1]), (self._adam, self.param_groups[1:])):
            part.state, part.param_groups = self.state, groups  # loading a checkpoint replaces them
            step: Callable[[], Any] = part.step
            if part is self._muon and any(isinstance(weight, DTensor) for weight in groups[0]["params"]):
                self._step_sharded(groups[0])
            else:
                step()
        return loss

    @torch.no_grad()
    def _step_sharded(self, group: dict[str, Any]) -> None:
        """`Muon.step` of sharded matrices: as of whole ones, to the bit, with one gathering of each.

        PyTorch's own computes on shards what it can: some 15 collectives a matrix, and sums of bfloat16 in other order.
        """
        for weight in group["params"]:
            if weight.grad is None:
                continue
            momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight.grad))
            momentum.lerp_(weight.grad, 1 - group["momentum"])
            update = weight.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            direction = _zeropower_via_newtonschulz(
                update.bfloat16().full_tensor(), group["ns_coefficients"], group["ns_steps"], group["eps"]
            )
            sharded = distribute_tensor(direction, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(sharded, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], weight.shape))


def make_optimizer(name: str, net: nn.Module, **settings: float) -> Optimizer:
    """The optimiser `name` (`adam` or `muon`) of all weights of `net`."""
    return MuonAdam(net, **settings) if name == "muon" else make_adam(net.parameters(), **settings)


def make_scheduler(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    steps: int,
    decay_share: float | None = None,
    cooled_at: Sequence[int] = (),
) -> LambdaLR:
    """A scheduler that multiplies the optimiser's rate by `warmup_cosine`; with a `decay_share` by
    `warmup_stable_decay`, whose ends are the steps `cooled_at` and the last.
    """
    if decay_share is None:
        return LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps=warmup_steps, steps=steps))
    share, ends = decay_share, (*cooled_at, steps)
    return LambdaLR(
        optimizer,
        lambda step: warmup_stable_decay(step, warmup_steps=warmup_steps, decay_share=share, ends=ends),
    )


def every_step(schedule: LambdaLR) -> OptimizerLRScheduler:
    """Optimiser and schedule as `configure_optimizers` returns them: a scheduler step per optimiser step."""
    return {"optimizer": schedule.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
