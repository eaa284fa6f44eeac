"""What a test may not leave changed in the process that runs the next one, and what stands in for another CPU."""

import os
import random
import signal
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.matmul, aten.linear}

# what pytest, Inductor, Triton, Lightning, W&B and scikit-learn keep there for themselves as long as the process lives
OTHERS = ("PYTEST_CURRENT_TEST", "_TORCHINDUCTOR_", "TRITON_", "CUDA_DEVICE_ORDER", "WANDB_SERVICE", "KMP_")
SIGNALS = signal.valid_signals() - {signal.SIGCHLD}


def snapshot() -> dict[str, Any]:
    """Settings and states of this process that every test shares.

    Of PyTorch's global generator only the seed: a loader and a layer's own weights draw from it, which is harmless, but
    who seeds it decides what all later tests draw. From Python's and NumPy's nothing here draws: they must not move.
    SIGCHLD is PyTorch's: it answers it from the first loader with other processes on, once for all.
    """
    return {
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)},
        "working directory": os.getcwd(),
        "seed of PyTorch": torch.initial_seed(),
        "random state of Python": random.getstate(),
        "random state of NumPy": [part if isinstance(part, int) else bytes(part) for part in _numpy_state()],
        "signal handlers": {number: signal.getsignal(number) for number in SIGNALS},
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """What differs, with what it was and is where that can be read."""
    changed = {}
    for name, old in before.items():
        new = after[name]
        if isinstance(old, dict) and old != new:
            keys = sorted({key for key in old | new if old.get(key) != new.get(key)})
            changed[name] = ", ".join(f"{key}: {old.get(key)} → {new.get(key)}" for key in keys)
        elif old != new:
            changed[name] = "changed" if "state" in name else f"{old} → {new}"
    return changed


class Restorer:
    """Puts back, in the end, what has changed since it was made."""

    def __init__(self) -> None:
        self.before = snapshot()
        self._torch, self._numpy = torch.get_rng_state(), np.random.get_state()

    def restore(self) -> dict[str, str]:
        """What had changed."""
        changed = changes(self.before, snapshot())
        for name in changed:
            self._restore(name, self.before[name])
        return changed

    def _restore(self, name: str, value: Any) -> None:
        match name:
            case "float32 matmul precision":
                torch.set_float32_matmul_precision(value)
            case "default dtype":
                torch.set_default_dtype(value)
            case "default device":
                torch.set_default_device(None if value == torch.device("cpu") else value)
            case "threads":
                torch.set_num_threads(value)
            case "environment":
                for key in [key for key in os.environ if key not in value and not key.startswith(OTHERS)]:
                    del os.environ[key]
                os.environ.update(value)
            case "working directory":
                os.chdir(value)
            case "seed of PyTorch":
                torch.set_rng_state(self._torch)
            case "random state of Python":
                random.setstate(value)
            case "random state of NumPy":
                np.random.set_state(self._numpy)
            case "signal handlers":
                for number, handler in value.items():
                    if signal.getsignal(number) != handler:
                        signal.signal(number, handler)


def _numpy_state() -> tuple[Any, ...]:
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return keys.tobytes(), int(position), int(has_gauss), np.float64(gauss).tobytes()


class RoundedProducts(TorchDispatchMode):
    """Rounds what float32 products multiply to bfloat16 where the precision is "medium", as a CPU with AMX does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS and torch.get_float32_matmul_precision() == "medium":
            first = 1 if func.overloadpacket in (aten.addmm, aten.baddbmm) else 0  # what is added is not rounded
            args = [rounded(value) if i in (first, first + 1) else value for i, value in enumerate(args)]
        return func(*args, **(kwargs or {}))


def rounded(operand: torch.Tensor) -> torch.Tensor:
    return operand.bfloat16().float() if operand.dtype == torch.float32 else operand
