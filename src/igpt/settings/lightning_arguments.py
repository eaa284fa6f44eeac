"""Settings of `trainer.lightning`: which arguments of Lightning's Trainer are passed on, and why others are not."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from igpt.settings.fields import Count, Settings, format_setting
from igpt.utils.overrides import suggest_name


def _check_limit(limit: Any) -> Any:
    is_whole, is_share = type(limit) is int and limit >= 1, type(limit) is float and 0 < limit <= 1
    if not (is_whole or is_share or limit is None):
        raise ValueError(
            "must be a number of batches, from 1 on, or a share above 0.0 and up to 1.0, or null, got "
            f"{format_setting(limit)}"
        )
    return limit


Limit = Annotated[int | float | None, BeforeValidator(_check_limit)]  # batches of task.batch_size images, or a share
# Arguments that change what is learned or measured → their value that changes nothing, besides null. The others watch,
# or change only rounding.
DECIDING: Mapping[str, Any] = {
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "overfit_batches": None,
    "fast_dev_run": False,
    "gradient_clip_algorithm": "norm",
    "max_time": None,
}
_ONE_EPOCH = "a run is one endless epoch, so that it resumes exactly: take"
# Arguments that are refused → what to take instead.
REFUSED: Mapping[str, str] = {
    "accelerator": "take trainer.accelerator",
    "strategy": "take trainer=ddp, fsdp or deepspeed_3 (trainer.strategy)",
    "devices": "take trainer.devices",
    "num_nodes": "take trainer.nodes",
    "precision": "take trainer.precision",
    "logger": "take the group logger, as logger=[csv,wandb] (docs/extending.md)",
    "callbacks": "take the group callbacks, as +callbacks.NAME._target_=CLASS (docs/extending.md)",
    "max_epochs": f"{_ONE_EPOCH} task.steps",
    "min_epochs": f"{_ONE_EPOCH} task.steps",
    "max_steps": "take task.steps, from which the learning rate follows, too",
    "min_steps": "take task.steps; task.patience and callbacks end a run earlier",
    "limit_predict_batches": "features are needed of every image: limit_train_batches and limit_val_batches leave out "
    "images for all that follows",
    "val_check_interval": "take task.val_every, in optimiser steps",
    "check_val_every_n_epoch": f"{_ONE_EPOCH} task.val_every, in optimiser steps",
    "num_sanity_val_steps": "a validation that works is checked by debug=fdr",
    "log_every_n_steps": "take task.log_every",
    "enable_checkpointing": "take task.checkpoint_every; a run without checkpoints could not be resumed",
    "enable_progress_bar": "take the group callbacks: callbacks=none, or callbacks.bar=null",
    "accumulate_grad_batches": "take trainer.micro_batch: a step has task.batch_size images in any case",
    "gradient_clip_val": "take task.gradient_clip",
    "use_distributed_sampler": "the samplers here share out the images themselves, each once",
    "barebones": "it switches off what saves and logs a run; benchmarks/train_step.py measures bare speed",
    "plugins": "checkpoints and processes need those that igpt passes",
    "sync_batchnorm": "no network here has batch normalisation",
    "reload_dataloaders_every_n_epochs": f"{_ONE_EPOCH} it out",
    "default_root_dir": "take paths.runs",
    "enable_autolog_hparams": "the whole config is logged as hyper-parameters",
    "model_registry": "take task=export for what is to be shared",
}


class LightningArguments(Settings):
    """Arguments of `lightning.Trainer` that are passed on, or done here as Lightning does them; null: its default."""

    limit_train_batches: Limit = None  # of the training images
    limit_val_batches: Limit = None
    limit_test_batches: Limit = None
    overfit_batches: Limit = None  # of train and val, without augmentation
    fast_dev_run: bool | Count | None = None  # optimiser steps, and batches of val and test; true: 1
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    max_time: Annotated[str, Field(pattern=r"^\d{2}:\d{2}:\d{2}:\d{2}$")] | None = None  # DD:HH:MM:SS, of training
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    detect_anomaly: bool | None = None
    enable_model_summary: bool | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, settings: Any) -> Any:
        """Refuses arguments of Lightning's that are none here, and misspelt ones, before the others are parsed."""
        for name in settings if isinstance(settings, Mapping) else ():
            if reason := REFUSED.get(name):
                raise ValueError(f"trainer.lightning.{name} is set by igpt: {reason}")
            if name not in cls.model_fields:
                near = suggest_name(str(name), (*cls.model_fields, *REFUSED))
                raise ValueError(f"lightning.Trainer has no argument {str(name)!r} (trainer.lightning){near}")
        return settings

    @property
    def dev_steps(self) -> int | None:
        """Optimiser steps of a `fast_dev_run`; None: an ordinary run."""
        return int(self.fast_dev_run) or None if self.fast_dev_run else None

    @property
    def limits(self) -> dict[str, float]:
        """How much of each limited split is read: whole numbers of batches, or shares."""
        named = {"train": self.limit_train_batches, "val": self.limit_val_batches, "test": self.limit_test_batches}
        named |= dict.fromkeys(("train", "val"), self.overfit_batches) if self.overfit_batches is not None else {}
        named |= dict.fromkeys(("val", "test"), self.dev_steps) if self.dev_steps else {}
        return {name: limit for name, limit in named.items() if limit is not None and not _is(limit, 1.0)}

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments for every Trainer of the run."""
        names = ("detect_anomaly", "enable_model_summary", "deterministic", "benchmark", "inference_mode")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def fit_arguments(self) -> dict[str, Any]:
        """Arguments for the Trainer of a training, besides `passed`."""
        names = ("gradient_clip_algorithm", "max_time")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def deciding_arguments(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trainer's settings `lightning` that change what is learned or measured: part of a run's identity."""
    given = trainer.get("lightning")
    if not isinstance(given, Mapping):
        return {}
    return {
        name: given[name]
        for name, neutral in DECIDING.items()
        if name in given and given[name] is not None and not _is(given[name], neutral)
    }


def answer_argument(key: str) -> str | None:
    """What to type for a key `trainer.NAME` whose name is an argument of Lightning's Trainer; None for other keys."""
    name = key.removeprefix("trainer.")
    if f"trainer.{name}" != key:
        return None
    if name in LightningArguments.model_fields:
        return f"{key} is an argument of Lightning's Trainer: take trainer.lightning.{name}"
    return f"{key} is an argument of Lightning's Trainer: {REFUSED[name]}" if name in REFUSED else None


def _is(value: Any, other: Any) -> bool:
    """Whether two values are equal and of one type: 1 is a batch, 1.0 is all of them."""
    return type(value) is type(other) and bool(value == other)
