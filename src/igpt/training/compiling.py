"""`torch.compile` of a network: which part is compiled, whether this machine can, and what to say where it fails."""

import importlib.util
import logging
import os
import shlex
import shutil
import sysconfig
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException

from igpt.model import c_library
from igpt.model.gpt import GPT

log = logging.getLogger(__name__)


def compile_blocks(net: GPT) -> None:
    """Compiles the blocks of a network, each kind once and not every layer.

    Not the whole trunk, whose layers are unrolled: compiling it takes a second or more a layer, for each of training,
    validation and batches of another size. A block takes what the one before adds to the stream as an argument, so the
    fusion across blocks, which a compiled trunk would gain, is inside. Sharded blocks keep their hooks.
    """
    kinds = {(block.attn.mask, block.attn.is_linear, block.attn.value_mix is None) for block in net.blocks}
    # each with and without an addend, in training and in validation, for several batch sizes; not as an argument of
    # `compile`, which releases before 2.13 may lack
    limit = max(torch._dynamo.config.recompile_limit, 16, 8 * len(kinds))
    torch._dynamo.config.recompile_limit = limit
    for block in net.blocks:
        block.compile()


def can_compile(device: torch.device, *, is_requested: bool) -> bool:
    """Whether `torch.compile` finds what it needs on this machine; if not, this is logged."""
    missing = find_missing(device)
    if missing is not None:
        level = logging.WARNING if is_requested or device.type == "cuda" else logging.INFO
        log.log(level, "nothing is compiled, which is slower: torch.compile needs %s", missing)
    return missing is None


def find_missing(device: torch.device) -> str | None:
    """What `torch.compile` needs on a device and this machine lacks; None if nothing."""
    if device.type == "cuda":  # Triton compiles its launchers
        if importlib.util.find_spec("triton") is None:
            return "the package triton, which PyTorch's CUDA wheels bring"
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None or c_library.compiler_version(shlex.split(compiler)) is None:
            return "a C compiler (gcc, or what CC names)"
    elif c_library.compiler_version(shlex.split(os.environ.get("CXX", "")) or ["g++"]) is None:
        return "a C++ compiler (g++, or what CXX names)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"{header} (Debian's package python3-dev)"


def explain_compile_failure(error: BaseException) -> str | None:
    """A message with the remedy if the error is one of `torch.compile`; else None."""
    if not isinstance(error, TorchDynamoException):
        return None
    cause = getattr(error, "inner_exception", error)  # of a backend
    reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__).strip()
    return f"torch.compile failed ({reason[:300]}): trainer.compile=false computes the same without it"
