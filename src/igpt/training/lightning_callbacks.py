"""Lightning's own callbacks: which of them only watch, which are refused, and errors of any callback in one line."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks as of_lightning

from igpt.distributed.ranks import this_rank
from igpt.distributed.signals import RunEndedError
from igpt.report.bystanders import Bystander, describe_error
from igpt.training.progress_bar import ProgressBar

# They change nothing in training: by exact type, as a class derived from one may. `report/identity.py` has their names.
WATCHING = (
    of_lightning.DeviceStatsMonitor,
    of_lightning.LearningRateMonitor,
    of_lightning.ModelSummary,
    of_lightning.RichModelSummary,
    of_lightning.RichProgressBar,
    of_lightning.ThroughputMonitor,
    of_lightning.TQDMProgressBar,
)
OF_LOGGERS = (of_lightning.DeviceStatsMonitor, of_lightning.LearningRateMonitor, of_lightning.ThroughputMonitor)
BASES = (
    of_lightning.BaseFinetuning,
    of_lightning.BasePredictionWriter,
    of_lightning.Callback,
    of_lightning.ProgressBar,
)
AVERAGED = "task.ema=0.999 averages the weights of task=pretrain, and keeps both"
# refused, with every class derived from it → what is there instead
INSTEAD: dict[type[L.Callback], str] = {
    of_lightning.BackboneFinetuning: "a run has no `backbone`: task=probe reads frozen weights, "
    "task=finetune trains all",
    of_lightning.BatchSizeFinder: "task.batch_size is part of what is learned; trainer.plan=true says what fits into "
    "memory, and trainer.micro_batch=N computes a step in passes of N images",
    of_lightning.Checkpoint: "a run saves itself: task.checkpoint_every and checkpoint_keep say how often, the best "
    "validation is kept, and so are the weights of task.keep_steps=[STEP,…]",
    of_lightning.GradientAccumulationScheduler: "trainer.micro_batch=N computes each step in passes of N images",
    of_lightning.LearningRateFinder: "-m sweep=learning_rate tries rates in runs of their own",
    of_lightning.ModelPruning: "it looks for weights before a run has built them; prune those that a run has left, by "
    "igpt.load",
    of_lightning.SpikeDetection: "no batches are left out here, and its state cannot be resumed; EarlyStopping with "
    "divergence_threshold ends a run, and one whose loss is not finite ends by itself",
    of_lightning.StochasticWeightAveraging: AVERAGED,
    of_lightning.WeightAveraging: AVERAGED,
}
HOOKS = [name for name in dir(L.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
BEFORE_TRAINING, AT_AN_END = ("setup", "on_fit_start", "on_train_start"), ("on_exception", "teardown")


def check_class(kind: type, where: str) -> None:
    """Raises ValueError, with what to take instead, for a class of callbacks that does not fit into a run."""
    reason = next((text for refused, text in INSTEAD.items() if issubclass(kind, refused)), None)
    if kind in BASES:
        reason = "it does nothing by itself: name a class that is derived from it"
    if reason is not None:
        raise ValueError(f"{where}: {kind.__name__} is not for these runs: {reason}")


def is_observer(callback: L.Callback) -> bool:
    """Whether a callback declares that it changes nothing in training, or is one of WATCHING."""
    return type(callback) in WATCHING or bool(getattr(callback, "is_observer", False))


def list_observers(callbacks: list[L.Callback]) -> list[L.Callback]:
    """The observers that also watch a training without loggers."""
    return [each for each in callbacks if is_observer(each) and not isinstance(each, OF_LOGGERS)]


def select(callbacks: list[L.Callback]) -> list[L.Callback]:
    """The callbacks to use: one progress bar, Lightning's if there is one; off rank 0, which logs, no WATCHING ones."""
    if any(isinstance(each, of_lightning.ProgressBar) for each in callbacks):
        callbacks = [each for each in callbacks if not isinstance(each, ProgressBar)]
    is_first = this_rank().is_first
    return [each for each in callbacks if is_first or type(each) not in WATCHING]


def guard(callback: L.Callback, where: str) -> L.Callback:
    """The callback itself, its hooks replaced by ones whose errors are a ValueError in one line.

    An error of an observer is logged, once, and ends no run, unless it comes before training starts. Callbacks of this
    package guard themselves. `where`: the callback's key, for the message.
    """
    if type(callback).__module__.startswith("igpt."):
        return callback
    bystander = Bystander(where)
    for name in HOOKS:
        if getattr(type(callback), name) is getattr(L.Callback, name):
            continue
        hook = getattr(callback, name)
        is_passed_over = name in AT_AN_END or (is_observer(callback) and name not in BEFORE_TRAINING)
        setattr(callback, name, bystander.guard(hook) if is_passed_over else _explain(hook, where))
    return callback


def _explain(hook: Callable[..., Any], where: str) -> Callable[..., Any]:
    """The hook, its errors turned into a ValueError; not those with a message of their own."""

    @wraps(hook)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return hook(*arguments, **named)
        except (RunEndedError, MemoryError, torch.OutOfMemoryError, dist.DistError):
            raise
        except Exception as error:  # of anybody's callback
            if isinstance(error, RuntimeError) and this_rank().count > 1:  # perhaps that of a lost rank
                raise
            raise ValueError(f"{where}: {hook.__qualname__} raised {describe_error(error)}") from error

    return call
