"""The device of tests marked gpu. `IGPT_GPU_TESTS_ON=cpu python -m pytest -m gpu` runs them on a CPU: as a rehearsal,
where the tests of CUDA alone are skipped, and others hold the CPU against itself.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("IGPT_GPU_TESTS_ON", "cuda")
ACCELERATOR = "gpu" if DEVICE == "cuda" else DEVICE  # as `trainer.accelerator`
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device, PyTorch sees none"
    ),
]
if DEVICE == "cuda":  # cuBLAS reads it once, at the first product of the process; deterministic algorithms ask for it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs what only CUDA has")
