"""Lightning Trainer calls: fit, validate, predict."""

import logging
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from igpt.checkpoint.resume import AtomicCheckpointIO, latest_checkpoint
from igpt.distributed.ranks import Ranks, barrier, broadcast_from_rank0
from igpt.metric.result import Number
from igpt.settings.training import TrainingSettings
from igpt.training.checkpoint_callback import Checkpoints
from igpt.training.deepspeed import ZeRO
from igpt.training.fsdp import FSDP, one_graph_a_block
from igpt.training.hardware import HardwareConfig, matmul_precision
from igpt.training.lightning_callbacks import is_observer, list_observers
from igpt.training.loggers import guard
from igpt.training.measured_cost import peak_memory, reset_peak_memory

log = logging.getLogger(__name__)

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
IN_PIECES = 2_000_000_000  # weights; above it checkpoints are sharded by default, too large for one process


@dataclass(frozen=True)
class Progress:
    """The end of a training: its optimiser steps, who ended it before its last one, if it did, and its memory."""

    step: int
    stopped_early: str | None  # as `stopped early by EarlyStopping at step 4 of 8`
    peak_memory: Number  # GB, of this process

    @property
    def provenance(self) -> dict[str, str]:
        """What a result's provenance says of an early stop: nothing, if there was none."""
        return {} if self.stopped_early is None else {"stopped_early": self.stopped_early}


@dataclass(frozen=True)
class Runner:
    """Runs LightningModules in one run directory."""

    machine: HardwareConfig
    folder: Path
    loggers: list[Logger] = field(default_factory=list)
    callbacks: list[L.Callback] = field(default_factory=list)

    @cached_property
    def resume_from(self) -> Path | None:
        """The checkpoint to resume from; cached, as verifying it takes a while."""
        return broadcast_from_rank0(lambda: latest_checkpoint(self.folder))

    def subfolder(self, name: str) -> "Runner":
        """The runner of a further training of this run, with checkpoints of its own in a folder of the run.

        Only observing callbacks watch it. Loggers do not, as their steps would go back.
        """
        others = [type(each).__name__ for each in self.callbacks if not is_observer(each)]
        if others:
            log.warning("%s: trained without %s, which may change a training", name, ", ".join(others))
        unlimited = self.machine.lightning.model_copy(update={"max_time": None})  # which is the first training's
        machine = self.machine.model_copy(update={"lightning": unlimited})
        return Runner(machine, self.folder / name, callbacks=list_observers(self.callbacks))

    def fit(
        self,
        module: L.LightningModule,
        data: L.LightningDataModule,
        settings: TrainingSettings,
        saving: Checkpoints,
        *,
        gradient_clip: float | None = None,
    ) -> Progress:
        """Trains for `settings.steps` optimiser steps, resuming from the newest checkpoint of the run directory if any.

        Callbacks other than observers are called before a checkpoint is saved, which therefore holds what they did.

        The run is one Lightning epoch over an infinite loader. `saving.val_every` 0: no validation during training.
        Signals are recorded in `saving.stop` meanwhile. `gradient_clip`: largest norm of a step's gradient.
        """
        plan, arguments = self.machine.train_batch_layout(settings.batch_size), self.machine.lightning
        steps = settings.steps
        if arguments.dev_steps is not None:
            steps, saving.val_every = min(steps, arguments.dev_steps), min(saving.val_every, arguments.dev_steps)
        val_every = saving.val_every
        if self.resume_from is not None:
            log.info("resuming from %s", self.resume_from)
        trainer = self._trainer(
            module,
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=plan.accumulate,
            val_check_interval=val_every * plan.accumulate if val_every else None,
            check_val_every_n_epoch=None if val_every else 1,
            limit_val_batches=1.0 if val_every else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=settings.log_every,
            gradient_clip_val=gradient_clip,
            logger=[guard(logger) for logger in self.loggers],
            callbacks=[
                saving.marker,
                *sorted([saving, *self.callbacks], key=lambda each: (is_observer(each), each is saving)),
            ],
            **arguments.fit_arguments,
        )
        reset_peak_memory(self.machine.device)
        precision = matmul_precision(self.machine.matmul_precision, self.machine.device)
        with saving.stop.install_handlers(), precision, one_graph_a_block():
            trainer.fit(module, data, ckpt_path=self.resume_from, weights_only=True)
        step, early = trainer.global_step, None
        if step < settings.steps:
            by = saving.stopped_by or ("the Trainer" if step < steps else "fast_dev_run")
            early = f"stopped early by {by} at step {step:,} of {settings.steps:,}"
            log.info("%s", early)
        return Progress(step, early, peak_memory(self.machine.device))

    def validate(self, module: L.LightningModule, data: L.LightningDataModule) -> None:
        """Runs the module's validation over the evaluation split once."""
        with matmul_precision(self.machine.matmul_precision, self.machine.device):
            self._trainer(module, logger=False).validate(module, datamodule=data, verbose=False)

    def predict(self, module: L.LightningModule, data: L.LightningDataModule) -> None:
        """Runs the module's `predict_step` over the evaluation split once; its return values are discarded."""
        with matmul_precision(self.machine.matmul_precision, self.machine.device), warnings.catch_warnings():
            # both are intended: the sampler shards images itself, and writers store the predictions
            warnings.filterwarnings("ignore", message=".*custom batch sampler.*|.*predict returned None.*")
            self._trainer(module, logger=False).predict(module, datamodule=data, return_predictions=False)

    def _strategy(self, module: L.LightningModule) -> Strategy | str:
        count = self.machine.rank.count
        n_weight = getattr(module, "n_shardable", None)  # None: a module that cannot be sharded
        if self.machine.zero_stage and n_weight is not None:
            self.machine.check_training()
            return ZeRO(zero_stage=self.machine.zero_stage, offload=self.machine.is_offloaded, n_weight=n_weight)
        if self.machine.is_sharded and n_weight is not None:
            requested = self.machine.sharded_checkpoint
            return FSDP(count=count, in_pieces=n_weight > IN_PIECES if requested == "auto" else requested)
        if count == 1:
            return "auto"
        if of_frozen := [name for name, weight in module.named_parameters() if isinstance(weight, DTensor)]:
            ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(module, of_frozen)
        return DDPStrategy(gradient_as_bucket_view=True)

    def _profiler(self) -> Profiler | None:
        """The profiler of `trainer.lightning.profiler`, which writes to `profile/` of the run directory; of rank 0."""
        chosen = self.machine.lightning.profiler
        if chosen is None or not self.machine.rank.is_first:
            return None
        profiler: Profiler = PROFILERS[chosen](dirpath=self.folder / "profile", filename=chosen)
        return profiler

    def _trainer(self, module: L.LightningModule, **options: Any) -> L.Trainer:
        """Lightning's Trainer, on every rank at the same time."""
        barrier()  # the first may have saved or hashed something, longer than the Trainer's own barrier waits
        machine = self.machine
        trainer = L.Trainer(
            accelerator=machine.device.type,
            devices=1 if machine.device.index is None else [machine.device.index],
            num_nodes=machine.rank.count,  # see `Ranks`
            strategy=self._strategy(module),
            precision=machine.precision,
            default_root_dir=self.folder,
            plugins=[
                AtomicCheckpointIO(),
                Ranks() if machine.rank.count > 1 or machine.zero_stage else LightningEnvironment(),
            ],
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=any(isinstance(each, ProgressBar) for each in options.get("callbacks", ())),
            **{
                "enable_model_summary": False,
                "profiler": self._profiler(),
                "inference_mode": not machine.is_sharded,  # FSDP2 keeps tensors of a validation for training
                **machine.lightning.trainer_arguments,
                **options,
            },
        )
        # Lightning's SIGTERM handler ends a run with exit code 0 and communicates with other ranks inside the handler
        connector = trainer._signal_connector
        connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # no option disables it
        # nor this, at every micro-batch: rank 0 tells the others whether it came, and each waits for its GPU to hear it
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        return trainer
