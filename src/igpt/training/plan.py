"""`trainer.plan=true`: the cost estimate of a run on the hardware of its settings, which need not be this machine."""

import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from igpt.model import c_library, dispatch
from igpt.model.config import GPTConfig
from igpt.model.patterns import Pattern
from igpt.tokens.code_search import CHUNK, GPU_CHUNK
from igpt.tokens.vqvae import VQVAEConfig, build_decoder, build_encoder
from igpt.training import cost_estimate as counted
from igpt.training.hardware import HardwareConfig


def plan_run(machine: HardwareConfig, network: GPTConfig, *, batch_size: int, steps: int) -> list[tuple[str, str]]:
    """The cost estimate as table rows (label, value). Nothing is allocated.

    Raises:
        ValueError: the batch does not divide over the devices, or the attention backend does not compute this network.
    """
    machine.check_network(network)
    on_cpu = _is_on_cpu(machine)
    devices, micro_batch = _share_batch(machine, batch_size, on_cpu)
    plan = counted.estimate_cost(
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
        peak_flops=None if machine.peak_tflops is None else machine.peak_tflops * 1e12,
        utilisation=machine.utilisation,
    )
    return counted.format_plan(plan, memory=_find_memory(machine, on_cpu, devices))


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
    weights = float(cost.n_weight * counted.WIDE)
    plan = counted.Plan(
        n_weight=cost.n_weight,
        weights=weights,
        gradients=weights,
        optimiser=counted.ADAM * weights,
        host=0.0,
        activations=micro_batch * cost.activations / (1 if machine.precision == "32-true" else 2),
        working=float((CHUNK if on_cpu else GPU_CHUNK) * counted.WIDE),  # distances to codes
        flops_per_image=cost.flops,
        images_per_step=batch_size,
        steps=steps,
        devices=devices,
        peak_flops=None if machine.peak_tflops is None else machine.peak_tflops * 1e12,
        utilisation=machine.utilisation,
    )
    n_vector = batch_size * (side // config.factor) ** 2
    rows = counted.format_plan(plan, memory=_find_memory(machine, on_cpu, devices))
    return [
        rows[0],
        (
            "vectors a step",
            f"{n_vector:,}, {'enough' if n_vector >= config.codes else 'too few'} for {config.codes:,} codes",
        ),
        *rows[1:],
    ]


def _is_on_cpu(machine: HardwareConfig) -> bool:
    return machine.accelerator == "cpu" or (machine.accelerator == "auto" and not torch.cuda.is_available())


def _share_batch(machine: HardwareConfig, batch_size: int, on_cpu: bool) -> tuple[int, int]:
    """(devices, images per forward pass on one). Raises ValueError if the batch does not divide over them."""
    here = 2 if on_cpu else max(1, torch.cuda.device_count())
    devices = (here if machine.devices == "auto" else machine.devices) * machine.nodes
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
        return machine.memory_gb * counted.GB
    if on_cpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
