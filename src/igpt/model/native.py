"""The decoder in C (`decode.c`): compiled for this CPU when first wanted, kept on disk, loaded."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.c")
VECTOR = 8  # floats, the width that decode.c is written for
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """`igpt_step`, or None where there is no C compiler (`CC`, else `cc`) or it cannot: then PyTorch does the work."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        log.info("no C compiler (cc) is here: tokens are drawn without decode.c, up to three times slower")
        return None
    try:
        place = kept_at(compiler)
        if not place.is_file():
            compile_to(place, compiler)
        loaded = ctypes.CDLL(str(place))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        said = getattr(error, "stderr", None) or str(error)
        log.warning("decode.c could not be compiled; tokens are drawn without it, slower: %s", said.strip()[:300])
        return None
    longs, pointer = [ctypes.c_long] * 8, ctypes.c_void_p
    loaded.igpt_step.argtypes = [*longs, ctypes.c_float, *[pointer] * 5]
    loaded.igpt_step.restype = None
    return loaded


def kept_at(compiler: list[str]) -> Path:
    """Where the compiled file is kept: one for each source, compiler and kind of CPU, so that a shared home serves."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_of = "\0".join([SOURCE.read_text(), *FLAGS, version, platform.machine(), _cpu()])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "igpt" / f"decode-{digest}.so"


def compile_to(place: Path, compiler: list[str]) -> None:
    """Compiles beside `place`, then renames: another process never loads half a file. Raises CalledProcessError."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / "decode.so"
        command = [*compiler, *FLAGS, "-x", "c", str(SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        made.replace(place)


def _cpu() -> str:
    """What this CPU can do: code for one that can do more would end in an illegal instruction."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
