"""What two ranks do for `test_ranks_finetune.py`, beside `ranks_work.py`."""

import signal
from pathlib import Path
from typing import Any

from igpt.checkpoint.find import find_weights
from igpt.distributed import ranks
from igpt.distributed.signals import StoppedError
from tests.task.conftest import Lab
from tests.task.test_stopping import Send

SIX: dict[str, Any] = {"steps": 6, "val_every": 2, "batch_size": 40, "checkpoint_every": 2, "refit": True}
CASES: dict[str, dict[str, Any]] = {  # name → settings of `task=finetune`
    "whole": {"dropout": 0.2, "gradient_clip": 0.5},
    "pieces": {"loss_weights": {"gen": 0.0, "clf": 1.0}},
}


def described(result: Any) -> dict[str, Any]:
    """The curves and numbers of a fine-tuning."""
    timed = ("train/peak_memory", "train/device_days", "train/device_seconds")
    numbers = {name: number.value for name, number in result.numbers.items() if name not in timed}
    return {"curves": {name: curve.y for name, curve in result.curves.items()}, "numbers": numbers}


def work(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """Fine-tunings of the network of `whole`, sharded; of each checkpoint format, one is stopped and resumed."""
    from tests.task.ranks_work import on_all, raised

    answers: dict[str, Any] = {}
    weights = find_weights(str(place / "whole"))
    for name, changed in CASES.items():
        on = on_all(micro_batch=10, strategy="fsdp", sharded_checkpoint=name == "pieces")
        settings: dict[str, Any] = {"on": on, **SIX, **changed}
        folder = place / f"fine-tuned {name}"
        term = (Send(signal.SIGTERM, step=3),) if rank.index == 1 else ()
        answers[f"fine-tuned {name} stopped"] = raised(
            StoppedError, lab.finetune, folder, weights, callbacks=term, **settings
        )
        answers[f"fine-tuned {name}"] = described(lab.finetune(folder, weights, **settings))
    return answers
