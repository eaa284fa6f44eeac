"""Generative pretraining: the paper's recipe, from tokens to weights."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from igpt import ranks
from igpt.checkpoint.native import FORMAT, Origin, Weights, check_same, save_model
from igpt.data.source import Stream
from igpt.metric.result import Curve, Number, Result
from igpt.metric.throughput import Meter, train_flops_per_image
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.stopping import StopRequest
from igpt.task.checkpoints import Checkpoints
from igpt.task.fit import Machine, Runner
from igpt.task.guard import FiniteGuard
from igpt.task.optim import adam, check_schedule, scheduled
from igpt.task.score import GenerativeScore
from igpt.tokens.datamodule import Batch, TokenDataModule

log = logging.getLogger(__name__)


class PretrainModule(L.LightningModule):
    """Minimises a generative objective. Source of the defaults in `conf/task/pretrain.yaml`: Chen et al. 2020, §3.1."""

    def __init__(
        self,
        *,
        net: Callable[[], GPT],
        objective: Objective,
        machine: Machine,
        optimizer: dict[str, float],
        warmup_steps: int,
        steps: int,
        log_every: int,
        batch_size: int,
        seed: int,
        weights: Weights | None,
        origin: Callable[..., Origin],
        n_val: int,
    ) -> None:
        super().__init__()
        self.build_net, self.objective, self.machine = net, objective, machine
        self.optimizer, self.warmup_steps, self.steps = optimizer, warmup_steps, steps
        self.log_every, self.batch_size, self.seed = log_every, batch_size, seed
        self.n_val = n_val  # images to validate on
        self.weights, self.origin = weights, origin
        self.score = GenerativeScore(objective)
        self.guard = FiniteGuard()
        self.step_loss: Tensor | None = None  # mean over the passes of this optimiser step, nats per token
        self.history: dict[str, list[tuple[int, float]]] = {}  # name → (step, value), kept in checkpoints
        self.numbers: dict[str, Number] = {}  # of the last validation
        self.net: GPT | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = self.build_net()
        if self.weights is None:
            self.net.init_weights(self.seed)
        else:
            self.weights.load_into(self.net)
        ranks.check_same("weights to begin with", {"digest": ranks.digest(self.net)})
        self.machine.prepare(self.net)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = adam(self.parameters(), **self.optimizer)
        schedule = scheduled(optimizer, warmup_steps=self.warmup_steps, steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.net is not None
        tokens, keys = batch.tokens, batch.keys  # (B, T), (B,)
        keep = self.objective.keep(tokens, keys)  # (B, T) pixels the net may see; None: all
        loss = self.objective.loss(self.net(tokens, keep), tokens, keep)  # nats per token
        share = loss.detach() / self.trainer.accumulate_grad_batches
        self.step_loss = share if self.step_loss is None else self.step_loss + share
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the loss (on a CPU before it can change a weight) and notes it every `log_every` steps."""
        assert self.step_loss is not None
        step = self.global_step + 1
        loss = self.trainer.strategy.reduce(self.step_loss, reduce_op="mean")  # over all processes
        assert isinstance(loss, Tensor)
        self.rate = float(optimizer.param_groups[0]["lr"])  # the schedule moves on before it is logged
        self.guard.see(loss, step)
        if step % self.log_every == 0:
            self.guard.check()
            self.note("train/loss_gen", step, float(loss))
        self.step_loss = None

    def note(self, name: str, step: int, value: float) -> None:
        """Adds a point to the curve `name`."""
        self.history.setdefault(name, []).append((step, value))

    def on_train_start(self) -> None:
        assert self.net is not None
        net, peak = self.net, self.machine.peak_tflops
        self.meter = Meter(
            flops_per_image=train_flops_per_image(
                n_layer=net.n_layer, n_embd=net.n_embd, n_ctx=net.n_ctx, n_vocab=net.n_vocab, causal=net.causal
            ),
            n_ctx=net.n_ctx,
            peak_flops=peak * 1e12 * self.machine.rank.count if peak else None,
        )
        self.logged_step = self.global_step
        n_weight = sum(p.numel() for p in net.parameters())
        log.info("%s weights, steps %d to %d", f"{n_weight:,}", self.global_step + 1, self.steps)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        step = self.global_step
        if step % self.log_every or step == self.logged_step:
            return
        self.meter.add((step - self.logged_step) * self.batch_size)
        self.logged_step = step
        loss = self.history["train/loss_gen"][-1][1]
        figures = self.meter.read()
        images = step * self.batch_size
        seen = {"images_seen": images, "tokens_seen": images * batch.tokens[0].numel()}
        self.publish({"train/loss_gen": loss, "lr": self.rate, **figures, **seen}, step)
        speed = f"{figures['images_per_s']:,.0f} images/s, {figures['tokens_per_s']:,.0f} tokens/s"
        if "flop_utilisation" in figures:
            speed += f", {figures['flop_utilisation']:.1%} of the stated peak"
        log.info("step %d/%d: %.4f nats/token, %s", step, self.steps, loss, speed, extra={"progress": True})

    def publish(self, figures: dict[str, float], step: int) -> None:
        """Gives numbers to every logger, exactly, under the step they are of, and to callbacks by their names."""
        for logger in self.trainer.loggers:
            logger.log_metrics(figures, step=step)
        self.log_dict(figures, logger=False, sync_dist=True)  # every process holds the same values

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self.meter.pause()

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == "fit":
            self.meter.resume()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.net is not None
        self.score.add(self.net, batch)

    def on_validation_epoch_end(self) -> None:
        self.numbers = self.score.numbers("val", self.trainer, self.n_val)
        loss = self.numbers["val/loss_gen"].value
        if self.trainer.state.fn == "fit":
            self.publish({"val/loss_gen": loss}, self.global_step)
            self.note("val/loss_gen", self.global_step, loss)
            log.info("step %d/%d: val %.4f nats/token", self.global_step, self.steps, loss)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["format"] = FORMAT
        checkpoint["origin"] = vars(self.origin(step=self.global_step))
        checkpoint["history"] = {name: [list(point) for point in points] for name, points in self.history.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = Path(self.trainer.ckpt_path or "")
        check_same("format", checkpoint.get("format"), FORMAT, path)
        ours = vars(self.origin(step=0))
        for part in ("network", "objective", "palette_hash", "permutation"):
            check_same(part, checkpoint["origin"][part], ours[part], path)
        self.history = {name: [(int(x), float(y)) for x, y in points] for name, points in checkpoint["history"].items()}


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
    if val_every < 0:
        raise ValueError(f"task.val_every must be at least 0 (only at the end), got {val_every}")
    check_schedule(learning_rate=learning_rate, warmup_steps=warmup_steps, steps=steps)


def run(
    *,
    runner: Runner,
    tokens: Callable[..., TokenDataModule],
    net: Callable[[], GPT],
    objective: Objective,
    origin: Callable[..., Origin],
    weights: Weights | None,
    seed: int,
    steps: int,
    batch_size: int,
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
    plan = runner.machine.plan(batch_size)
    data = tokens(plan=plan)
    n_val = len(data.source.split("val"))
    if val_every and not n_val:
        raise ValueError("there is nothing to validate on: set task.val_every=0, or data.val_fraction above 0")
    images = data.source.training()
    n_train = "a stream" if isinstance(images, Stream) else len(images)
    ranks.check_same("images", {"train": n_train, "val": n_val, "palette": data.palette.hash})
    module = PretrainModule(
        net=net,
        objective=objective,
        machine=runner.machine,
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
        seed=seed,
        weights=weights,
        origin=origin,
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
    if runner.machine.rank.first:
        save_model(runner.folder / "model", module.net.state_dict(), origin(step=steps))
    if n_val:
        runner.validate(module, data)
    n_weight = sum(p.numel() for p in module.net.parameters())
    seen = steps * batch_size
    return Result(
        numbers={
            **module.numbers,
            "parameters": Number(n_weight, "weights", 1),
            "train/images_seen": Number(seen, "images", seen),
        },
        curves={
            name: Curve([float(x) for x, _ in points], [y for _, y in points], "optimiser step", "nats/token")
            for name, points in module.history.items()
        },
        files={"model": Path("model"), "checkpoints": Path("checkpoints")},
        provenance={"step": steps, "seed": seed, "palette": data.palette.hash},
    )
