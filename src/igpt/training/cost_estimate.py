"""Cost estimate of a training run before it starts: memory per device, FLOPs, days.

Computed from the network's config alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from igpt.metric.throughput import train_flops_per_image
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.training.activation_memory import count_table_bytes, estimate_activation_bytes, estimate_backward_bytes
from igpt.training.communication import NARROW, WIDE, Communication, count_sent_bytes

SECONDS_A_DAY = 86_400
ADAM, MUON = 2, 1  # moments per weight
UTILISATION, UTILISATION_RECOMPUTED = 0.4, 0.3  # assumed, not measured: the second is 3/4 of the first
BUCKET = 200_000_000  # elements per DeepSpeed communication bucket


@dataclass(frozen=True)
class Plan:
    """The cost of a run on `devices` devices. Memory in bytes per device, not rounded."""

    n_weight: int
    weights: float
    gradients: float
    optimiser: float
    average: float  # of the weights over steps
    host: float  # offloaded to host memory, per device
    activations: float  # saved by the forward pass for the backward pass
    working: float  # gathered weights in use, gradients before reduce-scatter, tables of masks
    flops_per_image: float  # of the model: operations that recompute activations do not count
    recomputed_flops: float  # per image, besides those of the model
    images_per_pass: int  # on a device at a time
    images_per_step: int
    steps: int
    devices: int
    communication: Communication
    peak_flops: float | None  # of one device
    utilisation: float  # expected share of `peak_flops` by the model's operations, as a run reports it

    @property
    def memory(self) -> float:
        """Bytes that a device holds at the peak of a step."""
        held = self.weights + self.gradients + self.optimiser + self.average
        return held + self.activations + self.working

    @property
    def step_seconds(self) -> float | None:
        """Expected seconds of computation per step, at `utilisation` of `peak_flops`; None without `peak_flops`."""
        if self.peak_flops is None:
            return None
        return self.flops_per_image * self.images_per_step / (self.peak_flops * self.utilisation * self.devices)

    @property
    def longest_step_seconds(self) -> float | None:
        """Seconds per step if communication waits for computation; None without `peak_flops`."""
        return None if self.step_seconds is None else self.step_seconds + (self.communication.seconds or 0.0)

    @property
    def shortest_step_seconds(self) -> float | None:
        """Seconds per step if all communication is overlapped with computation; None without `peak_flops`."""
        return None if self.step_seconds is None else max(self.step_seconds, self.communication.seconds or 0.0)


def count_parameters(network: GPTConfig) -> dict[str, int]:
    """Number of weights in all blocks (`blocks`), in the largest block (`block`) and outside the blocks (`rest`)."""
    blocks, block, rest, _ = _count_weights(network)
    return {"blocks": blocks, "block": block, "rest": rest}


@cache
def _count_weights(network: GPTConfig) -> tuple[int, int, int, int]:
    """As `count_parameters`; and of the matrices in all blocks, which Muon trains."""
    with torch.device("meta"):  # shapes without memory
        net = GPT(network)
    blocks = [sum(weight.numel() for weight in block.parameters()) for block in net.blocks]
    matrices = [weight.numel() for block in net.blocks for weight in block.parameters() if weight.ndim == 2]
    n = sum(weight.numel() for weight in net.parameters())
    return sum(blocks), max(blocks), n - sum(blocks), sum(matrices)


def estimate_cost(
    network: GPTConfig,
    *,
    batch_size: int,
    micro_batch: int,
    steps: int,
    devices: int,
    strategy: str,
    precision: str,
    recompute: bool,
    backends: Sequence[str],
    on_gpu: bool,
    residual: str = "float32",
    is_compiled: bool = False,
    optimizer: str = "adam",
    has_average: bool = False,
    peak_flops: float | None = None,
    utilisation: float | None = None,
    bandwidth: float | None = None,
) -> Plan:
    """The cost of a run: `micro_batch` images per forward pass of a device, `batch_size` per step over all.

    `strategy`: ddp (replicated), fsdp, or a stage of DeepSpeed. `backends`: of attention, one per layer; of linear
    attention any. `on_gpu`: norms save only their input, in any precision, and `sdpa` with biases
    no scores. `has_average`: of the weights, in float32. `utilisation`: None assumes one. `bandwidth`: bytes a second.
    """
    sizes = count_parameters(network)
    n, passes = sizes["blocks"] + sizes["rest"], max(1, batch_size // (devices * micro_batch))
    sent, to_host = count_sent_bytes(
        in_blocks=sizes["blocks"], rest=sizes["rest"], strategy=strategy, precision=precision, devices=devices,
        passes=passes,
    )  # fmt: skip
    zero_stage = int(strategy.split("_")[1]) if strategy.startswith("deepspeed") else 0
    # bytes per weight
    width = NARROW if precision == "bf16-true" or (zero_stage and precision == "bf16-mixed") else WIDE
    parts = 1 if strategy == "ddp" else devices
    on_device, in_host = n * width / (1 if zero_stage == 2 else parts), 0.0
    n_moment = ADAM * n - ((ADAM - MUON) * _count_weights(network)[3] if optimizer == "muon" else 0)
    gradients, optimiser = n * width / parts, n_moment * width / parts
    working = float(count_table_bytes(network, backends))
    if zero_stage:  # float32 master weights beside the moments
        optimiser = (ADAM + 1) * n * WIDE / parts
        working += 2 * width * min(BUCKET, n)  # gradient buckets in flight
        precision = "bf16-true" if width == NARROW else precision
    if strategy.endswith("offload"):
        in_host, gradients, optimiser = gradients + optimiser, 0.0, 0.0
        if zero_stage == 3:
            in_host, on_device = in_host + on_device, 0.0
    if zero_stage == 3:  # gathered: the rest for a whole pass, of the blocks the current and the next
        working += width * (2 * sizes["rest"] + 3 * sizes["block"])
    if strategy == "fsdp":
        # gathered: the rest for a whole pass, of the blocks, in the precision that they compute in, the current and the
        # next; the gradients of the current block, and their copy that is reduced
        computed = WIDE if precision == "32-true" else NARROW
        working += 2 * width * sizes["rest"] + (3 * computed + width) * sizes["block"]
        gradients += n * width if passes > 1 else 0  # whole on every device until the last pass
    has_copies = precision == "bf16-mixed" and strategy != "fsdp"  # which gathers bfloat16 weights
    activations = estimate_activation_bytes(
        network, micro_batch, precision=precision, recompute=recompute, backends=backends, on_gpu=on_gpu,
        residual=residual, has_copies=has_copies, is_cached=has_copies and not is_compiled,
    )  # fmt: skip
    working += estimate_backward_bytes(
        network, micro_batch, precision=precision, recompute=recompute, backends=backends, on_gpu=on_gpu,
        residual=residual,
    )  # fmt: skip
    flops = train_flops_per_image(network)
    assumed = UTILISATION_RECOMPUTED if recompute else UTILISATION
    return Plan(
        n_weight=n,
        weights=on_device,
        gradients=gradients,
        optimiser=optimiser,
        average=n * WIDE / parts if has_average else 0.0,
        host=in_host,
        activations=activations,
        working=working,
        flops_per_image=flops,
        recomputed_flops=flops / 3 if recompute else 0.0,
        images_per_pass=micro_batch,
        images_per_step=batch_size,
        steps=steps,
        devices=devices,
        communication=Communication(sent, to_host, bandwidth),
        peak_flops=peak_flops,
        utilisation=assumed if utilisation is None else utilisation,
    )
