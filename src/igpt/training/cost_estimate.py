"""Cost estimate of a training run before it starts: memory per device, FLOPs, days.

Computed from the network's sizes alone. Activations saved for the backward pass are counted tensor by tensor for this
project's layers (`tests/training/test_cost_estimate.py` compares them with what autograd saves).
"""

from dataclasses import dataclass

from igpt.metric.throughput import train_flops_per_image
from igpt.model.config import GPTConfig

GB = 1e9
WIDE, NARROW = 4, 2  # bytes per float32, per bfloat16
SECONDS_A_DAY = 86_400
ADAM = 2  # moments per weight
BUCKET = 200_000_000  # elements per DeepSpeed communication bucket


@dataclass(frozen=True)
class Plan:
    """The cost of a run on `devices` devices. Memory in bytes per device, not rounded."""

    n_weight: int
    weights: float
    gradients: float
    optimiser: float
    host: float  # offloaded to host memory, per device
    activations: float  # saved by the forward pass for the backward pass
    working: float  # gathered weights in use and gradients before reduce-scatter
    flops_per_image: float
    images_per_step: int
    steps: int
    devices: int
    peak_flops: float | None  # of one device
    utilisation: float  # expected share of `peak_flops`

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.activations + self.working

    @property
    def step_seconds(self) -> float | None:
        """Expected seconds per step, at `utilisation` of `peak_flops`; None without `peak_flops`."""
        if self.peak_flops is None:
            return None
        return self.flops_per_image * self.images_per_step / (self.peak_flops * self.utilisation * self.devices)

    @property
    def days(self) -> float | None:
        return None if self.step_seconds is None else self.step_seconds * self.steps / SECONDS_A_DAY


def count_parameters(network: GPTConfig) -> dict[str, int]:
    """Number of weights in one block (`block`) and outside the blocks (`rest`)."""
    c, t, v = network.n_embd, network.n_ctx, network.n_vocab
    return {"block": 12 * c**2 + 2 * c, "rest": (2 * v + t) * c + c + (c if network.causal else 0)}


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
    scores: int,
    fused_norm: bool,
    peak_flops: float | None = None,
    utilisation: float = 0.4,
) -> Plan:
    """The cost of a run: `micro_batch` images per forward pass of a device, `batch_size` per step over all.

    `strategy`: ddp (replicated), fsdp, deepspeed_2, deepspeed_3 or deepspeed_3_offload. `scores`: attention scores
    saved per head and image, 0 for fused attention. `fused_norm`: norms save only their input, in any precision.
    """
    sizes = count_parameters(network)
    n = network.n_layer * sizes["block"] + sizes["rest"]
    zero_stage = int(strategy.split("_")[1]) if strategy.startswith("deepspeed") else 0
    # bytes per weight
    width = NARROW if precision == "bf16-true" or (zero_stage and precision == "bf16-mixed") else WIDE
    parts = 1 if strategy == "ddp" else devices
    on_device, in_host = n * width / (1 if zero_stage == 2 else parts), 0.0
    gradients, optimiser = n * width / parts, ADAM * n * width / parts
    working = 0.0
    if zero_stage:  # float32 master weights beside the moments
        optimiser = (ADAM + 1) * n * WIDE / parts
        working = 2 * width * min(BUCKET, n)  # gradient buckets in flight
        precision = "bf16-true" if width == NARROW else precision
    if strategy.endswith("offload"):
        in_host, on_device, gradients, optimiser = on_device + gradients + optimiser, 0.0, 0.0, 0.0
    if strategy == "fsdp" or zero_stage == 3:
        # gathered: the rest for a whole pass, of the blocks the current and the next
        working += width * (2 * sizes["rest"] + 3 * sizes["block"])
    activations = estimate_activation_bytes(
        network, micro_batch, precision=precision, recompute=recompute, scores=scores, fused_norm=fused_norm
    )
    return Plan(
        n_weight=n,
        weights=on_device,
        gradients=gradients,
        optimiser=optimiser,
        host=in_host,
        activations=activations,
        working=working,
        flops_per_image=train_flops_per_image(network) * (4 / 3 if recompute else 1),
        images_per_step=batch_size,
        steps=steps,
        devices=devices,
        peak_flops=peak_flops,
        utilisation=utilisation,
    )


def estimate_activation_bytes(
    network: GPTConfig, images: int, *, precision: str, recompute: bool, scores: int, fused_norm: bool
) -> float:
    """Bytes of activations saved at the end of the forward pass of `images` images.

    With `recompute`: during the backward pass of the first block, after its activations were recomputed.
    """
    c, t, h, v = network.n_embd, network.n_ctx, network.n_head, network.n_vocab
    tokens = images * t
    product = WIDE if precision == "32-true" else NARROW  # bytes per element of matmul inputs
    stream = NARROW if precision == "bf16-true" else WIDE  # bytes per element of the residual stream
    normed = 2 * stream  # its two norms' inputs
    if precision == "bf16-true" and not fused_norm:
        normed = 2 * 2 * WIDE  # computed in float32: the input and the normalised input are saved
    block = tokens * c * (14 * product + normed)  # two normed inputs, q, k, v, attention's output, 4 + 4 in the MLP
    block += images * h * (scores * product if scores else t * WIDE)
    block += 8 * c**2 * product  # the MLP's matrices times the constants of quick-GELU
    if precision == "bf16-mixed":
        block += 4 * c**2 * product  # bfloat16 copies of the other matrices, which autocast saves for the backward pass
    head = tokens * (c * (product + (stream if fused_norm or precision != "bf16-true" else 2 * WIDE)) + v * WIDE)
    if recompute:
        return network.n_layer * tokens * c * stream + block + head
    return network.n_layer * block + head


def format_plan(cost: Plan, *, memory: float | None) -> list[tuple[str, str]]:
    """The plan as table rows (label, value); `memory`: bytes of one device, to state whether it fits."""
    rows = [
        ("weights", f"{cost.n_weight:,}"),
        ("memory on each device: weights", format_gb(cost.weights)),
        ("  gradients", format_gb(cost.gradients)),
        ("  optimiser", format_gb(cost.optimiser)),
        ("  activations", format_gb(cost.activations)),
        ("  put together while in use", format_gb(cost.working)),
        ("  all of it", format_gb(cost.memory)),
        *([("memory of the machine, for each device", format_gb(cost.host))] if cost.host else []),
        ("operations an image", f"{cost.flops_per_image:.3g} FLOP"),
        ("operations a step", f"{cost.flops_per_image * cost.images_per_step:.3g} FLOP"),
        ("images in all", f"{cost.images_per_step * cost.steps:,}"),
    ]
    if cost.step_seconds is None or cost.days is None:
        rows.append(("time", "state trainer.peak_tflops, of one device at this precision"))
    else:
        assert cost.peak_flops is not None
        share = f"at {cost.utilisation:.0%} of {cost.peak_flops / 1e12:,.0f} TFLOP/s on {cost.devices} device(s)"
        rows.append(("a step", f"{cost.step_seconds:,.2f} s {share}"))
        rows.append(("all steps", f"{cost.days:,.2f} days, {cost.days * cost.devices:,.1f} device-days"))
    if memory is None:
        rows.append(("fits", "state trainer.memory_gb, of one device"))
    else:
        verdict = "yes" if cost.memory < 0.9 * memory else "hardly" if cost.memory < memory else "no"
        rows.append(("fits", f"{verdict}: {format_gb(cost.memory)} of {format_gb(memory)}, without libraries"))
    return rows


def format_gb(n_byte: float) -> str:
    return f"{n_byte / GB:,.2f} GB"
