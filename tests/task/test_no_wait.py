"""Between two log lines no GPU is waited for, and a run on a CPU touches none: seen on a CPU."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights
from igpt.distributed.ranks import Rank
from igpt.objective.bert import BERT
from igpt.tokens.pixel_order import PixelOrder
from igpt.training import nan_guard
from tests.task.conftest import Lab, machine, train_tokenizer
from tests.training.device_watch import DeviceWatch, Watch

SELDOM: dict[str, Any] = {"log_every": 4, "val_every": 8, "checkpoint_every": 8}
TASKS = ("pretrain", "finetune", "sgd", "tokenizer")
BETWEEN = range(5, 8)  # after the first log line


def train(task: str, folder: Path, lab: Lab, ar: Weights, masked: Path, callback: L.Callback, **on: Any) -> None:
    """8 steps of two micro-batches, logged at the fourth: with clipping, averages, masks, dropout or moving codes."""
    how: dict[str, Any] = {"on": machine(micro_batch=10, **on), "callbacks": (callback,), "steps": 8, "batch_size": 20}
    how |= SELDOM
    if task == "pretrain":
        lab.pretrain(folder, ema=0.9, gradient_clip=0.5, **how)
    elif task == "finetune":
        bert, weights = BERT(mask_probability=0.15), find_weights(str(masked))
        lab.finetune(folder, weights, objective=bert, dropout=0.1, test=False, **how)
    elif task == "sgd":
        parts = {name: how.pop(name) for name in ("on", "callbacks")}
        lab.probe(folder, ar, **parts, solver="sgd", test=False, sgd=how)
    else:
        train_tokenizer(folder, tokens={"unquantised_steps": 2}, **how)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_read_between_log_lines(
    task: str, tmp_path: Path, lab: Lab, ar: Weights, masked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant: no number of the device, by this package or by Lightning."""
    monkeypatch.setattr(nan_guard, "this_rank", lambda: Rank(0, 0, 2, 2))  # else a CPU reads the loss of every step
    watch = Watch(monkeypatch, BETWEEN)
    train(task, tmp_path, lab, ar, masked, watch)
    assert watch.watched == 2 * len(BETWEEN)
    assert watch.device.waits == []
    assert watch.logged
    assert all(isinstance(value, torch.Tensor) for value in watch.logged)  # on the host; a number would be copied


def test_a_run_on_a_cpu_touches_no_gpu(tmp_path: Path, lab: Lab, ar: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch sees GPUs, but to make use of one is an error: training, validation, checkpoints and a probe."""
    pinned = []

    class Pins(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pinned.append(trainer.train_dataloader.pin_memory)

    def refuse() -> None:
        raise AssertionError("a GPU was touched")

    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)  # which all begin with that need a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    lab.pretrain(tmp_path / "pretrain", callbacks=(Pins(),), steps=4)
    lab.probe(tmp_path / "probe", ar, test=False)
    assert pinned == [False]


def test_an_order_of_pixels_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: to a device, by its first use."""
    watch, order, grid = DeviceWatch(monkeypatch), PixelOrder.from_name(4, "random"), torch.arange(32).view(2, 4, 4)
    with watch.watching():
        for _ in range(3):
            assert torch.equal(order.unflatten(order.flatten(grid)), grid)
    assert watch.copies == 1


def test_what_would_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: four that read the device, or copy indices to it; the others do neither."""
    watch, x, on_host = DeviceWatch(monkeypatch), torch.ones(3), torch.ones(3)
    watch.mark(x)
    with watch.watching():
        float((x + 1).sum())
        (x * 2).tolist()
        x[x > 0]
        x[[0, 1]]
        waits = len(watch.waits)
        float(on_host.sum())
        torch.where(x > 0, x, 0.0)[0] += 1
    assert waits == len(watch.waits) == 4
