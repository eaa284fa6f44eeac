"""Tensors of a CUDA device that is not here: what a GPU would refuse because two tensors are on different devices.

Shapes and devices are computed, numbers are not. PyTorch's builds for CPUs refuse even such tensors, until something
tells them how to switch to a device of the kind; a library of three lines does. No backward pass and no FlexAttention,
which ask for a device itself.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from igpt.model import decode, graphs
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.probe.lbfgs import _Problem
from igpt.tokens.lookup import LookupEncoder
from igpt.tokens.palette import Palette
from igpt.utils import keyed
from tests.model.test_options import OPTIONS

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.version.cuda is not None:
        return
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("needs g++")
    folder, of_torch = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    options = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{of_torch / 'include'}", f"-L{of_torch / 'lib'}", "-lc10"]
    subprocess.run([compiler, str(folder / "guard.cpp"), "-o", str(folder / "guard.so"), *options], check=True)
    ctypes.CDLL(str(folder / "guard.so"))


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


def make_net(*, causal: bool = True, **changed: Any) -> GPT:
    """A network whose weights are on the GPU, as `Module.to` has them there."""
    sizes: dict[str, Any] = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_ctx": 64, "n_vocab": 17, "grid": (8, 8, 1)}
    net = GPT(GPTConfig(causal=causal, **sizes | changed))
    for module in net.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    moved = torch.empty_like(tensor, device=GPU)
                    table[name] = torch.nn.Parameter(moved) if table is module._parameters else moved
    for block in net.blocks:
        block.attn.backend = "sdpa" if block.attn.mask is not None else "auto"
    return net


def draw_tokens() -> tuple[Tensor, Tensor]:
    rng_keys = keyed.per_example_keys(keyed.key(0, "test"), torch.arange(4)).to(GPU)
    return torch.zeros(4, 64, dtype=torch.int64, device=GPU), rng_keys


def test_a_mistake_is_seen(fake: FakeTensorMode) -> None:
    """Invariant: what these tests look for is an error."""
    net, (tokens, _) = make_net(), draw_tokens()
    net.positions["planted"] = torch.nn.Identity()
    net.wpe = torch.nn.Parameter(torch.zeros(net.wpe.shape))
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        net(tokens)


@pytest.mark.parametrize(
    "option", ["paper", "factorised_rope_2d", "relative_bias", "local_bias_rope", "mixed", "all_recipes"]
)
def test_networks(option: str, fake: FakeTensorMode) -> None:
    """Invariant: losses, features of every layer, cached steps are on the GPU, from tokens and keys that are."""
    changed = {} if option == "paper" else OPTIONS[option]
    tokens, rng_keys = draw_tokens()
    for objective in (AR(), BERT(mask_probability=0.15)):
        net = make_net(causal=objective.causal, **changed)
        visible = objective.visible_mask(tokens, rng_keys)
        assert objective.loss(net(tokens, visible), tokens, visible).device == GPU
        assert [hidden.mean(1).device for hidden in net.hidden_states(tokens, visible)] == [GPU] * 4
    net = make_net(**changed)
    cache = net.new_cache(4)
    is_sparse = any(block.attn.mask is not None for block in net.blocks)  # one position's keys are read from a mask
    for start, end in ((0, 5), (5, 6), (6, 7))[: 1 if is_sparse else 3]:
        assert net.step(tokens[:, start:end], cache).device == GPU


@pytest.mark.parametrize("backend", ["graphs", "layers"])
def test_sampling(backend: str, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: all tokens of images, whose first rows are given, are drawn on the GPU."""
    monkeypatch.setattr(decode, "is_verified", lambda net, name: True)  # reads numbers
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)  # the step itself, which a GPU records
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    # would be made on the device itself
    monkeypatch.setattr(torch, "tensor", lambda data, device=None: torch.full((len(data),), data[0], device=device))
    monkeypatch.setattr(graphs, "SPAN", 8)
    net, (_, rng_keys) = make_net(n_ctx=16, grid=None), draw_tokens()
    uniforms = keyed.uniform(rng_keys, 16)
    drawn = generate(net, uniforms, Sampling(0.9, 5, 0.9), backend=backend)
    assert (drawn.device, drawn.shape) == (GPU, (4, 16))


def test_tokens_and_probes(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: pixels become tokens where they are; objective and gradient of heads are where features are."""
    monkeypatch.setattr(LookupEncoder, "_load_table", lambda self: np.zeros(8, np.int16))
    encoder = LookupEncoder(Palette(np.zeros((4, 3), np.float32)), None)
    assert encoder(torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device=GPU)).device == GPU
    features, hot = torch.zeros(2, 30, 8, device=GPU), torch.zeros(30, 3, device=GPU)
    problem, theta = _Problem(features, hot, 0.1), torch.zeros(2, 9, 3, device=GPU)
    logits = problem.logits(theta)
    assert problem.objective(theta, logits).device == GPU
    assert problem.gradient(theta, logits.softmax(-1)).device == GPU
