"""Generative pretraining: the paper's recipe, from tokens to weights."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from igpt import ranks
from igpt.checkpoint.native import (
    FORMAT,
    ORIGIN,
    CheckpointMetadata,
    Weights,
    check_same,
    meta_model,
    metadata_in,
    read_model,
    save_model,
)
from igpt.data.source import Stream
from igpt.metric.result import Number, Result
from igpt.metric.throughput import train_flops_per_image
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.stopping import StopRequest
from igpt.task.checkpoints import Checkpoints
from igpt.task.fit import Runner
from igpt.task.module import TrainedModule
from igpt.task.optim import OPTIMIZERS, check_schedule, optimizer_of, scheduled
from igpt.task.score import GenerativeScore
from igpt.task.zero import let_go, whole_state
from igpt.tokens.batches import Batch
from igpt.tokens.datamodule import TokenDataModule

log = logging.getLogger(__name__)


class PretrainModule(TrainedModule):
    """Minimises a generative objective. Source of the defaults in `conf/task/pretrain.yaml`: Chen et al. 2020, §3.1."""

    def __init__(
        self,
        *,
        net: Callable[[], GPT],
        objective: Objective,
        optimizer_name: str,
        optimizer: dict[str, float],
        warmup_steps: int,
        seed: int,
        weights: Weights | None,
        metadata: Callable[..., CheckpointMetadata],
        n_val: int,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.build_net, self.objective = net, objective
        self.optimizer_name, self.optimizer = optimizer_name, optimizer
        self.warmup_steps, self.seed = warmup_steps, seed
        self.weights, self.metadata = weights, metadata
        self.n_val = n_val  # images to validate on
        network = meta_model(metadata(step=0).network)
        self.n_weight = sum(weight.numel() for weight in network.parameters())
        self.n_shardable: int | None = self.n_weight
        self.score = GenerativeScore(objective)
        self.net: GPT | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        mesh = getattr(self, "_device_mesh", None)
        self.net = self.machine.made(self.build_net, self._fill, mesh, flops=self.flops_here)
        if not self.machine.shards:
            ranks.check_same("weights to begin with", {"digest": ranks.digest(self.net)})

    def whole_again(self, weights: Weights) -> None:
        """After training in parts: the network as it was saved, whole in every process, to be read."""
        let_go(self)
        self.net, self.n_shardable = weights.net(), None
        self.machine.prepare(self.net)

    def _fill(self, net: GPT) -> None:
        if self.weights is None:
            net.init_weights(self.seed)
        else:
            self.weights.load_into(net)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.net is not None
        optimizer = optimizer_of(self.optimizer_name, self.net, **self.optimizer)
        schedule = scheduled(optimizer, warmup_steps=self.warmup_steps, steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.net is not None
        tokens, keys = batch.tokens, batch.keys  # (B, T), (B,)
        visible = self.objective.visible_mask(tokens, keys)  # (B, T) pixels the net may see; None: all
        loss = self.objective.loss(self.net(tokens, visible), tokens, visible)  # nats per token
        return self.tally(loss, {"loss_gen": loss})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.net is not None
        self.score.add(self.net, batch)

    def on_validation_epoch_end(self) -> None:
        self.validated(self.score.numbers("val", self.trainer, self.n_val), ["val/loss_gen"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["format"] = FORMAT
        checkpoint[ORIGIN] = self.metadata(step=self.global_step).to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = Path(self.trainer.ckpt_path or "")
        theirs, ours = metadata_in(checkpoint, path), self.metadata(step=0)
        check_same("network", theirs.network.to_dict(), ours.network.to_dict(), path)
        check_same("objective", theirs.objective, ours.objective, path)
        check_same("tokenizer", theirs.tokenizer.hash, ours.tokenizer.hash, path)
        super().on_load_checkpoint(checkpoint)


def check(
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    val_every: int,
    log_every: int,
    checkpoint_every: int,
    checkpoint_keep: int,
    optimizer: str,
    **_: Any,
) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    from_one = {
        "steps": steps,
        "batch_size": batch_size,
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
        "checkpoint_keep": checkpoint_keep,
    }
    for name, value in from_one.items():
        if value < 1:
            raise ValueError(f"task.{name} must be at least 1, got {value}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"task.optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if val_every < 0:
        raise ValueError(f"task.val_every must be at least 0 (only at the end), got {val_every}")
    check_schedule(learning_rate=learning_rate, warmup_steps=warmup_steps, steps=steps)


def flops_per_image(metadata: CheckpointMetadata) -> float:
    """Of one image's forward and backward pass through the network that `metadata` describes."""
    n = metadata.network
    return train_flops_per_image(n_layer=n.n_layer, n_embd=n.n_embd, n_ctx=n.n_ctx, n_vocab=n.n_vocab, causal=n.causal)


def run(
    *,
    runner: Runner,
    tokens: Callable[..., TokenDataModule],
    net: Callable[[], GPT],
    objective: Objective,
    metadata: Callable[..., CheckpointMetadata],
    weights: Weights | None,
    seed: int,
    steps: int,
    batch_size: int,
    optimizer: str,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    warmup_steps: int,
    val_every: int,
    log_every: int,
    checkpoint_every: int,
    checkpoint_keep: int,
) -> Result:
    """Trains a network and leaves `model/` and `checkpoints/` in the run folder. Lengths are in optimiser steps."""
    if runner.machine.shards and optimizer == "muon":
        raise ValueError(
            f"task.optimizer=muon works on whole matrices, trainer={runner.machine.strategy} takes them apart: choose "
            "task.optimizer=adam, or trainer=ddp"
        )
    plan = runner.machine.training_plan(batch_size)
    data = tokens(plan=plan)
    n_val = len(data.source.split("val"))
    if val_every and not n_val:
        raise ValueError("there is nothing to validate on: set task.val_every=0, or data.val_fraction above 0")
    images = data.source.training()
    n_train = "a stream" if isinstance(images, Stream) else len(images)
    ranks.check_same("images", {"train": n_train, "val": n_val, "tokenizer": data.tokenizer.hash})
    module = PretrainModule(
        net=net,
        objective=objective,
        machine=runner.machine,
        optimizer_name=optimizer,
        optimizer={
            "learning_rate": learning_rate,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
        },
        warmup_steps=warmup_steps,
        steps=steps,
        log_every=log_every,
        batch_size=batch_size,
        flops_per_image=flops_per_image(metadata(step=0)),
        n_ctx=data.tokenizer.grid.n_ctx,
        seed=seed,
        weights=weights,
        metadata=metadata,
        n_val=n_val,
    )
    stop = StopRequest()
    saving = Checkpoints(
        runner.folder, module.guard, every=checkpoint_every, keep=checkpoint_keep, val_every=val_every, stop=stop
    )
    runner.fit(
        module, data, plan=plan, steps=steps, val_every=val_every, log_every=log_every, callbacks=[saving], stop=stop
    )
    assert module.net is not None
    state = whole_state(module.net) if runner.machine.zero_stage else module.net.state_dict()
    save_model(runner.folder / "model", state, metadata(step=steps))
    if runner.machine.zero_stage:
        ranks.barrier()  # the first has written it
        module.whole_again(read_model(runner.folder / "model"))
    if n_val:
        runner.validate(module, data)
    n_weight = module.n_weight
    seen = steps * batch_size
    return Result(
        numbers={
            **module.numbers,
            "parameters": Number(n_weight, "weights", 1),
            "train/images_seen": Number(seen, "images", seen),
        },
        curves=module.curves(),
        files={"model": Path("model"), "checkpoints": Path("checkpoints")},
        provenance={"step": steps, "seed": seed, "tokenizer": data.tokenizer.hash},
    )
