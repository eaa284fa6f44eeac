"""What two ranks do for `test_ranks_finetune.py`, beside `ranks_work.py`."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
from torch.distributed.tensor import DTensor

from igpt.checkpoint.find import find_weights
from igpt.distributed import ranks
from igpt.distributed.signals import StoppedError
from igpt.training import hardware as machines
from tests.task.conftest import Lab, machine
from tests.task.test_stopping import Send

FOUR: dict[str, Any] = {"steps": 4, "val_every": 2, "batch_size": 40}
CASES: dict[str, dict[str, Any]] = {  # name → settings of `task=finetune`
    "whole": {"dropout": 0.2, "gradient_clip": 0.5},
    "pieces": {"loss_weights": {"gen": 0.0, "clf": 1.0}, "refit": True},  # from scratch, stopped and resumed
}
ONE: dict[str, Any] = {"steps": 8, "val_every": 4, "gradient_clip": 0.2}  # pretraining that is offloaded


def finetuned(lab: Lab, place: Path, folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    """The curves and numbers of a case."""
    weights = find_weights(str(place / "whole")) if name == "whole" else None
    result = lab.finetune(folder, weights, **FOUR, **CASES[name], **settings)
    numbers = {key: number.value for key, number in result.numbers.items() if not key.startswith("train/")}
    return {"numbers": numbers, "curves": {key: curve.y for key, curve in result.curves.items()}}


class Held(L.Callback):
    """The share of all weights, network and head, that this rank holds."""

    share: float

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = list(pl_module.parameters())
        local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        self.share = sum(each.numel() for each in local) / sum(weight.numel() for weight in weights)


def finetuned_sharded(
    lab: Lab, place: Path, rank: ranks.Rank, strategy: str, callbacks: tuple[L.Callback, ...] = ()
) -> dict[str, Any]:
    """Each case, its network and head sharded; one of them is stopped and resumed."""
    from tests.task.ranks_work import on_all, raised

    answers: dict[str, Any] = {}
    for name in CASES:
        on = on_all(
            micro_batch=10, strategy=strategy, sharded_checkpoint=name == "pieces" if strategy == "fsdp" else "auto"
        )
        folder = place / f"{strategy} fine-tuned {name}"
        if name == "pieces":
            term = (Send(signal.SIGTERM, step=1),) if rank.index == 1 else ()
            answers["stopped"] = raised(StoppedError, finetuned, lab, place, folder, name, on=on, callbacks=term)
        answers[name] = finetuned(lab, place, folder, name, on=on, callbacks=callbacks)
    return answers


def work(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    held = Held()
    answers = finetuned_sharded(lab, place, rank, "fsdp", callbacks=(held,))
    return {"fine-tuned fsdp": {**answers, "held": held.share}}


def by_deepspeed(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """Fine-tuning by DeepSpeed's stages, on its CPU accelerator; runs that ddp began and ended; position tables."""
    from tests.task.ranks_work import BEYOND, SHORT, on_all, raised

    machines.DEEPSPEED_RUNS_ON = ("cpu",)
    lab.pretrain(place / "whole", on=on_all(), **ONE)
    answers = {
        f"fine-tuned {strategy}": finetuned_sharded(lab, place, rank, strategy)
        for strategy in ("deepspeed_2", "deepspeed_3")
    }
    turns = []
    for strategy, step in (("ddp", 2), ("deepspeed_3", 4), ("ddp", 6)):
        term = (Send(signal.SIGTERM, step=step),) if rank.index == 1 and step < 6 else ()
        settings: dict[str, Any] = {"on": on_all(strategy=strategy), "callbacks": term, **ONE}
        if step < 6:
            turns.append(raised(StoppedError, lab.pretrain, place / "by turns", **settings))
        else:
            answers["by turns"] = lab.pretrain(place / "by turns", **settings).curves["train/loss_gen"].y
    answers["turns"] = turns
    tables = lab.pretrain(place / "tables", on=on_all(strategy="deepspeed_3"), network=BEYOND["biases"], **SHORT)
    answers["tables"] = tables.curves["train/loss_gen"].y
    return answers


def offloaded(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """Pretraining and fine-tuning of one process with the optimiser in host memory, on DeepSpeed's CPU accelerator."""
    machines.DEEPSPEED_RUNS_ON = ("cpu",)
    answers: dict[str, Any] = {}
    for strategy in ("deepspeed_2_offload", "deepspeed_3_offload"):
        on = machine(micro_batch=50, strategy=strategy)
        done = lab.pretrain(place / strategy, on=on, **ONE)
        answers[strategy] = {name: curve.y for name, curve in done.curves.items()}
        answers[f"{strategy} validated"] = done.numbers["val/loss_gen"].value
    answers["fine-tuned"] = finetuned(lab, place, place / "fine-tuned", "pieces", on=machine(strategy=strategy))
    return answers
