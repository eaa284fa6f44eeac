"""Graphs of compiled blocks under DDP and FSDP2, and what a rank holds, in one process."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.training.fsdp import one_graph_a_block, shard_network

WIDE = GPTConfig(n_layer=2, n_embd=512, n_head=8, n_ctx=4, n_vocab=17, causal=True)  # DDP's buckets end inside a block
TOKENS = torch.zeros(1, 4, dtype=torch.int64)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def count_graphs(net: GPT, module: nn.Module) -> list[int]:
    """Number of operations of each graph that a training step hands to the compiler."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    for block in net.blocks:
        block.compile(backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        module(TOKENS).float().sum().backward()
    return graphs


def test_blocks_under_ddp_are_one_graph(group_of_one: None) -> None:
    """Invariant: a graph of the first block and one of the others; PyTorch's default, at this width, cuts them."""
    counts = {}
    for setting in ("default", "ours"):
        net = GPT(WIDE)
        module = DistributedDataParallel(net)
        if setting == "ours":
            with one_graph_a_block():
                counts[setting] = count_graphs(net, module)
        else:
            counts[setting] = count_graphs(net, module)
    assert len(counts["ours"]) == 2
    assert len(counts["default"]) > 2
    assert torch._dynamo.config.optimize_ddp is True


def test_blocks_under_fsdp_are_one_graph(group_of_one: None) -> None:
    """Invariant: the hooks that gather are outside the blocks, those of the norms' gains too."""
    with torch.device("meta"):
        net = GPT(WIDE)
    shard_network(net, init_device_mesh("cpu", (1,)), mixed=True)
    net.allocate("cpu")
    assert len(count_graphs(net, net)) == 2  # of the first block, which nothing is added to before, and of the others


def test_a_rank_holds_its_shard_of_the_largest_network() -> None:
    """By hand: of iGPT-XL on 64 ranks (a group without the others), a 64th of its weights, no matrix whole."""
    largest = 0

    class Allocated(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            nonlocal largest
            out = call(*arguments, **(named or {}))
            if type(out) is Tensor and out.device.type == "cpu":
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    dist.init_process_group("fake", rank=3, world_size=64, store=FakeStore())
    try:
        with torch.device("meta"):
            net = GPT(GPTConfig(n_layer=60, n_embd=3072, n_head=24, n_ctx=4096, n_vocab=512, causal=True))
        with Allocated():
            shard_network(net, init_device_mesh("cpu", (64,)), mixed=True)
            net.allocate("cpu")
        for earlier, later in pairwise(block._get_fsdp_state() for block in net.blocks):
            assert earlier._states_to_forward_prefetch == [later]
            assert later._states_to_backward_prefetch == [earlier]
        weights = list(net.parameters())
        assert sum(weight.numel() for weight in weights) == 6_810_875_904
        assert sum(weight.to_local().numel() for weight in weights) == 6_810_875_904 // 64
        assert largest == 4 * 3072 * 4 * 3072 // 64  # the local rows of an MLP's matrix, float32
    finally:
        dist.destroy_process_group()
