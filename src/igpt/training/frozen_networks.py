"""Networks that are read, not trained: sharded by FSDP2, or whole, also as copies of networks that training shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from igpt.checkpoint.igpt_format import meta_model
from igpt.distributed import ranks
from igpt.distributed.sharding import gather_weight
from igpt.model import dispatch
from igpt.model.gpt import FORWARD_METHODS, GPT


def build_on_meta(build: Callable[[], GPT], *, precision: str, narrow: bool) -> GPT:
    """A network without memory, in eval mode and without gradients, in the dtypes that `precision` computes with.

    `narrow`: the blocks' matrices are bfloat16 under bf16-mixed, too, as autocast would round them at every use.
    """
    with torch.device("meta"):
        net = build().eval().requires_grad_(False)
    return _set_dtypes(net, precision if narrow or precision == "bf16-true" else "32-true")


def _set_dtypes(net: GPT, precision: str) -> GPT:
    if precision == "bf16-true":
        net.to(torch.bfloat16)
    elif precision == "bf16-mixed":
        for block in net.blocks:
            for name, weight in block.named_parameters():
                if name.endswith(".weight"):
                    weight.data = weight.data.bfloat16()
    return net


def shard_frozen_network(net: GPT, device: torch.device) -> None:
    """Shards a frozen network on the meta device over all ranks, with FSDP2: a forward pass gathers block by block.

    What a block has beside its matrices is small, computed in float32 and read from outside the block (`ln_1`): every
    rank holds it, which only a frozen network can do without gradients to sum. Every rank must run the same forward
    passes.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # on which FSDP2 allocates
    mesh = init_device_mesh(device.type, (ranks.this_rank().count,))
    replicated = {
        weight for block in net.blocks for name, weight in block.named_parameters() if not name.endswith(".weight")
    }
    for part in (*net.blocks, net):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    for method in FORWARD_METHODS:
        register_fsdp_forward_method(net, method)


def attach_frozen(module: L.LightningModule, net: GPT) -> None:
    """Sets `module.net` without registering it: Lightning neither moves it nor wraps, broadcasts or saves it."""
    module.__dict__["net"] = net


def is_sharded(net: GPT) -> bool:
    """Whether a network's weights are sharded, by FSDP2 or by ZeRO 3."""
    return isinstance(net, FSDPModule) or not dispatch.is_unsharded(net.wte)


@contextmanager
def full_network(net: GPT, precision: str) -> Iterator[GPT]:
    """Context manager: the network itself, or if it is sharded `gather_network`, freed at the end. A collective."""
    if not is_sharded(net):
        yield net
        return
    copy = gather_network(net, precision)
    try:
        yield copy
    finally:
        copy.to("meta")  # also where a reference to it is left, as in the traceback of an error


@torch.no_grad()
def gather_network(net: GPT, precision: str) -> GPT:
    """A whole copy of a sharded network, in eval mode on this rank's device, matrices as `precision` computes them.

    A collective: every rank gets one.

    Raises:
        RuntimeError: on every rank, if one has too little memory for it.
    """
    copy, device = _set_dtypes(meta_model(net.config).eval().requires_grad_(False), precision), net.wte.device
    problem = None
    try:
        copy.allocate(device)
        largest = max(copy.parameters(), key=lambda weight: weight.numel())
        torch.empty(largest.shape, device=device)  # of which one at a time is gathered
    except RuntimeError as error:  # of memory; before the first weight, as the others would wait for it
        problem = str(error)
    for index, reason in enumerate(ranks.all_gather_object(problem)):
        if reason is not None:
            raise RuntimeError(f"no memory for a whole copy of the network on rank {index}: {reason}")
    for full, weight in zip(copy.parameters(), net.parameters(), strict=True):
        full.copy_(gather_weight(weight))
    for own, sharded in zip(copy.blocks, net.blocks, strict=True):
        own.attn.backend = sharded.attn.backend
    copy.decoding = net.decoding
    return copy
