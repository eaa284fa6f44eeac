"""What is written in C (`attend.c`, `decode.c`): compiled for this CPU when first wanted, kept on disk, loaded."""

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


def found_compiler() -> list[str] | None:
    """`CC`, with what it may say behind the name, else `cc`; None where there is none (`CC=false`)."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    return None if compiler_version(command) is None else command


def compiler_version(command: list[str]) -> str | None:
    """What a compiler says of itself; None where it is not there, or fails."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions in C, or None where there is no C compiler (`CC`, else `cc`) or it cannot: PyTorch serves then."""
    compiler = found_compiler()
    if compiler is None:
        log.info("no C compiler (cc) is here: attention and samples are up to three times slower on this CPU")
        return None
    try:
        place = library_path(compiler)
        if not place.is_file():
            compile_to(place, compiler)
        loaded = ctypes.CDLL(str(place))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        said = getattr(error, "stderr", None) or str(error)
        log.warning("attend.c and decode.c could not be compiled; without them this is slower: %s", said.strip()[:300])
        return None
    long, pointer = ctypes.c_long, ctypes.c_void_p
    _declare(loaded.igpt_step, None, [*[long] * 8, ctypes.c_float, *[pointer] * 5])
    _declare(loaded.igpt_attend_room, long, [long] * 3)
    _declare(loaded.igpt_attend, None, [*[long] * 7, *[pointer] * 4])
    _declare(loaded.igpt_attend_backward, None, [*[long] * 7, *[pointer] * 6])
    return loaded


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch has no type for it
def available() -> bool:
    """Whether the functions in C can be had; a constant to `torch.compile`."""
    return library() is not None


def require_library(setting: str) -> ctypes.CDLL:
    """The functions in C. Raises ValueError: `setting` asks for them, and there is no C compiler, or it cannot."""
    found = library()
    if found is None:
        raise ValueError(f"{setting} needs a C compiler (cc, or what CC names): choose auto")
    return found


def _declare(function: Any, returned: type | None, taken: list[Any]) -> None:
    function.restype, function.argtypes = returned, taken


def library_path(compiler: list[str]) -> Path:
    """Where the compiled file is kept: one for each source, compiler and kind of CPU, so that a shared home serves."""
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
    options = [*compiler[1:], *target(compiler), *FLAGS]
    made_of = "\0".join([*texts, *options, compiler_version(compiler) or "", platform.machine(), cpu.features()])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "igpt" / f"native-{digest}.so"


def target(compiler: list[str]) -> list[str]:
    """The option that asks for code for this CPU, unless `CC` names another (`cc -march=x86-64-v3`)."""
    return [] if any(word.startswith(("-march=", "-mcpu=")) for word in compiler[1:]) else ["-march=native"]


def compile_to(place: Path, compiler: list[str]) -> None:
    """Compiles beside `place`, then renames: another process never loads half a file. Raises CalledProcessError."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / "native.so"
        command = [*compiler, *target(compiler), *FLAGS, "-x", "c", *map(str, SOURCES), "-o", str(made), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        made.replace(place)
