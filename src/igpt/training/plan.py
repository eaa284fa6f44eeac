"""`trainer.plan=true`: the cost estimate of a run on the hardware of its settings, which need not be this machine."""

import os

import torch

from igpt.model import c_library, dispatch
from igpt.model.config import GPTConfig
from igpt.training import cost_estimate as counted
from igpt.training.hardware import HardwareConfig


def plan_run(machine: HardwareConfig, network: GPTConfig, *, batch_size: int, steps: int) -> list[tuple[str, str]]:
    """The cost estimate as table rows (label, value). Nothing is allocated.

    Raises:
        ValueError: the batch does not divide over the devices.
    """
    on_cpu = machine.accelerator == "cpu" or (machine.accelerator == "auto" and not torch.cuda.is_available())
    here = 2 if on_cpu else max(1, torch.cuda.device_count())
    devices = (here if machine.devices == "auto" else machine.devices) * machine.nodes
    if batch_size % devices:
        raise ValueError(f"task.batch_size {batch_size} cannot be shared by {devices} devices: take a multiple")
    per_device = batch_size // devices
    micro_batch = machine.micro_batch or per_device
    if per_device % micro_batch:
        raise ValueError(f"trainer.micro_batch {micro_batch} does not divide the {per_device} images of a device")
    plan = counted.estimate_cost(
        network,
        batch_size=batch_size,
        micro_batch=micro_batch,
        steps=steps,
        devices=devices,
        strategy=machine.strategy if devices > 1 or machine.zero_stage else "ddp",
        precision=machine.precision,
        recompute=machine.activation_checkpointing,
        scores=_count_scores(machine, network, on_cpu),
        fused_norm=not on_cpu,
        peak_flops=None if machine.peak_tflops is None else machine.peak_tflops * 1e12,
        utilisation=machine.utilisation,
    )
    return counted.format_plan(plan, memory=_find_memory(machine, on_cpu, devices))


def _count_scores(machine: HardwareConfig, network: GPTConfig, on_cpu: bool) -> int:
    """Attention scores saved per head and image for the backward pass."""
    dtype = torch.float32 if machine.precision == "32-true" else torch.bfloat16
    t, causal = network.n_ctx, network.causal
    path: str = machine.attention_backend
    device = torch.device("cpu" if on_cpu else "cuda")
    if path == "auto":  # nothing is compiled for a plan
        in_c = on_cpu and c_library.find_compiler() is not None
        path = "native" if in_c else dispatch.unfused_attention_backend(device, dtype, t=t, causal=causal)
    return dispatch.count_saved_scores(dtype, path, t=t, causal=causal)


def _find_memory(machine: HardwareConfig, on_cpu: bool, devices: int) -> float | None:
    """Bytes of one device: `memory_gb`, else those of this machine, shared by the processes on a CPU; None: unknown."""
    if machine.memory_gb is not None:
        return machine.memory_gb * counted.GB
    if on_cpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
