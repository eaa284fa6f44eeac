"""What this CPU, and what is set in the environment, make of the same computation."""

import functools
import getpass
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from igpt.distributed.process_state import environment, float32_matmul_precision

SIDE = 512  # of the matrices that are multiplied to find out: kernels for small ones may round where these do not
FPMATH_MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")  # the second is oneDNN's older name
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@functools.cache
def medium_format(device: torch.device) -> str:
    """The format that float32 matrix products at "medium" round their operands to: `fp32` (not at all), `tf32`, `bf16`.

    Found out by one product, once per process and device: CPUs with AMX round to bfloat16, others only take oneDNN's
    kernels, and what a CPU's flags promise may be switched off (`ONEDNN_MAX_CPU_ISA`).
    """
    lost = {"fp32": 2**-12, "tf32": 2**-9}  # is lost beside 1 by all formats of fewer bits than this one
    for name, rest in lost.items():
        factor = torch.full((SIDE, SIDE), 1 + rest, dtype=torch.float32, device=device)
        with torch.inference_mode(), torch.autocast(device.type, enabled=False), float32_matmul_precision("medium"):
            found = float((factor @ factor)[0, 0]) / SIDE
        if found > 1 + 1.5 * rest:  # exact: 1 + 2 rest + rest²; rounded: 1
            return name
    return "bf16"


def rounding_setting() -> str | None:
    """The environment variable that makes oneDNN round float32 operands at any precision, as NAME=VALUE; else None."""
    for name in FPMATH_MODES:
        if (value := os.environ.get(name)) is not None:  # oneDNN looks no further, either
            return None if value.lower() in ("", "strict") else f"{name}={value}"
    return None


def features() -> str:
    """What this CPU can do, as its system says: code for one that can do more would end in an illegal instruction."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def kind() -> str:
    """12 hexadecimal digits that differ where PyTorch or oneDNN take other kernels: by CPU and by their limits."""
    limits = [os.environ.get(name, "") for name in (*ISA_LIMITS, *FPMATH_MODES)]
    made_of = "\0".join([platform.machine(), features(), torch.backends.cpu.get_cpu_capability(), *limits])
    return hashlib.sha256(made_of.encode()).hexdigest()[:12]


@contextmanager
def inductor_cache() -> Iterator[None]:
    """While the block lasts, `torch.compile` keeps its kernels in a folder for this kind of CPU.

    Kernels that had been made for another kind have given losses that are NaN. A folder that the user has set
    (TORCHINDUCTOR_CACHE_DIR) is taken as it is.
    """
    if INDUCTOR_CACHE in os.environ:
        yield
        return
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as containers have them
        user = str(os.getuid())
    place = Path(tempfile.gettempdir()) / f"torchinductor_{user}" / kind()  # below Inductor's own
    with environment(**{INDUCTOR_CACHE: str(place)}):
        yield
