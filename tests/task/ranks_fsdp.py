"""What two ranks do for `test_ranks_fsdp.py`, beside `ranks_work.py`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from igpt.checkpoint.resume import AtomicCheckpointIO, find_checkpoints
from igpt.distributed import ranks
from igpt.distributed.sharding import copy_into_sharded
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.training.fsdp import shard_network
from igpt.utils import files
from tests.conftest import perturbed
from tests.task.conftest import SIZES, Lab

# squared ReLU: quick-GELU, computed with scaled weights, would round them twice where they are bfloat16 before
NETWORK: dict[str, Any] = {**SIZES, "activation": "relu2", "qk_norm": True}
MIXED: dict[str, Any] = {"steps": 2, "val_every": 2, "checkpoint_every": 2, "warmup_steps": 1}
MUON: dict[str, Any] = {
    "steps": 4, "val_every": 2, "checkpoint_every": 2, "warmup_steps": 1, "optimizer": "muon", "ema": 0.5,
    "gradient_clip": 0.5,
}  # fmt: skip


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """The gatherings and reductions of FSDP2 inside the block: (kind, bytes of the unsharded tensors)."""
    seen: list[tuple[str, int]] = []
    gather, reduce = DefaultAllGather.__call__, DefaultReduceScatter.__call__

    def gathered(self: Any, output_tensor: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(("gather", output_tensor.nbytes))
        return gather(self, output_tensor, *arguments, **named)

    def reduced(self: Any, output_tensor: Any, input_tensor: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(("reduce", input_tensor.nbytes))
        return reduce(self, output_tensor, input_tensor, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultAllGather, "__call__", gathered)
        patch.setattr(DefaultReduceScatter, "__call__", reduced)
        yield seen


class Seen(L.Callback):
    """What the first block computes with: dtype of a norm's gain, a matrix and the stream; whether graphs are cut."""

    def __init__(self) -> None:
        self.dtypes: set[tuple[str, str]] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        block = pl_module.net.h[0]
        for name, module in (("gain", block.ln_1), ("gain of queries", block.attn.q_norm), ("matrix", block.mlp.c_fc)):

            def note(module: Any, arguments: Any, name: str = name) -> None:
                self.dtypes.add((name, str(next(module.parameters()).dtype)))

            module.register_forward_pre_hook(note)
        self.dtypes.add(("cut by DDP", str(torch._dynamo.config.optimize_ddp)))
        block.register_forward_pre_hook(lambda _, arguments: self.dtypes.add(("stream", str(arguments[0].dtype))))


def leave_step_2(run: Path, copy: Path, rank: ranks.Rank) -> Path:
    """A copy of a run of 4 steps as it was after its second."""
    if rank.is_first:
        shutil.copytree(run, copy)
        for path in find_checkpoints(copy)[1:]:
            AtomicCheckpointIO().remove_checkpoint(path)
    ranks.barrier()
    return copy


def gradient_errors(rank: ranks.Rank) -> dict[str, float]:
    """Largest difference of each weight's gradient from a whole network's under autocast, of its largest number."""
    full = perturbed(GPT(GPTConfig(**NETWORK, grid=(8, 8, 1), relative_bias=True)))
    with torch.device("meta"):
        net = GPT(full.config)
    shard_network(net, init_device_mesh("cpu", (rank.count,)), mixed=True)
    net.allocate("cpu")
    tokens = torch.arange(2 * 64).view(2, 64) * 7 % 17
    with torch.no_grad():
        for weight, values in zip(net.parameters(), full.parameters(), strict=True):
            copy_into_sharded(weight, values)
    for each in (full, net):  # trunk and head apart, as fine-tuning calls them
        with torch.autocast("cpu", torch.bfloat16):
            hidden = each.trunk(tokens)
            loss = each.logits(hidden).float().logsumexp(-1).mean() + hidden.square().mean()
        loss.backward()
    errors = {}
    for (name, weight), expected in zip(net.named_parameters(), full.parameters(), strict=True):
        assert isinstance(weight.grad, DTensor)
        assert expected.grad is not None
        difference = weight.grad.full_tensor() - expected.grad
        errors[name] = float(difference.abs().max() / expected.grad.abs().max())
    return errors


def work(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    from tests.task.ranks_work import on_all  # which imports this module

    answers: dict[str, Any] = {"gradient errors": gradient_errors(rank)}
    for strategy, precision in (("ddp", "bf16-mixed"), ("fsdp", "bf16-mixed"), ("fsdp", "32-true")):
        on, seen, name = (
            on_all(micro_batch=25, strategy=strategy, precision=precision),
            Seen(),
            f"{strategy} {precision}",
        )
        with collectives() as counted:
            run = lab.pretrain(place / name, on=on, callbacks=(seen,), network=GPTConfig(**NETWORK), **MIXED)
        answers[name] = {
            "curves": {key: curve.y for key, curve in run.curves.items()},
            "collectives": counted,
            "dtypes": sorted(seen.dtypes),
        }
    hashed: list[str] = []
    digest = files.sha256

    def note(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    pieces = on_all(micro_batch=25, strategy="fsdp", sharded_checkpoint=True)
    for name, run, on in (
        ("ddp muon", place / "ddp muon", on_all(micro_batch=25)),
        ("fsdp muon", place / "fsdp muon", pieces),
        ("ddp → fsdp", place / "ddp muon", pieces),
        ("fsdp → fsdp", place / "fsdp muon", pieces),
    ):
        folder = leave_step_2(run, place / name, rank) if "→" in name else run
        with pytest.MonkeyPatch.context() as patch:
            if name == "fsdp muon":
                patch.setattr(files, "sha256", note)
            done = lab.pretrain(folder, on=on, **MUON)
        answers[name] = {key: curve.y for key, curve in done.curves.items()}
    answers["hashed"] = [name for name in hashed if "safetensors" not in name]  # of checkpoints
    return {"fsdp": answers}
