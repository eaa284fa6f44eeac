"""`trainer.plan=true`: the cost estimate of a run on the hardware of its settings, which need not be this machine."""

import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from igpt.metric.result import Number
from igpt.metric.throughput import train_flops_per_image
from igpt.model import c_library, dispatch
from igpt.model.config import GPTConfig
from igpt.model.patterns import Pattern
from igpt.tokens.code_search import CHUNK, GPU_CHUNK
from igpt.tokens.vqvae import VQVAEConfig, build_decoder, build_encoder
from igpt.training import cost_estimate as counted
from igpt.training.communication import GB, WIDE, Communication, count_sent_bytes
from igpt.training.hardware import HardwareConfig
from igpt.training.precision import is_for_gpu

log = logging.getLogger(__name__)


def plan_run(
    machine: HardwareConfig,
    network: GPTConfig,
    *,
    batch_size: int,
    steps: int,
    optimizer: str = "adam",
    has_average: bool = False,
) -> list[tuple[str, str]]:
    """The cost estimate as table rows (label, value). Nothing is allocated.

    Raises:
        ValueError: the batch does not divide over the devices, or the attention backend does not compute this network.
    """
    plan = estimate_run(
        machine, network, batch_size=batch_size, steps=steps, optimizer=optimizer, has_average=has_average
    )
    return format_plan(plan, machine)


def estimate_run(
    machine: HardwareConfig, network: GPTConfig, *, batch_size: int, steps: int, optimizer: str, has_average: bool
) -> counted.Plan:
    """The cost estimate of a training on the devices of these settings, as `plan_run`.

    `has_average`: an average of the weights is kept (`task.ema`). Its `memory` of a run on GPUs estimates
    `torch.cuda.max_memory_allocated`.
    """
    machine.check_network(network)
    on_cpu = _is_on_cpu(machine)
    devices, micro_batch = _share_batch(machine, batch_size, on_cpu)
    flops = train_flops_per_image(network) * batch_size * steps / devices
    return counted.estimate_cost(
        network,
        batch_size=batch_size,
        micro_batch=micro_batch,
        steps=steps,
        devices=devices,
        strategy=machine.strategy if devices > 1 or machine.zero_stage else "ddp",
        precision=machine.precision,
        residual=machine.residual,
        recompute=machine.activation_checkpointing,
        backends=_choose_backends(machine, network, on_cpu),
        on_gpu=not on_cpu,
        is_compiled=_is_compiled(machine, network, on_cpu, flops),
        optimizer=optimizer,
        has_average=has_average,
        peak_flops=None if machine.peak_tflops is None else machine.peak_tflops * 1e12,
        utilisation=machine.utilisation,
        bandwidth=None if machine.bandwidth_gbs is None else machine.bandwidth_gbs * GB,
    )


def estimate_memory(
    machine: HardwareConfig,
    network: GPTConfig,
    *,
    batch_size: int,
    optimizer: str = "adam",
    has_average: bool = False,
) -> float:
    """Bytes of a device at the peak of a training step: what `torch.cuda.max_memory_allocated` should be on a GPU."""
    return estimate_run(
        machine, network, batch_size=batch_size, steps=1, optimizer=optimizer, has_average=has_average
    ).memory


def compare_memory(
    machine: HardwareConfig, network: GPTConfig, measured: Number, *, batch_size: int, optimizer: str, has_average: bool
) -> dict[str, Number]:
    """`train/planned_memory` of a training on a GPU; logs the share of it that was measured, in GB.

    On a CPU nothing: what is measured there are the pages of the whole process.
    """
    if machine.device.type != "cuda":
        return {}
    planned = estimate_memory(machine, network, batch_size=batch_size, optimizer=optimizer, has_average=has_average)
    log.info(
        "memory of a GPU at the peak: %s, %.0f %% of the planned %s",
        format_gb(measured.value * GB), 100 * measured.value * GB / planned, format_gb(planned),
    )  # fmt: skip
    return {"train/planned_memory": Number(planned / GB, "GB", 1)}


def format_plan(cost: counted.Plan, machine: HardwareConfig) -> list[tuple[str, str]]:
    """The plan as table rows (label, value)."""
    on_cpu, n_step = _is_on_cpu(machine), cost.images_per_step
    memory = _find_memory(machine, on_cpu, cost.devices)
    kind = "CPU process" if on_cpu else "GPU"
    plural = "" if cost.devices == 1 else "es" if on_cpu else "s"
    size = "" if on_cpu or memory is None else f" of {memory / GB:,.0f} GB"
    is_alone, n_image = cost.devices == 1, cost.images_per_pass
    how = f", {machine.strategy}" if machine.zero_stage or not is_alone else ""
    recomputed = cost.recomputed_flops * n_step
    has_whole = machine.strategy == "fsdp" and not is_alone and n_image * cost.devices < n_step
    rows = [
        ("planned for", f"{cost.devices} {kind}{plural}{size}{how}, {machine.precision}"),
        ("weights", f"{cost.n_weight:,}"),
        ("memory on each device: weights", format_gb(cost.weights)),
        ("  gradients" + (", whole between passes" if has_whole else ""), format_gb(cost.gradients)),
        ("  optimiser", format_gb(cost.optimiser)),
        *([("  average of the weights", format_gb(cost.average))] if cost.average else []),
        (f"  activations of {n_image:,} image(s)", format_gb(cost.activations)),
        ("  other tensors while in use", format_gb(cost.working)),
        ("  all of it", format_gb(cost.memory)),
        *([("memory of the machine, for each device", format_gb(cost.host))] if cost.host else []),
        ("operations an image", f"{cost.flops_per_image:.3g} FLOP"),
        ("operations a step", f"{cost.flops_per_image * n_step:.3g} FLOP"),
        *([("  besides, to compute activations again", f"{recomputed:.3g} FLOP")] if recomputed else []),
        ("images in all", f"{n_step * cost.steps:,}"),
        *([("communication", cost.communication.text)] if cost.communication.text else []),
        *_format_time(cost, machine),
    ]
    if memory is None:
        rows.append(("fits", "state trainer.memory_gb, of one device"))
    else:
        verdict = "yes" if cost.memory < 0.9 * memory else "hardly" if cost.memory < memory else "no"
        rows.append(("fits", f"{verdict}: {format_gb(cost.memory)} of {format_gb(memory)}, without libraries"))
    return rows


def _format_time(cost: counted.Plan, machine: HardwareConfig) -> list[tuple[str, str]]:
    seconds, least, most = cost.step_seconds, cost.shortest_step_seconds, cost.longest_step_seconds
    if seconds is None or least is None or most is None or cost.peak_flops is None:
        return [("time", "state trainer.peak_tflops, of one device at this precision")]
    stated = " (assumed)" if machine.utilisation is None else ""
    share = f"{cost.utilisation:.0%} of {cost.peak_flops / 1e12:,.0f} TFLOP/s{stated} on {cost.devices} device(s)"
    rows = [("a step", f"{format_seconds(seconds)} at {share}")]
    if most > seconds:
        ends = format_seconds(least), format_seconds(most)
        rows.append(("  with communication", f"{ends[0]} if it is overlapped, {ends[1]} if computation waits for it"))
    days = [f"{step * cost.steps / counted.SECONDS_A_DAY:,.2f}" for step in (least, most)]
    in_all = [f"{step * cost.steps * cost.devices / counted.SECONDS_A_DAY:,.1f}" for step in (least, most)]
    text = f"{' to '.join(dict.fromkeys(days))} days, {' to '.join(dict.fromkeys(in_all))} device-days"
    return [*rows, ("all steps", text)]


def format_seconds(seconds: float) -> str:
    return f"{seconds:,.3f} s" if seconds < 1 else f"{seconds:,.2f} s"


def format_gb(n_byte: float) -> str:
    return f"{n_byte / GB:,.2f} GB"


class VQVAECost(NamedTuple):
    """The cost of training a VQ-VAE, of one image."""

    n_weight: int
    flops: float  # of forward and backward pass, and of the search of the nearest codes
    activations: int  # bytes saved for the backward pass, in float32


def count_vqvae_cost(config: VQVAEConfig, side: int) -> VQVAECost:
    """Counted on the meta device, where nothing is computed, for images of `side` pixels a side."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"):
        encoder, decoder = build_encoder(config), build_decoder(config)
        weights = [*encoder.parameters(), *decoder.parameters()]
        images = torch.empty(1, 3, side, side)
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        decoder(encoder(images)).sum().backward()
    for weight in weights:
        saved.pop(weight.untyped_storage()._cdata, None)
    n_vector = (side // config.factor) ** 2
    search = 2 * n_vector * config.codes * config.width if config.quantizer == "ema" else 0
    return VQVAECost(sum(w.numel() for w in weights), counter.get_total_flops() + search, sum(saved.values()))


def plan_tokenizer(
    machine: HardwareConfig, config: VQVAEConfig, *, side: int, batch_size: int, steps: int
) -> list[tuple[str, str]]:
    """The cost estimate of training a VQ-VAE on crops of `side` pixels, as `plan_run`."""
    on_cpu = _is_on_cpu(machine)
    devices, micro_batch = _share_batch(machine, batch_size, on_cpu)
    cost = count_vqvae_cost(config, side)
    weights = float(cost.n_weight * WIDE)
    plan = counted.Plan(
        n_weight=cost.n_weight,
        weights=weights,
        gradients=weights,
        optimiser=counted.ADAM * weights,
        average=0.0,
        host=0.0,
        activations=micro_batch * cost.activations / (1 if machine.precision == "32-true" else 2),
        working=float((CHUNK if on_cpu else GPU_CHUNK) * WIDE),  # distances to codes
        flops_per_image=cost.flops,
        recomputed_flops=0.0,
        images_per_pass=micro_batch,
        images_per_step=batch_size,
        steps=steps,
        devices=devices,
        communication=Communication(
            *count_sent_bytes(
                in_blocks=cost.n_weight, rest=0, strategy="ddp", precision="32-true", devices=devices, passes=1
            ),
            None if machine.bandwidth_gbs is None else machine.bandwidth_gbs * GB,
        ),
        peak_flops=None if machine.peak_tflops is None else machine.peak_tflops * 1e12,
        utilisation=counted.UTILISATION if machine.utilisation is None else machine.utilisation,
    )
    n_vector = batch_size * (side // config.factor) ** 2
    rows = format_plan(plan, machine)
    return [
        *rows[:2],
        (
            "vectors a step",
            f"{n_vector:,}, {'enough' if n_vector >= config.codes else 'too few'} for {config.codes:,} codes",
        ),
        *rows[2:],
    ]


def _is_on_cpu(machine: HardwareConfig) -> bool:
    return not is_for_gpu(dict(machine))


def _is_compiled(machine: HardwareConfig, network: GPTConfig, on_cpu: bool, flops: float) -> bool:
    """Whether training of these operations per device compiles the blocks, as `HardwareConfig.prepare`."""
    if machine.compile != "auto":
        return machine.compile
    device, half = torch.device("cpu" if on_cpu else "cuda"), machine.precision != "32-true"
    gains = dispatch.is_worth_compiling(device, n_embd=network.n_embd, flops=flops, half=half)
    return gains and not machine.zero_stage


def _share_batch(machine: HardwareConfig, batch_size: int, on_cpu: bool) -> tuple[int, int]:
    """(devices, images per forward pass on one). Raises ValueError if the batch does not divide over them."""
    here = 2 if on_cpu else max(1, torch.cuda.device_count())
    devices = (here if machine.devices == "auto" else machine.devices) * machine.nodes
    devices = devices if machine.plan else machine.rank.count
    if batch_size % devices:
        raise ValueError(f"task.batch_size {batch_size} cannot be shared by {devices} devices: take a multiple")
    per_device = batch_size // devices
    micro_batch = machine.micro_batch or per_device
    if per_device % micro_batch:
        raise ValueError(f"trainer.micro_batch {micro_batch} does not divide the {per_device} images of a device")
    return devices, micro_batch


def _choose_backends(machine: HardwareConfig, network: GPTConfig, on_cpu: bool) -> list[str]:
    """Attention backend of every layer."""
    dtype = torch.float32 if machine.precision == "32-true" else torch.bfloat16
    device, requested = torch.device("cpu" if on_cpu else "cuda"), str(machine.attention_backend)
    if requested == "auto" and on_cpu and c_library.find_compiler() is not None:  # nothing is compiled for a plan
        requested = "native"
    full = requested
    if requested in ("auto", "flex"):
        full = dispatch.unfused_attention_backend(device, dtype, t=network.n_ctx, causal=network.causal)
    if network.relative_bias:
        full = dispatch.sparse_backend(requested, device, dtype, dense=True)
    head_size = network.n_embd // network.n_head
    sparse = dispatch.sparse_backend(requested, device, dtype, head_size=head_size, dense=network.relative_bias)
    return [sparse if isinstance(pattern, Pattern) else full for pattern in network.patterns]


def _find_memory(machine: HardwareConfig, on_cpu: bool, devices: int) -> float | None:
    """Bytes of one device: `memory_gb`, else those of this machine, shared by the processes on a CPU; None: unknown."""
    if machine.memory_gb is not None:
        return machine.memory_gb * GB
    if on_cpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
