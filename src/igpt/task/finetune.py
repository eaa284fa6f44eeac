"""Joint fine-tuning: L_GEN + L_CLF, all weights trained, a linear head on the last hidden states."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from igpt import ranks
from igpt.checkpoint.head import HeadOrigin, save_head
from igpt.checkpoint.native import FORMAT, ORIGIN, CheckpointMetadata, Weights, check_format, save_model, weights_sha256
from igpt.checkpoint.resume import AtomicCheckpointIO, read_best
from igpt.metric.result import Number, Result
from igpt.model.gpt import GPT
from igpt.model.head import ClassHead
from igpt.objective.base import Objective
from igpt.objective.joint import JointObjective, LossWeights
from igpt.probe.scores import confusion
from igpt.stopping import StopRequest
from igpt.task.checkpoints import Checkpoints
from igpt.task.classify import ClassScore, check_classes, classes_hash
from igpt.task.fit import Runner
from igpt.task.module import TrainedModule
from igpt.task.optim import adam, check_schedule
from igpt.task.pretrain import flops_per_image
from igpt.tokens.batches import Batch
from igpt.tokens.datamodule import TokenDataModule

log = logging.getLogger(__name__)


class FinetuneModule(TrainedModule):
    """Minimises gen · L_GEN + clf · L_CLF; the head reads the mean over positions of the `ln_f` output.

    The head starts at zero, so the first L_CLF is exactly ln K. Constant learning rate after `warmup_steps`. Source:
    Chen et al. 2020, §2.3 and §3.1.
    """

    def __init__(
        self,
        *,
        net: Callable[[], GPT],
        objective: Objective,
        n_class: int,
        loss_weights: LossWeights,
        optimizer: dict[str, float],
        warmup_steps: int,
        masks: int,
        seed: int,
        weights: Weights | None,
        metadata: Callable[..., CheckpointMetadata],
        split: str,
        n_image: int,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.build_net, self.objective, self.n_class = net, objective, n_class
        self.joint = JointObjective(objective, loss_weights)
        self.optimizer, self.warmup_steps, self.seed = optimizer, warmup_steps, seed
        self.weights, self.metadata = weights, metadata
        self.split, self.n_image = split, n_image  # what validation reads, and how many images that is
        self.score = ClassScore(objective, n_class=n_class, masks=masks, seed=seed)
        self.said = torch.empty(0).numpy()  # the class each image of the last validation was taken for
        self.net: GPT | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = self.build_net()
        if self.weights is None:
            self.net.init_weights(self.seed)
        else:
            self.weights.load_into(self.net)
        self.head = ClassHead(n_embd=self.net.n_embd, n_class=self.n_class)
        ranks.check_same("weights to begin with", {"digest": ranks.digest(self.net)})
        self.machine.prepare(self.net, flops=self.flops_here)
        if not self.joint.generates:
            self.net.wtet.requires_grad_(False)  # only L_GEN reads it

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = adam([p for p in self.parameters() if p.requires_grad], **self.optimizer)
        warmup = self.warmup_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.net is not None
        visible = self.objective.visible_mask(batch.tokens, batch.keys)
        hidden = self.net.trunk(batch.tokens, visible)  # (B, T, C), read by both heads
        scores = self.head(hidden).float()  # (B, K)
        logits = self.net.logits(hidden) if self.joint.generates else None  # (B, T, V)
        losses = self.joint.losses(logits, scores, batch.tokens, batch.labels, visible)
        accuracy = (scores.argmax(dim=-1) == batch.labels).float().mean()
        return self.tally(self.joint.total(losses), {**losses, "accuracy": accuracy})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.net is not None
        self.score.add(self.net, self.head, batch)

    def on_validation_epoch_end(self) -> None:
        numbers, self.said = self.score.numbers(self.split, self.trainer, self.n_image)
        self.validated(numbers, [f"{self.split}/{name}" for name in ("loss_gen", "loss_clf", "accuracy")])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["format"] = FORMAT
        checkpoint[ORIGIN] = self.metadata(step=self.global_step).to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_format(checkpoint.get("format"), Path(self.trainer.ckpt_path or ""))
        super().on_load_checkpoint(checkpoint)


def check(
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    loss_weights: dict[str, float],
    val_every: int,
    patience: int | None,
    log_every: int,
    checkpoint_every: int,
    checkpoint_keep: int,
    masks: int,
    **_: Any,
) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    from_one = {
        "steps": steps,
        "batch_size": batch_size,
        "val_every": val_every,
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
        "checkpoint_keep": checkpoint_keep,
        "masks": masks,
        "patience": 1 if patience is None else patience,
    }
    for name, value in from_one.items():
        if value < 1:
            raise ValueError(f"task.{name} must be at least 1, got {value}")
    if val_every > steps:
        raise ValueError(f"task.val_every {val_every} is more than task.steps {steps}: no validation would be reached")
    LossWeights.of(loss_weights)
    check_schedule(learning_rate=learning_rate, warmup_steps=warmup_steps, steps=steps)


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
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    warmup_steps: int,
    loss_weights: dict[str, float],
    masks: int,
    val_every: int,
    patience: int | None,
    log_every: int,
    checkpoint_every: int,
    checkpoint_keep: int,
    test: bool,
) -> Result:
    """Trains network and head, goes back to the best validation accuracy, and reads test once with that."""
    plan = runner.machine.training_plan(batch_size)
    data = tokens(plan=plan)
    source = data.source
    n_class = check_classes(source, ["val", *(["test"] if test else [])])
    optimizer = {"learning_rate": learning_rate, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay}

    def module(split: str) -> FinetuneModule:
        return FinetuneModule(
            net=net, objective=objective, n_class=n_class, loss_weights=LossWeights.of(loss_weights),
            optimizer=optimizer, warmup_steps=warmup_steps, masks=masks, seed=seed, weights=weights, metadata=metadata,
            split=split, n_image=len(source.split(split)), machine=runner.machine, steps=steps, log_every=log_every,
            batch_size=batch_size, flops_per_image=flops_per_image(metadata(step=0)), n_ctx=data.tokenizer.grid.n_ctx,
        )  # fmt: skip

    trained, stop = module("val"), StopRequest()
    saving = Checkpoints(
        runner.folder, trained.guard, every=checkpoint_every, keep=checkpoint_keep, val_every=val_every, stop=stop,
        monitor="val/accuracy", highest=True, patience=patience,
    )  # fmt: skip
    runner.fit(
        trained, data, plan=plan, steps=steps, val_every=val_every, log_every=log_every, callbacks=[saving], stop=stop
    )
    saving.recall(trained, trained.history["val/accuracy"][-1][0])
    best = ranks.from_first(lambda: read_best(runner.folder))
    assert best is not None  # `check` saw that a validation is reached
    checkpoint = AtomicCheckpointIO().load_checkpoint(runner.folder / "checkpoints" / best["checkpoint"])
    log.info("step %d is the best: val accuracy %.4f", best["step"], best["value"])
    result = Result(
        curves=trained.curves(),
        provenance={"step": best["step"], "seed": seed, "loss_weights": dict(loss_weights), "chosen_on": "val"},
    )
    for split in ("val", *(["test"] if test else [])):
        judged = module(split)
        judged.configure_model()
        judged.load_state_dict(checkpoint["state_dict"])
        assert judged.net is not None
        if split == "val" and runner.machine.rank.first:
            save_model(runner.folder / "model", judged.net.state_dict(), metadata(step=best["step"]))
            sha256 = weights_sha256(runner.folder / "model")
            about = HeadOrigin(n_class, source.name, classes_hash(source), sha256, source.class_names)
            save_head(runner.folder / "model", judged.head.wclf, about)
        if split == "val" and trained.numbers and trained.history["val/accuracy"][-1][0] == best["step"]:
            judged.numbers = trained.numbers  # the last validation was the best
        else:
            runner.validate(judged, tokens(plan=runner.machine.reading_plan(batch_size), eval_split=split))
        result.numbers |= judged.numbers
        if split == "test":
            labels = source.split("test").labels
            result.add_confusion(confusion(labels, judged.said, n_class), source.class_names)
    result.numbers["best_step"] = Number(best["step"], "optimiser steps", 1)
    result.numbers["train/images_seen"] = Number(best["step"] * batch_size, "images", 1)
    result.files |= {"model": Path("model"), "checkpoints": Path("checkpoints")}
    if source.labels_per_class is not None:
        log.warning(
            "the best step was chosen on all %d labels of val, though training saw few", len(source.split("val"))
        )
    result.provenance |= {
        "chosen_on": "val",
        "tokenizer": data.tokenizer.hash,
        "from": weights.sha256 if weights else "scratch",
    }
    return result
