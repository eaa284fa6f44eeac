"""The C library (`attend*.c`, `decode.c`): compiled for this CPU at first use, cached on disk, loaded with ctypes."""

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
from typing import Any

import torch

from igpt.model import cpu
from igpt.utils import files
from igpt.utils.program import user_cache

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "attend.c", FOLDER / "attend_sparse.c", FOLDER / "decode.c")
HEADERS = (FOLDER / "vector.h", FOLDER / "attend.h")
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
        loaded = _load_or_compile(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        log.warning("attend.c and decode.c could not be compiled; without them this is slower: %s", text.strip()[:300])
        return None
    long, pointer = ctypes.c_long, ctypes.c_void_p
    _declare(loaded.igpt_step, None, [*[long] * 8, ctypes.c_float, *[pointer] * 5])
    _declare(loaded.igpt_attend_room, long, [long] * 3)
    _declare(loaded.igpt_attend, None, [*[long] * 7, *[pointer] * 4])
    _declare(loaded.igpt_attend_backward, None, [*[long] * 7, *[pointer] * 6])
    _declare(loaded.igpt_attend_sparse_room, long, [*[long] * 3, pointer])
    _declare(loaded.igpt_attend_sparse, None, [*[long] * 6, *[pointer] * 8])
    _declare(loaded.igpt_attend_sparse_backward, None, [*[long] * 6, *[pointer] * 10])
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


def _load_or_compile(compiler: list[str]) -> ctypes.CDLL:
    """The library in the user's cache, else a new one, which is kept there if that can be written and trusted.

    Raises:
        OSError: no folder for temporary files, or one without permission to execute.
        CalledProcessError: the compiler fails.
    """
    reason: Exception | None = None
    try:
        path = library_path(compiler)
        if (kept := find_library(path)) is not None:
            return ctypes.CDLL(str(kept))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = error
    with files.temporary_folder(Path(tempfile.gettempdir()) / "igpt-library") as folder:
        built = compile_library(folder, compiler)
        try:
            if reason is None:
                return ctypes.CDLL(str(keep_library(built, path)))
        except OSError as error:
            reason = error
        log.warning("attend.c and decode.c were compiled for this process alone, since the cache fails: %s", reason)
        return ctypes.CDLL(str(built))


def library_path(compiler: list[str]) -> Path:
    """Path of the compiled library in the user's cache. File name = hash of (sources, options, compiler, CPU features).

    Machines of different CPUs can therefore share one home directory. `keep_library` adds the content's SHA-256.
    """
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    options = [*compiler[1:], *target(compiler), *FLAGS]
    made_of = "\0".join([*texts, *options, compiler_version(compiler) or "", platform.machine(), cpu.cpu_features()])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    return user_cache() / "kernels" / f"native-{digest}.so"


def find_library(path: Path) -> Path | None:
    """The library that `keep_library` wrote; None, and removed, if it is damaged or can be changed by others.

    Raises:
        PermissionError: others may write into its folder.
    """
    for kept in sorted(path.parent.glob(f"{path.stem}-*.so")):
        cpu.check_private(path.parent)
        try:
            cpu.check_private(kept)
            if files.sha256(kept) == kept.stem.rpartition("-")[2]:
                return kept
            problem = "its SHA-256 is not that in its name"
        except OSError as error:
            problem = str(error)
        log.warning("%s is damaged, attend.c and decode.c are compiled again: %s", kept, problem)
        kept.unlink(missing_ok=True)
    return None


def keep_library(built: Path, path: Path) -> Path:
    """Copies a library beside `path`, its SHA-256 in the name, atomically. Raises OSError if others may write there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    cpu.check_private(path.parent)
    files.remove_parts(path.parent)
    kept = path.with_name(f"{path.stem}-{files.sha256(built)}.so")
    with files.atomic_path(kept) as temporary:
        shutil.copyfile(built, temporary)
    return kept


def target(compiler: list[str]) -> list[str]:
    """`-march=native`, unless `CC` already names a CPU (`cc -march=x86-64-v3`)."""
    return [] if any(word.startswith(("-march=", "-mcpu=")) for word in compiler[1:]) else ["-march=native"]


def compile_library(folder: Path, compiler: list[str]) -> Path:
    """Compiles to a file in `folder`, which also holds the compiler's temporary files.

    Raises:
        CalledProcessError: the compiler fails.
    """
    built = folder / "native.so"
    command = [*compiler, *target(compiler), *FLAGS, "-x", "c", *map(str, SOURCES), "-o", str(built), "-lm"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return built
