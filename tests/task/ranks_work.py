"""What ranks do for `test_ranks.py`: `python -m tests.task.ranks_work FOLDER [PART]` in each."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.distributed.tensor import DTensor

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import FORMAT
from igpt.checkpoint.resume import AtomicCheckpointIO, latest_checkpoint, parse_step
from igpt.data.digits import Digits
from igpt.data.order import BatchPlan
from igpt.distributed import ranks
from igpt.distributed.signals import StoppedError
from igpt.metric.classification import ClassMetrics
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.task import pretrain
from igpt.task.sample import draw_images
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.kmeans import fit_palette as fit_palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.training import hardware as machines
from igpt.training.callbacks import SampleGrid
from igpt.training.hardware import HardwareConfig
from igpt.training.nan_guard import NonFiniteLossError
from igpt.utils import files, keyed
from tests.data.conftest import mixture
from tests.metric.test_classification import draw_scores
from tests.task.conftest import SIZES, Lab, machine, train_tokenizer
from tests.task.test_finished_step import OwnError, Raise
from tests.task.test_stopping import Send
from tests.tokens.test_palette import random_palette
from tests.tokens.test_quantizer import train_quantizer

DEEPSPEED = ("deepspeed_2", "deepspeed_3", "deepspeed_3_offload")
SHARDED_WITH: dict[str, dict[str, Any]] = {
    "recomputed activations": {"activation_checkpointing": True},
    "mixed precision": {"precision": "bf16-mixed"},
    "bfloat16": {"precision": "bf16-true"},
}
TWENTY: dict[str, Any] = {"steps": 20, "val_every": 8, "checkpoint_every": 10}
CLIPPED: dict[str, Any] = {"steps": 3, "warmup_steps": 1, "val_every": 3, "gradient_clip": 0.2}
BEYOND: dict[str, GPTConfig] = {
    name: GPTConfig(
        **SIZES, grid=(8, 8, 1), radius=1, qk_norm=True, value_residual=True, activation="swiglu", **changed
    )
    for name, changed in {
        "biases": {"attention": "local", "positions": "factorised+rope_2d", "relative_bias": True},
        "linear": {"attention": ("local", "linear"), "positions": "factorised"},
    }.items()
}
SHORT: dict[str, Any] = {"steps": 3, "warmup_steps": 1, "val_every": 3, "batch_size": 20}
SETTINGS = {"name": "digits", "resolution": 8, "split_seed": 0, "shift": 1, "shift_share": 0.5}


def a_lab() -> Lab:
    """Digits of which 101 are held out: a number that neither two ranks nor any batch divides."""
    digits = Digits(**SETTINGS, val_fraction=101 / 359, test_fraction=0.8)
    return Lab(digits, fit_palette(digits.split("train").pixels, k=17, iterations=10, restarts=1, seed=0))


def on_all(**changed: Any) -> HardwareConfig:
    return machine(devices="auto", **changed)


def evaluated(lab: Lab, run: Path, on: HardwareConfig, objective: Any) -> dict[str, Any]:
    """The numbers of `task=evaluate`, images 10 at a time."""
    result = lab.evaluate(run, find_weights(str(run)), on=on, objective=objective, batch_size=10)
    return {name: (number.value, number.stderr, number.n) for name, number in result.numbers.items()}


def read_off(lab: Lab, run: Path, folder: Path, on: HardwareConfig, objective: Any) -> dict[str, Any]:
    """The accuracies of both solvers of `task=probe` and of `task=finetune`, and their curves over the steps."""
    weights = find_weights(str(run))
    answers = {
        "lbfgs": lab.probe(folder / "lbfgs", weights, on=on, objective=objective, batch_size=16, eval_masks=3),
        "sgd": lab.probe(folder / "sgd", weights, on=on, objective=objective, solver="sgd", eval_masks=3),
        "finetune": lab.finetune(folder / "finetune", weights, on=on, objective=objective),
    }
    shares = {
        name: {key: number.value for key, number in result.numbers.items() if number.unit == "share"}
        for name, result in answers.items()
    }
    steps = {f"{name} {key}": curve.y for name in ("finetune", "lbfgs") for key, curve in answers[name].curves.items()}
    return {"shares": shares, "curves": steps}


def samples(run: Path) -> torch.Tensor:
    rng_keys = keyed.per_example_keys(keyed.key(0, "sample"), torch.arange(5))
    return draw_images(find_weights(str(run)).net(), Sampling(1.0, None, None), rng_keys=rng_keys, batch_size=2)


def raised(kind: type[Exception], what: Any, *arguments: Any, **settings: Any) -> str:
    try:
        what(*arguments, **settings)
    except kind as error:
        return str(error)
    return "nothing was raised"


def sharded(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """The run of `TWENTY` steps once more, its network in parts: how it went, and what each rank held of it."""
    answers: dict[str, Any] = {}

    class Held(L.Callback):
        """The bytes here and in all, of weights and of what the optimiser keeps beside them."""

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            moments = [t for state in trainer.optimizers[0].state.values() for t in state.values() if t.dim()]
            kept = [*pl_module.parameters(), *moments]
            assert all(isinstance(tensor, DTensor) for tensor in kept)
            answers["held"] = sum(t.to_local().nbytes for t in kept) / sum(t.numel() * t.element_size() for t in kept)

    parts = {"on": on_all(micro_batch=25, strategy="fsdp"), "keep_steps": [4, 16], **TWENTY}
    run = lab.pretrain(place / "sharded", callbacks=(Held(), SampleGrid(count=3, every=1, temperature=1.0)), **parts)
    answers["curves"] = {name: curve.y for name, curve in run.curves.items()}
    answers["evaluated"] = evaluated(lab, place / "sharded", on_all(strategy="fsdp"), AR())
    for name, in_pieces in (("whole", False), ("pieces", True)):
        on = {**parts, "on": on_all(micro_batch=25, strategy="fsdp", sharded_checkpoint=in_pieces)}
        term = (Send(signal.SIGTERM, step=6),) if rank.index == 1 else ()
        answers[f"{name} stopped"] = raised(StoppedError, lab.pretrain, place / f"sharded {name}", callbacks=term, **on)
        resumed = lab.pretrain(place / f"sharded {name}", **on)
        answers[f"{name} resumed"] = {key: curve.y for key, curve in resumed.curves.items()}
    begun = find_weights(str(place / "whole"))
    still = {"steps": 1, "warmup_steps": 0, "val_every": 1, "learning_rate": 1e-30}
    started = lab.pretrain(place / "started", on=on_all(strategy="fsdp"), weights=begun, **still)
    answers["started"] = started.numbers["val/loss_gen"].value
    clipped = lab.pretrain(place / "sharded clipped", on=on_all(strategy="fsdp"), **CLIPPED)
    answers["clipped"] = clipped.curves["train/loss_gen"].y
    answers["bert"] = (
        lab.pretrain(place / "sharded bert", on=on_all(strategy="fsdp"), objective=BERT(mask_probability=0.15))
        .curves["train/loss_gen"].y
    )  # fmt: skip
    return answers


def with_options(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """The losses of sharded networks: with each setting of `SHARDED_WITH`, and each of `BEYOND`."""
    answers: dict[str, Any] = {}
    for name, changed in SHARDED_WITH.items():
        done = lab.pretrain(place / f"sharded {name}", on=on_all(strategy="fsdp", **changed), steps=2, val_every=2)
        answers[f"with {name}"] = done.curves["train/loss_gen"].y
    for name, network in BEYOND.items():
        done = lab.pretrain(place / f"sharded {name}", on=on_all(strategy="fsdp"), network=network, **SHORT)
        answers[f"beyond {name}"] = done.curves["train/loss_gen"].y
    return answers


def by_deepspeed(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """The same run by each of DeepSpeed's stages, on its CPU accelerator; stopped, it is resumed by fsdp and back."""
    answers: dict[str, Any] = {}
    machines.DEEPSPEED_RUNS_ON = ("cpu",)

    def term(step: int) -> tuple[Send, ...]:
        return (Send(signal.SIGTERM, step=step),) if rank.index == 1 else ()

    class Held(L.Callback):
        """The bytes here of weights and of what the optimiser keeps beside them."""

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            zero: Any = trainer.optimizers[0]
            kept = [getattr(p, "ds_tensor", p) for p in pl_module.parameters()]
            kept += [t for part, state in zero.optimizer.state.items() for t in (part, *state.values()) if t.dim()]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
            held.append(sum(storages.values()))

    for strategy in DEEPSPEED:
        on = {"on": on_all(micro_batch=25, strategy=strategy), "keep_steps": [4, 16], **TWENTY}
        held: list[int] = []
        run = lab.pretrain(place / strategy, callbacks=(Held(), SampleGrid(count=3, every=1, temperature=1.0)), **on)
        answers[strategy] = {name: curve.y for name, curve in run.curves.items()}
        answers[f"{strategy} validated"] = run.numbers["val/loss_gen"].value
        answers[f"{strategy} held"] = held[-1]
        clipped = lab.pretrain(place / f"{strategy} clipped", on=on_all(strategy=strategy), **CLIPPED)
        answers[f"{strategy} clipped"] = clipped.curves["train/loss_gen"].y
        if strategy != "deepspeed_2":  # `by turns` stops and resumes the third stage
            continue
        folder = place / f"{strategy} stopped"
        answers[f"{strategy} stopped"] = raised(StoppedError, lab.pretrain, folder, callbacks=term(6), **on)
        resumed = lab.pretrain(folder, **on)
        answers[f"{strategy} resumed"] = {name: curve.y for name, curve in resumed.curves.items()}
    three, fsdp = (
        {"on": on_all(micro_batch=25, strategy=strategy, sharded_checkpoint=True), **TWENTY}
        for strategy in ("deepspeed_3", "fsdp")
    )
    answers["by turns"] = [
        raised(StoppedError, lab.pretrain, place / "by turns", callbacks=term(6), **three),
        raised(StoppedError, lab.pretrain, place / "by turns", callbacks=term(12), **fsdp),
    ]
    answers["by turns"] += lab.pretrain(place / "by turns", **three).curves["train/loss_gen"].y
    lab.pretrain(place / "sharded pieces", **fsdp)
    machines.DEEPSPEED_RUNS_ON = ("cuda",)
    return answers


def in_pieces(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """A run in parts that two ranks begin and are stopped in; as many as there are now go on with it."""
    on = on_all(micro_batch=25, strategy="fsdp", sharded_checkpoint=True)
    term = (Send(signal.SIGTERM, step=6),) if rank.index == 1 and rank.count == 2 else ()
    if rank.count == 2:
        return {"stopped": raised(StoppedError, lab.pretrain, place / "pieces", on=on, callbacks=term, **TWENTY)}
    return {"losses": lab.pretrain(place / "pieces", on=on, **TWENTY).curves["train/loss_gen"].y}


def save_in_pieces(run: Path, folder: Path) -> None:
    """The network of a finished run, sharded by FSDP2 over both ranks and saved by them as Lightning saves it."""

    from lightning.fabric.strategies.fsdp import _distributed_checkpoint_save
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    weights = find_weights(str(run))
    module = torch.nn.Module()
    module.net = weights.net()
    mesh = init_device_mesh("cpu", (2,))
    for block in module.net.h:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    _distributed_checkpoint_save({"state_dict": get_model_state_dict(module)}, folder)
    if ranks.this_rank().is_first:
        torch.save({"format": FORMAT, "origin": weights.metadata.to_dict()}, folder / "meta.pt")


def measure_here(rank: ranks.Rank, first: int) -> tuple[dict[str, float], list[list[int]]]:
    """The class metrics of 13 images of which the first rank has so many, in two batches, the second the others."""
    mine = slice(0, first) if rank.is_first else slice(first, 13)
    metrics = ClassMetrics(7, has_votes=True)
    scores, labels, votes = draw_scores(13, 7)
    for some in (slice(0, 8), slice(8, None)):
        metrics.update(*(of[mine][some] for of in (scores, votes, labels)))
    numbers, matrix = metrics.compute()
    return {name: number.value for name, number in numbers.items()}, matrix.tolist()


def streamed(place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """What two workers of each rank read of a stream, image by image: at once, and resumed from a state on the way."""
    if rank.is_first:
        mixture(place / "shards", num_readers=None)
    ranks.barrier()

    def read(data: TokenDataModule, n: int, saved_after: int = 0) -> tuple[list[tuple[int, int, int]], dict[str, Any]]:
        batches, state = iter(data.train_dataloader()), {}
        items = []
        for i in range(n):
            items.append(next(batches))
            data.on_after_batch_transfer(items[-1])
            if i + 1 == saved_after:
                state = data.state_dict()
        return [(batch.reader, batch.state.epoch, int(batch.batch.rows)) for batch in items], state

    def data() -> TokenDataModule:
        shards = mixture(place / "shards", num_readers=None, buffer=12)
        return TokenDataModule(
            source=shards, tokenizer=PaletteTokenizer(random_palette(32), PixelOrder.from_name(8, "raster")), seed=3,
            num_workers=2, plan=BatchPlan(4, 1, n_device=2, rank=rank.index),
        )  # fmt: skip

    full, state = read(data(), 60, saved_after=23)
    resumed = data()
    resumed.load_state_dict(state)
    return {"whole": full, "rest": read(resumed, 37)[0]}


def work(place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """Every answer, of which `test_ranks.py` makes its checks."""
    lab = a_lab()
    answers: dict[str, Any] = {}
    atomic_path, answers["written"] = files.atomic_path, []

    def noted(path: Path) -> Any:
        answers["written"].append(path.name)
        return atomic_path(path)

    files.atomic_path = noted
    full = lab.pretrain(place / "whole", on=on_all(micro_batch=25), **TWENTY)
    files.atomic_path = atomic_path
    pretrain.draw_loss_by_position = lambda *_, **__: None  # drawn for the run above only
    answers["curves"] = {name: curve.y for name, curve in full.curves.items()}
    answers["bert"] = (
        lab.pretrain(place / "bert", on=on_all(), objective=BERT(mask_probability=0.15)).curves["train/loss_gen"].y
    )
    recipe = lab.pretrain(place / "recipe", on=on_all(), ema=0.5, **CLIPPED)
    answers["recipe"] = {name: curve.y for name, curve in recipe.curves.items()}
    answers["evaluated"] = evaluated(lab, place / "whole", on_all(), AR())
    answers["evaluated bert"] = evaluated(lab, place / "bert", on_all(), BERT(mask_probability=0.15))
    answers["samples"] = samples(place / "whole")
    save_in_pieces(place / "whole", place / "in pieces")
    for name, objective in (("whole", AR()), ("bert", BERT(mask_probability=0.15))):
        answers[f"read off {name}"] = read_off(lab, place / name, place / f"of {name}", on_all(), objective)

    term = (Send(signal.SIGTERM, step=6),) if rank.index == 1 else ()  # only one of them is asked to stop
    stopped = {"on": on_all(micro_batch=25), **TWENTY}
    answers["stopped"] = raised(StoppedError, lab.pretrain, place / "stopped", callbacks=term, **stopped)
    answers["resumed"] = {name: c.y for name, c in lab.pretrain(place / "stopped", **stopped).curves.items()}

    error = (Raise("on_train_batch_start", 7, 2),)
    answers["failed"] = raised(OwnError, lab.pretrain, place / "failed", callbacks=error, **stopped)
    ranks.barrier()
    saved = latest_checkpoint(place / "failed")
    answers["saved"] = None if saved is None else parse_step(saved)
    answers["repaired"] = {name: c.y for name, c in lab.pretrain(place / "failed", **stopped).curves.items()}

    tokens = train_tokenizer(place / "tokenizer", on=on_all(micro_batch=2))
    answers["tokenizer"] = {name: curve.y for name, curve in tokens.curves.items()}
    answers["tokenizer refused"] = raised(
        ValueError, train_tokenizer, place / "sharded tokenizer", on=on_all(strategy="fsdp")
    )

    answers["not finite"] = raised(
        NonFiniteLossError, lab.pretrain, place / "nan", on=on_all(), learning_rate=1e30, warmup_steps=0
    )
    write = AtomicCheckpointIO.write

    def refuse(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path) -> None:
        if parse_step(path) == 4:
            raise OSError("No space left on device")
        write(self, checkpoint, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "write", refuse)  # a disk that is full, for one save
        lab.pretrain(place / "full disk", on=on_all())

    answers["codes"] = train_quantizer(rank.index, rank.count)
    answers["classes"] = [measure_here(rank, uneven) for uneven in (9, 13)]
    answers["streamed"] = streamed(place, rank)
    answers["sharded"] = sharded(lab, place, rank)

    answers["other settings"] = raised(
        ValueError, ranks.check_agree, "settings", {"seed": rank.index, "data": "digits"}
    )
    answers["from the first"] = raised(ValueError, ranks.broadcast_from_rank0, lambda: int("not a number"))
    yes = ranks.AsyncMax()
    answers["heard"] = [yes.update(5 if rank.index == 1 and step == 2 else 0) for step in range(5)]
    yes.close()
    odd = raised(ValueError, on_all().train_batch_layout, 101)
    answers["odd batch"] = odd

    from tests.task import (  # they import this module
        ranks_cluster,
        ranks_finetune,
        ranks_frozen,
        ranks_fsdp,
        ranks_network,
        ranks_step,
    )

    for part in (ranks_step, ranks_fsdp, ranks_frozen, ranks_finetune, ranks_network, ranks_cluster):
        answers |= part.work(lab, place, rank)
    return answers


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with ranks.process_group(torch.device("cpu")) as rank:
        from tests.task import ranks_finetune, ranks_frozen

        apart = {
            "deepspeed": by_deepspeed,
            "options": with_options,
            "pieces": in_pieces,
            "watched": ranks_frozen.watched_by_zero,
            "finetune": ranks_finetune.by_deepspeed,
            "offload": ranks_finetune.offloaded,
        }
        found = apart[sys.argv[2]](a_lab(), place, rank) if sys.argv[2:] else work(place, rank)
        everyone = ranks.all_gather_object(found)
        if rank.is_first:
            torch.save(everyone, place / "answers.pt")
    os._exit(0)  # nothing is left to tidy
