"""How long threads of OpenMP spin while they wait for each other. Imports nothing that is slow."""

import os
import sys

# GNU's runtime (gcc, PyTorch on Linux) counts spins, LLVM's and Intel's (clang, PyTorch on macOS) milliseconds
SPIN_LIMITS = {"GOMP_SPINCOUNT": "1500", "KMP_BLOCKTIME": "1"}
SPIN_VARIABLES = (*SPIN_LIMITS, "OMP_WAIT_POLICY")


def limit_spinning() -> None:
    """Sets how long threads spin before they sleep, in the environment of this process and of its children.

    By default they spin for milliseconds at each barrier. When another process runs on the core of one thread, the
    others wait for that thread, and while they spin the system gives it none of their cores.

    No effect if one of `SPIN_VARIABLES` is set, or if PyTorch is imported: runtimes read them when they are loaded.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in SPIN_VARIABLES):
        os.environ.update(SPIN_LIMITS)
