"""The precision that a run computes in: what `trainer.precision=auto` chooses, and what the log says of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from igpt.settings.devices import Precision

if TYPE_CHECKING:
    from igpt.training.hardware import HardwareConfig  # which imports this module

AMPERE = 8  # first CUDA compute capability with bfloat16 units
BF16_SPEEDUP = 8  # bfloat16 over float32 products of an H100: an estimate from its data sheet, not measured
BF16_BITS = 9  # significant bits of bfloat16 and one: a change below 2**-9 of a weight rounds to none
NAMES: dict[Precision, str] = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16 (weights float32)",
    "bf16-true": "bfloat16 (weights, too)",
}


def is_for_gpu(trainer: Mapping[str, Any]) -> bool:
    """Whether these settings mean GPUs: those of this machine or, for a plan, those that they state.

    A plan with `accelerator: auto` and `memory_gb` is for other machines than this one, which have GPUs.
    """
    if trainer.get("accelerator") == "cpu":
        return False
    is_stated = trainer.get("accelerator") == "gpu" or trainer.get("memory_gb") is not None
    return torch.cuda.is_available() or bool(trainer.get("plan") is True and is_stated)


def resolve_precision(trainer: Mapping[str, Any]) -> Any:
    """`precision` of these settings; `auto` is bf16-mixed on GPUs that have bfloat16 units, else 32-true."""
    if trainer.get("precision") != "auto":
        return trainer.get("precision")
    is_planned = trainer.get("plan") is True and trainer.get("memory_gb") is not None  # other GPUs than those here
    return "bf16-mixed" if is_for_gpu(trainer) and (is_planned or has_bfloat16()) else "32-true"


def has_bfloat16() -> bool:
    """Whether every GPU of this machine computes bfloat16 in hardware; True if there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return all(torch.cuda.get_device_capability(index)[0] >= AMPERE for index in range(count))


def describe_device(hardware: "HardwareConfig", *, trains: bool = True) -> str:
    """`on 8 × NVIDIA H100 in bfloat16 (weights float32)`; of a CPU only several processes, and bfloat16; else ""."""
    count, precision, products = hardware.rank.count, hardware.precision, hardware.matmul_precision
    computed = NAMES[precision]
    if hardware.device.type != "cuda":
        processes = f"{count} processes" if count > 1 else ""
        return processes if precision == "32-true" else f"{processes or 'on the CPU'} in {computed}"
    if hardware.zero_stage and precision == "bf16-mixed" and trains:
        computed = "bfloat16 (weights, too; float32 ones in the optimiser)"
    if precision == "32-true" and products in ("high", "medium"):
        computed += f", products in {'TF32' if products == 'high' else 'bfloat16'}"
    return f"on {count} × {torch.cuda.get_device_name(hardware.device)} in {computed}"


def list_precision_notes(hardware: "HardwareConfig", *, trains: bool) -> list[str]:
    """What to know about this precision on this device, each a line of the log."""
    notes = []
    if hardware.device.type == "cuda" and hardware.precision == "32-true":
        if has_bfloat16():
            note = f"trainer.precision=bf16-mixed is about {BF16_SPEEDUP} times as fast on such a GPU (an estimate)"
        else:
            note = "this GPU has no bfloat16 units, so trainer.precision=auto is float32"
        if hardware.matmul_precision in ("auto", "highest"):
            note += "; trainer.matmul_precision=high allows TF32, of 11 bits, for products and convolutions"
        notes.append(note)
    if trains and hardware.precision == "bf16-true":
        notes.append(describe_small_steps())
    return notes


def describe_small_steps() -> str:
    """The note on training with bfloat16 weights.

    Of a network of 2 layers, 150 steps and a cosine, 31 to 58 % of all changes of a weight were lost (rates 0.01 to
    1e-4), 86 to 98 % of the last 20 steps'; the loss ended 0.01 to 0.04 nats higher.
    """
    return (
        "trainer.precision=bf16-true rounds every weight to bfloat16: a step that changes one by less than "
        f"1/{2**BF16_BITS} of itself is lost; bf16-mixed keeps float32 weights"
    )
