"""Part `memory` of `gpu.py`: what training takes of the card's memory against the plan, and one step of iGPT-XL."""

import argparse
from collections.abc import Mapping
from typing import Any

import machine
import torch
from gpu_train import TrainingStep, describe_network, find_room, plan_memory
from gpu_units import Unit
from networks import SIZES

from igpt.model.config import GPTConfig

XL = GPTConfig(n_layer=60, n_embd=3072, n_head=24, n_ctx=4096, n_vocab=512, causal=True)  # the paper's, at 64×64
# ways to train XL on one card, the paper's arithmetic first
XL_WAYS = [("bf16-mixed", False), ("bf16-mixed", True), ("bf16-true", False), ("bf16-true", True)]
GB = 1e9


def measure_memory(seconds: float, size: str, precision: str, recompute: bool, device: str) -> dict[str, Any]:
    """Planned bytes and the most that PyTorch allocated in two training steps of half the batch that would fit."""
    network = describe_network(size)
    room = find_room(device) / 2
    images = SIZES[size][-1]
    while images > 1 and plan_memory(network, images, precision=precision, recompute=recompute, device=device) > room:
        images //= 2
    return train_and_weigh(network, images, precision, recompute, device)


def train_and_weigh(network: GPTConfig, images: int, precision: str, recompute: bool, device: str) -> dict[str, Any]:
    step = TrainingStep(network, device, precision=precision, recompute=recompute)
    tokens = step.draw_tokens(images)
    step(tokens)  # Adam's moments are there from the second on
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = machine.with_timer(lambda: step(tokens).item())()
    return {
        "images": images, "precision": precision, "recompute": recompute, "seconds": seconds, "loss": loss,
        "weights": sum(weight.numel() for weight in step.net.parameters()),
        "planned_bytes": plan_memory(network, images, precision=precision, recompute=recompute, device=device),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }  # fmt: skip


def choose_xl_way(network: GPTConfig, room: float, device: str) -> tuple[str, bool]:
    """The first of `XL_WAYS` whose step of one image is expected to fit into `room` bytes.

    Raises:
        ValueError: none does.
    """
    planned = {}
    for precision, recompute in XL_WAYS:
        planned[precision, recompute] = plan_memory(network, 1, precision=precision, recompute=recompute, device=device)
        if planned[precision, recompute] <= room:
            return precision, recompute
    raise ValueError(
        f"a step of XL takes at least {min(planned.values()) / GB:.0f} GB, {room / GB:.0f} GB are free: take a larger "
        "card, or several (trainer=fsdp), or trainer=deepspeed_3_offload"
    )


def step_xl(seconds: float, device: str, tiny: bool) -> dict[str, Any]:
    """One image's training step of XL, in the first of `XL_WAYS` that fits."""
    network = describe_network("tiny") if tiny else XL
    precision, recompute = choose_xl_way(network, find_room(device), device)
    return train_and_weigh(network, 1, precision, recompute, device)


def list_units(args: argparse.Namespace) -> list[Unit]:
    units = []
    for size in ["tiny"] if args.tiny else ["s", "m", "l"]:
        for precision, recompute in [("bf16-mixed", False), ("bf16-mixed", True), ("bf16-true", False)]:
            name = f"{size} {precision}{' recomputed' if recompute else ''}"
            few = (size, precision, recompute, args.device)
            units.append(Unit("memory", name, 1 if args.tiny else 30, measure_memory, few))
    units.append(Unit("memory", "xl", 1 if args.tiny else 90, step_xl, (args.device, args.tiny)))
    return units


def make_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| a step | weights | images | planned, GB | `max_memory_allocated`, GB | planned ÷ measured | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in figures.items():
        if (r := entry.get("result")) is None:
            continue
        peak = r["peak_bytes"]
        measured = f"{peak / GB:.2f} | {r['planned_bytes'] / peak:.2f}" if peak else "– | –"
        how = f"{name}, {r['precision']}{', recomputed' * r['recompute']}" if name == "xl" else name
        planned = f"{r['planned_bytes'] / GB:.2f}"
        lines.append(f"| {how} | {r['weights']:,} | {r['images']} | {planned} | {measured} | {r['seconds']:.2f} |")
    return lines if len(lines) > 2 else []
