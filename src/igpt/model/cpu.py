"""Properties of this CPU, and environment variables, that change the kernels PyTorch uses."""

import fcntl
import functools
import getpass
import hashlib
import logging
import os
import platform
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from igpt.distributed.process_state import environment, float32_matmul_precision
from igpt.utils import files

log = logging.getLogger(__name__)

SIDE = 512  # side of the test matrices; kernels for small matrices may round differently
FPMATH_MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")  # the second is oneDNN's older name
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@functools.cache
def medium_format(device: torch.device) -> str:
    """Operand format of float32 matrix products at precision "medium": `fp32` (unrounded), `tf32` or `bf16`.

    Measured with one product, once per process and device: CPUs with AMX round to bfloat16, others only switch to
    oneDNN's kernels, and CPU flags do not tell, since `ONEDNN_MAX_CPU_ISA` may switch instructions off.
    """
    lost = {"fp32": 2**-12, "tf32": 2**-9}  # 1 + this is exact in the format and rounds to 1 in all shorter ones
    for name, rest in lost.items():
        factor = torch.full((SIDE, SIDE), 1 + rest, dtype=torch.float32, device=device)
        with torch.inference_mode(), torch.autocast(device.type, enabled=False), float32_matmul_precision("medium"):
            error = float((factor @ factor)[0, 0]) / SIDE
        if error > 1 + 1.5 * rest:  # exact: 1 + 2 rest + rest²; rounded: 1
            return name
    return "bf16"


def rounding_setting() -> str | None:
    """Environment variable that makes oneDNN round float32 operands at every precision, as NAME=VALUE; else None."""
    for name in FPMATH_MODES:
        if (value := os.environ.get(name)) is not None:  # the first one set counts, as in oneDNN
            return None if value.lower() in ("", "strict") else f"{name}={value}"
    return None


def cpu_features() -> str:
    """CPU feature flags from the operating system; code compiled for more features dies of an illegal instruction."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def cpu_fingerprint() -> str:
    """Hash (12 hexadecimal digits) of the CPU's features and of the environment's limits on the kernels used."""
    limits = [os.environ.get(name, "") for name in (*ISA_LIMITS, *FPMATH_MODES)]
    made_of = "\0".join([platform.machine(), cpu_features(), torch.backends.cpu.get_cpu_capability(), *limits])
    return hashlib.sha256(made_of.encode()).hexdigest()[:12]


def check_private(path: Path) -> None:
    """Raises PermissionError if other users can change a file of compiled code, or the content of a folder of it."""
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} may be written by others: remove it, or `chmod go-w` it if you trust them")


@contextmanager
def inductor_cache() -> Iterator[None]:
    """Context in which `torch.compile` caches its kernels in a folder for this kind of CPU, of this user alone.

    Kernels compiled for another kind of CPU have given NaN losses. TORCHINDUCTOR_CACHE_DIR, if set, is left unchanged.
    """
    if INDUCTOR_CACHE in os.environ:
        yield
        return
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user id has no name, as in some containers
        user = str(os.getuid())
    folder = Path(tempfile.gettempdir()) / f"torchinductor_{user}" / cpu_fingerprint()  # below Inductor's own
    with ExitStack() as stack:
        try:
            for each in (folder.parent, folder):
                each.mkdir(mode=0o700, exist_ok=True)
                check_private(each)
            stack.enter_context(_checked_kernels(folder))
        except OSError as error:
            log.warning("compiled networks are not kept after this process: %s", error)
            folder = stack.enter_context(files.temporary_folder(folder.parent.parent / "igpt-kernels"))
        stack.enter_context(environment(**{INDUCTOR_CACHE: str(folder)}))
        yield


@contextmanager
def _checked_kernels(folder: Path) -> Iterator[None]:
    """Context in which the compiled kernels (`.so`) that a folder holds at its start are complete.

    The last process that uses the folder lists their SHA-256 in it, unless another one was killed meanwhile, perhaps
    while it wrote one. Damaged and unlisted ones are removed.
    """
    record, users = folder / "checksums.json", ".user.*.part"
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        is_alone = _is_alone(descriptor)
        _remove_damaged(folder, record, is_alone=is_alone)
        if is_alone:
            files.remove_parts(folder, users)
        with files.temporary_path(folder / "user") as mine:  # a killed process leaves it
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            try:
                yield
            finally:
                if _is_alone(descriptor) and list(folder.glob(users)) == [mine]:
                    _list_kernels(folder, record)
    finally:
        os.close(descriptor)


def _is_alone(descriptor: int) -> bool:
    """Whether no other process has the lock, which this one then has; else it waits until it may share it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return False
    return True


def _remove_damaged(folder: Path, record: Path, *, is_alone: bool) -> None:
    try:
        listed = files.read_json(record) if record.is_file() else {}
    except ValueError as error:
        log.warning("%s", error)
        listed = {}
    unlisted = []
    for kernel in sorted(folder.rglob("*.so")):
        expected = listed.get(str(kernel.relative_to(folder)))
        if expected is None:
            unlisted.append(kernel)
        elif files.sha256(kernel) != expected:
            log.warning("%s is damaged and is compiled again", kernel)
            kernel.unlink()
    if unlisted and is_alone:
        log.info("%s: %d kernels without a checksum are compiled again when they are needed", folder, len(unlisted))
        for kernel in unlisted:
            kernel.unlink()


def _list_kernels(folder: Path, record: Path) -> None:
    kernels = sorted(folder.rglob("*.so"))
    try:
        files.write_json(record, {str(kernel.relative_to(folder)): files.sha256(kernel) for kernel in kernels})
    except OSError as error:
        log.warning("compiled networks are compiled again by the next run: %s cannot be written (%s)", record, error)
