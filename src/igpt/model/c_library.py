"""The C library (`attend.c`, `decode.c`): compiled for this CPU at first use, cached on disk, loaded with ctypes."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from igpt.model import cpu

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "attend.c", FOLDER / "decode.c")
HEADER = FOLDER / "vector.h"
VECTOR = 8  # floats, the width that decode.c is written for
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


def find_compiler() -> list[str] | None:
    """The C compiler's command: `CC` with its options, else `cc`; None if it does not run (`CC=false`)."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    return None if compiler_version(command) is None else command


def compiler_version(command: list[str]) -> str | None:
    """Output of `--version`; None if the compiler is missing or fails."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The loaded C library; None without a working C compiler (`CC`, else `cc`), PyTorch computes instead."""
    compiler = find_compiler()
    if compiler is None:
        log.info("no C compiler (cc) is here: attention and samples are up to three times slower on this CPU")
        return None
    try:
        path = library_path(compiler)
        if not path.is_file():
            compile_library(path, compiler)
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        text = getattr(error, "stderr", None) or str(error)
        log.warning("attend.c and decode.c could not be compiled; without them this is slower: %s", text.strip()[:300])
        return None
    long, pointer = ctypes.c_long, ctypes.c_void_p
    _declare(loaded.igpt_step, None, [*[long] * 8, ctypes.c_float, *[pointer] * 5])
    _declare(loaded.igpt_attend_room, long, [long] * 3)
    _declare(loaded.igpt_attend, None, [*[long] * 7, *[pointer] * 4])
    _declare(loaded.igpt_attend_backward, None, [*[long] * 7, *[pointer] * 6])
    return loaded


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch has no type for it
def is_available() -> bool:
    """Whether the C library can be loaded; a constant to `torch.compile`."""
    return load_library() is not None


def require_library(setting: str) -> ctypes.CDLL:
    """The loaded C library. Raises ValueError naming `setting` if there is no working C compiler."""
    functions = load_library()
    if functions is None:
        raise ValueError(f"{setting} needs a C compiler (cc, or what CC names): choose auto")
    return functions


def _declare(function: Any, returned: type | None, taken: list[Any]) -> None:
    function.restype, function.argtypes = returned, taken


def library_path(compiler: list[str]) -> Path:
    """Path of the compiled library in the user's cache. File name = hash of (sources, options, compiler, CPU features).

    Machines of different CPUs can therefore share one home directory.
    """
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
    options = [*compiler[1:], *target(compiler), *FLAGS]
    made_of = "\0".join([*texts, *options, compiler_version(compiler) or "", platform.machine(), cpu.cpu_features()])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "igpt" / f"native-{digest}.so"


def target(compiler: list[str]) -> list[str]:
    """`-march=native`, unless `CC` already names a CPU (`cc -march=x86-64-v3`)."""
    return [] if any(word.startswith(("-march=", "-mcpu=")) for word in compiler[1:]) else ["-march=native"]


def compile_library(path: Path, compiler: list[str]) -> None:
    """Compiles to a temporary folder, then renames to `path`, so no process loads half a file.

    Raises:
        CalledProcessError: the compiler fails.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / "native.so"
        command = [*compiler, *target(compiler), *FLAGS, "-x", "c", *map(str, SOURCES), "-o", str(temporary), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        temporary.replace(path)
