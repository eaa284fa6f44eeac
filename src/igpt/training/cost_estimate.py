"""Cost estimate of a training run before it starts: memory per device, FLOPs, days.

Computed from the network's config alone. Activations saved for the backward pass are counted tensor by tensor for this
project's layers (`tests/training/test_cost_estimate.py` compares them with what autograd saves).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from igpt.metric.throughput import train_flops_per_image
from igpt.model import dispatch
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.model.linear_attention import CHUNK
from igpt.model.patterns import Pattern
from igpt.model.sparse_mask import SparseMask

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
    working: float  # gathered weights in use, gradients before reduce-scatter, tables of masks
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
    """Number of weights in all blocks (`blocks`), in the largest block (`block`) and outside the blocks (`rest`)."""
    with torch.device("meta"):  # shapes without memory
        net = GPT(network)
    blocks = [sum(weight.numel() for weight in block.parameters()) for block in net.blocks]
    n = sum(weight.numel() for weight in net.parameters())
    return {"blocks": sum(blocks), "block": max(blocks), "rest": n - sum(blocks)}


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
    peak_flops: float | None = None,
    utilisation: float = 0.4,
) -> Plan:
    """The cost of a run: `micro_batch` images per forward pass of a device, `batch_size` per step over all.

    `strategy`: ddp (replicated), fsdp, or a stage of DeepSpeed. `backends`: of attention, one per layer; of linear
    attention any. `on_gpu`: norms save only their input, in any precision, and `sdpa` with biases no scores.
    """
    sizes = count_parameters(network)
    n = sizes["blocks"] + sizes["rest"]
    zero_stage = int(strategy.split("_")[1]) if strategy.startswith("deepspeed") else 0
    # bytes per weight
    width = NARROW if precision == "bf16-true" or (zero_stage and precision == "bf16-mixed") else WIDE
    parts = 1 if strategy == "ddp" else devices
    on_device, in_host = n * width / (1 if zero_stage == 2 else parts), 0.0
    gradients, optimiser = n * width / parts, ADAM * n * width / parts
    working = float(_count_table_bytes(network, backends))
    if zero_stage:  # float32 master weights beside the moments
        optimiser = (ADAM + 1) * n * WIDE / parts
        working += 2 * width * min(BUCKET, n)  # gradient buckets in flight
        precision = "bf16-true" if width == NARROW else precision
    if strategy.endswith("offload"):
        in_host, gradients, optimiser = gradients + optimiser, 0.0, 0.0
        if zero_stage == 3:
            in_host, on_device = in_host + on_device, 0.0
    if strategy == "fsdp" or zero_stage == 3:
        # gathered: the rest for a whole pass, of the blocks the current and the next
        working += width * (2 * sizes["rest"] + 3 * sizes["block"])
    activations = estimate_activation_bytes(
        network, micro_batch, precision=precision, recompute=recompute, backends=backends, on_gpu=on_gpu
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
    network: GPTConfig, images: int, *, precision: str, recompute: bool, backends: Sequence[str], on_gpu: bool
) -> float:
    """Bytes of activations saved at the end of the forward pass of `images` images.

    With `recompute`: during the backward pass of the largest block, after its activations were recomputed.
    """
    c, tokens = network.n_embd, images * network.n_ctx
    product = WIDE if precision == "32-true" else NARROW  # bytes per element of matmul inputs
    stream = NARROW if precision == "bf16-true" else WIDE  # bytes per element of the residual stream
    layers = list(zip(network.patterns, backends, strict=True))
    sizes = {
        (pattern, backend): _estimate_block_bytes(
            network, pattern, images, precision=precision, backend=backend, on_gpu=on_gpu
        )
        for pattern, backend in dict.fromkeys(layers)
    }
    head = tokens * c * (product + (stream if on_gpu or precision != "bf16-true" else 2 * WIDE))
    head += tokens * network.n_vocab * WIDE
    if on_gpu and network.relative_bias:  # of every pair's bias, in the backward pass of one layer at a time
        head += images * network.n_head * network.n_ctx**2 * product
    if recompute:
        first_value = tokens * 3 * c * product if network.value_residual else 0
        return len(layers) * tokens * c * stream + first_value + max(sizes.values()) + head
    return sum(sizes[layer] for layer in layers) + head


def _estimate_block_bytes(
    network: GPTConfig, pattern: str | Pattern, images: int, *, precision: str, backend: str, on_gpu: bool
) -> float:
    """Bytes of activations that one block saves."""
    c, tokens, hidden = network.n_embd, images * network.n_ctx, network.hidden_size
    product = WIDE if precision == "32-true" else NARROW
    stream = NARROW if precision == "bf16-true" else WIDE
    is_gated, is_scaled = network.activation == "swiglu", network.activation == "quick_gelu"
    normed = 2 * stream  # its two norms' inputs
    if precision == "bf16-true" and not on_gpu:
        normed = 2 * 2 * WIDE  # computed in float32: the input and the normalised input are saved
    block: float = tokens * c * (3 * product + normed)  # two normed inputs, attention's output
    block += tokens * hidden * product * (4 if is_gated else 2)  # the MLP's inner activations
    unfused_norm = network.qk_norm and product == NARROW and not on_gpu
    if unfused_norm:
        block += tokens * 4 * c * WIDE  # of queries and keys, as above
    if network.value_residual or (network.qk_norm and not unfused_norm):
        block += tokens * 3 * c * product  # q, k, v as they were before
    block += _estimate_attention_bytes(network, pattern, images, product=product, backend=backend, on_gpu=on_gpu)
    of_mlp = (3 if is_gated else 2) * c * hidden
    if is_scaled:
        block += of_mlp * product  # the MLP's matrices times the constants of quick-GELU
    if precision == "bf16-mixed":  # bfloat16 copies of the other matrices, which autocast saves for the backward pass
        block += (4 * c**2 + (0 if is_scaled else of_mlp)) * product
    return block


def _estimate_attention_bytes(
    network: GPTConfig, pattern: str | Pattern, images: int, *, product: int, backend: str, on_gpu: bool
) -> float:
    """Bytes that attention itself saves: queries, keys, values, scores, masks."""
    c, t, h = network.n_embd, network.n_ctx, network.n_head
    if pattern == "linear":  # float32: queries, keys and values (which bfloat16 has not saved), then what chunks need
        saved = images * t * c * (3 if product == WIDE else 2)
        if not network.causal:
            return WIDE * (saved + images * c * (5 * t + c // h))
        padded = -(-t // CHUNK) * CHUNK
        return WIDE * (saved + images * padded * (4 * c + h * CHUNK + c * (c // h) / CHUNK))
    is_dense = backend in ("sdpa", "bmm")
    if network.relative_bias:
        mask = t**2 if network.causal or pattern != "full" else 0
        if on_gpu and backend == "sdpa":
            return images * t * (3 * c * product + h * WIDE) + h * t**2 * product + mask
        width = WIDE if backend == "sdpa" else product  # which is computed in float32
        return images * width * (3 * c * t + h * t**2) + mask
    mask = 0
    if isinstance(pattern, Pattern):
        scores = SparseMask(pattern).count_saved_scores(backend)
        if is_dense:
            mask = t**2 * (product if backend == "sdpa" else 1)
    else:
        dtype = torch.float32 if product == WIDE else torch.bfloat16
        scores = dispatch.count_saved_scores(dtype, backend, t=t, causal=network.causal)
    return images * (3 * c * t * product + h * (scores * product if scores else t * WIDE)) + mask


def _count_table_bytes(network: GPTConfig, backends: Sequence[str]) -> int:
    """Bytes of dense masks and of indices of offsets; the tables of other backends are small."""
    layers = zip(network.patterns, backends, strict=True)
    masks = {pattern for pattern, backend in layers if isinstance(pattern, Pattern) and backend in ("sdpa", "bmm")}
    return network.n_ctx**2 * (len(masks) + 4 * network.relative_bias)


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
