"""`task=finetune`: trains all weights and a linear class head on gen · L_GEN + clf · L_CLF."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.head_files import HeadMetadata, build_head, save_head
from igpt.checkpoint.igpt_format import (
    FORMAT,
    METADATA_KEY,
    Weights,
    check_format,
    meta_model,
    save_model,
    weights_sha256,
)
from igpt.checkpoint.resume import checkpoint_path, read_best
from igpt.distributed import ranks
from igpt.metric.result import Curve, Number, Result
from igpt.metric.throughput import train_flops_per_image
from igpt.model.dropout import NetworkDropout, add_dropout
from igpt.model.gpt import GPT
from igpt.model.head import ClassHead
from igpt.objective.joint import JointObjective
from igpt.run.components import Components
from igpt.settings.training import FinetuneSettings
from igpt.task.class_score import ClassScore, check_classes, classes_hash
from igpt.task.generative_score import choose_units
from igpt.tokens.batches import Batch
from igpt.training.base_module import TrainedModule
from igpt.training.checkpoint_callback import Checkpoints
from igpt.training.deepspeed import release_training_state
from igpt.training.frozen_networks import attach_frozen
from igpt.training.optimizers import every_step, make_adam

log = logging.getLogger(__name__)


class FinetuneModule(TrainedModule):
    """Minimises gen · L_GEN + clf · L_CLF; the head reads the mean over positions of the `ln_f` output.

    The head starts at zero, so the first L_CLF is exactly ln K. Constant learning rate after `warmup_steps`. Source:
    Chen et al. 2020, §2.3 and §3.1.
    """

    settings: FinetuneSettings

    def __init__(
        self, components: Components, settings: FinetuneSettings, *, n_class: int, split: str, n_image: int
    ) -> None:
        network = components.network
        super().__init__(
            components.hardware, settings, flops_per_image=train_flops_per_image(network), n_ctx=network.n_ctx
        )
        self.components = components
        self.objective, self.weights, self.n_class = components.objective, components.weights, n_class
        self.joint = JointObjective(self.objective, settings.loss_weights)
        self.split, self.n_image = split, n_image  # of the validation
        self.score = ClassScore(
            self.objective, n_class=n_class, eval_masks=settings.eval_masks, seed=components.seed,
            units=choose_units(components, split),
        )  # fmt: skip
        self.predictions = torch.empty(0).numpy()  # (N,) predicted classes of the last validation
        n_weight = sum(weight.numel() for weight in meta_model(network).parameters())
        self.n_shardable: int | None = n_weight + n_class * network.n_embd
        self.net: GPT | None = None
        self.dropout: NetworkDropout | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        mesh = getattr(self, "_device_mesh", None)
        self.net = self.machine.build_model(
            self.components.build_network, self._initialize, mesh, flops=self.flops_here
        )
        self.head = ClassHead(n_embd=self.net.n_embd, n_class=self.n_class)
        if not self.machine.is_sharded:
            ranks.check_agree("weights to begin with", {"digest": ranks.hash_module(self.net)})
        elif mesh is not None:  # DeepSpeed shards it by itself
            fully_shard(self.head, mesh=mesh["data_parallel"])
        if not self.joint.has_generative_loss:
            self.net.wtet.requires_grad_(False)  # only L_GEN reads it

    def _initialize(self, net: GPT) -> None:
        """Fills a new network's weights, and adds dropout."""
        if self.weights is None:
            net.init_weights(self.components.seed)
        else:
            self.weights.load_into(net)
        if self.settings.dropout:  # here, since a network on the meta device would lose its keys
            self.dropout = add_dropout(net, self.settings.dropout)

    def load_frozen(self, weights: Weights) -> None:
        """Takes the network and head of a checkpoint, to be judged: sharded over the ranks if training was."""
        assert self.net is None, "of a module that was not trained"
        assert weights.wclf is not None
        attach_frozen(self, self.machine.build_frozen(self.components.build_network, weights.load_into))
        self.head, self.n_shardable = build_head(weights.wclf.read()), None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_adam([p for p in self.parameters() if p.requires_grad], **self.settings.adam)
        warmup = self.settings.warmup_steps
        return every_step(LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1))))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.net is not None
        visible = self.objective.visible_mask(batch.tokens, batch.rng_keys)
        if self.dropout is not None:
            self.dropout.begin(batch.rng_keys)
        hidden = self.net.trunk(batch.tokens, visible)  # (B, T, C), read by both heads
        scores = self.head(hidden).float()  # (B, K)
        losses = self.joint.losses(self.net, hidden, scores, batch.tokens, batch.labels, visible)
        accuracy = (scores.argmax(dim=-1) == batch.labels).float().mean()
        return self.accumulate(self.joint.total(losses), {**losses, "accuracy": accuracy})

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.dropout is not None:  # not before: a backward pass with activation checkpointing drops, too
            self.dropout.end()
        super().on_train_batch_end(outputs, batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.net is not None
        self.score.add(self.net, self.head, batch)

    def on_validation_epoch_end(self) -> None:
        numbers, self.predictions = self.score.numbers(self.split, self.trainer, self.n_image)
        self.finish_validation(numbers, [f"{self.split}/{name}" for name in ("loss_gen", "loss_clf", "accuracy")])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["format"] = FORMAT
        checkpoint[METADATA_KEY] = self.components.checkpoint_metadata(step=self.global_step).to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_format(checkpoint.get("format"), Path(self.trainer.ckpt_path or ""))
        super().on_load_checkpoint(checkpoint)


def run(components: Components, settings: FinetuneSettings) -> Result:
    """Trains network and head, restores the step of best val accuracy, and evaluates test once with it.

    With `refit` they are trained again on train and val up to that step, from the same initial weights, before test.
    """
    hardware, weights = components.hardware, components.weights
    plan = hardware.train_batch_layout(settings.batch_size)
    data = components.build_datamodule(plan=plan)
    source = data.source
    is_refitted = settings.refit and source.labels_per_class is None  # else val's labels are not to be trained on
    if is_refitted:
        source.training(with_val=True)  # refused by streams, before a step
    elif settings.refit:
        log.warning("task.refit does not train on val: data.labels_per_class=%s limits labels", source.labels_per_class)
    if settings.dropout and weights is not None:
        log.info("task.dropout=%g of pretrained weights: the paper found no clear benefit", settings.dropout)
    splits = ["val", "test"] if settings.test else ["val"]
    n_class = check_classes(source, splits)

    def build_module(split: str) -> FinetuneModule:
        return FinetuneModule(components, settings, n_class=n_class, split=split, n_image=len(source.split(split)))

    runner = components.runner  # which starts the loggers
    trained = build_module("val")
    saving = Checkpoints(
        runner.folder, settings, trained.guard, keep=settings.checkpoint_keep, val_every=settings.val_every,
        monitor="val/accuracy", highest=True, patience=settings.patience,
    )  # fmt: skip
    progress = runner.fit(trained, data, settings, saving, gradient_clip=settings.gradient_clip)
    if "val/accuracy" not in trained.history:
        raise ValueError(
            f"the training ended at step {progress.step}, before its first validation (task.val_every="
            f"{settings.val_every}): there is no best step"
        )
    saving.restore_best(trained, trained.history["val/accuracy"][-1][0])
    best = ranks.broadcast_from_rank0(lambda: read_best(runner.folder))
    assert best is not None, "FinetuneSettings has seen to it that a validation is reached"
    log.info("step %d is the best: val accuracy %.4f", best["step"], best["value"])
    release_training_state(trained)
    chosen = final = find_weights(str(runner.folder / "checkpoints" / best["checkpoint"]))
    result = Result(curves=trained.curves())
    if is_refitted:
        again = build_module("val")
        again.clock = trained.clock  # the device-days of a run are those of both trainings
        final, curves = refit(components, again, best["step"])
        result.curves |= {name.replace("train/", "refit/"): curve for name, curve in curves.items()}
    if hardware.rank.is_first:
        network = {name: tensor.to_float32() for name, tensor in final.state().items()}
        save_model(runner.folder / "model", network, components.checkpoint_metadata(step=best["step"]))
        assert final.wclf is not None
        sha256 = weights_sha256(runner.folder / "model")
        about = HeadMetadata(
            n_class, source.name, classes_hash(source), sha256, source.class_names, trained.score.eval_masks,
            components.seed,
        )  # fmt: skip
        save_head(runner.folder / "model", final.wclf.to_float32().read(), about)
    for split in splits:
        judged = build_module(split)
        if split == "val" and trained.numbers and trained.history["val/accuracy"][-1][0] == best["step"]:
            judged.numbers = trained.numbers  # the last validation was the best
        else:
            judged.load_frozen(chosen if split == "val" else final)
            plan = hardware.eval_batch_layout(settings.batch_size)
            runner.validate(judged, components.build_datamodule(plan=plan, eval_split=split))
        result.numbers |= judged.numbers
        if split == "test":
            result.add_confusion(judged.score.confusion, source.class_names)
    result.numbers["best_step"] = Number(best["step"], "optimiser steps", 1)
    result.numbers["train/images_seen"] = Number(best["step"] * settings.batch_size, "images", 1)
    result.numbers |= trained.clock.numbers
    result.files |= {"model": Path("model"), "checkpoints": Path("checkpoints")}
    if source.labels_per_class is not None:
        log.warning(
            "the best step was chosen on all %d labels of val, though training saw few", len(source.split("val"))
        )
    result.provenance = {
        "step": best["step"],
        "seed": components.seed,
        "loss_weights": settings.loss_weights.model_dump(),
        "chosen_on": "val",
        "refitted_on_val": is_refitted,
        "tokenizer": data.tokenizer.hash,
        "from": weights.sha256 if weights else "scratch",
        **({"positions_resized_from": weights.resized_from} if weights and weights.resized_from else {}),
        **progress.provenance,
    }
    return result


def refit(components: Components, module: FinetuneModule, steps: int) -> tuple[Weights, dict[str, Curve]]:
    """The weights after `steps` steps on train and val, in `refit/` of the run, resumable; and the curves of training.

    Source: Chen et al. 2020, §3: validation images are folded back once the hyper-parameters are chosen.
    """
    log.info("training again on train and val, %d steps", steps)
    settings = module.settings.model_copy(update={"steps": steps})
    runner = components.runner.subfolder("refit")
    data = components.build_datamodule(plan=module.machine.train_batch_layout(settings.batch_size), with_val=True)
    saving = Checkpoints(runner.folder, settings, module.guard, keep=settings.checkpoint_keep, val_every=0)
    module.steps = steps
    runner.fit(module, data, settings, saving, gradient_clip=settings.gradient_clip)
    release_training_state(module)
    return find_weights(str(checkpoint_path(runner.folder, steps))), module.curves()
