"""Base class of the LightningModules that train: losses per optimiser step, curves, throughput, logging."""

import logging
import math
import time
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from igpt.distributed import ranks
from igpt.distributed.sharding import unsharded_shape
from igpt.metric.likelihood import PER_DIM, PER_DIM_OF_THESE_PIXELS, PER_TOKEN
from igpt.metric.result import Curve, Number
from igpt.metric.throughput import Meter
from igpt.settings.training import TrainingSettings
from igpt.tokens.batches import Batch
from igpt.training.deepspeed import ZeRO
from igpt.training.hardware import HardwareConfig
from igpt.training.measured_cost import StepTimer, TrainingClock
from igpt.training.nan_guard import FiniteGuard
from igpt.training.step_means import MINIMISED, StepMeans, squared_gradient_norm

log = logging.getLogger(__name__)

GRADIENT = "grad_norm"
UNTIMED, TIMED = 3, 5  # warm-up steps that are not timed; steps timed after them
UNITS = {
    "loss_gen": "nats/token", "loss_gen_ema": "nats/token", "loss_clf": "nats/image", "loss": "nats",
    "accuracy": "share", "bits_per_pixel": "bits/pixel",
    **dict.fromkeys(("grad_norm", "grad_norm_max"), "gradient norm"),
    **{key: unit for key, unit, _ in (PER_DIM, PER_DIM_OF_THESE_PIXELS)},
}  # fmt: skip


class TrainedModule(L.LightningModule):
    """Averages named figures over micro-batches, ranks and the optimiser steps since the last log line.

    `train/grad_norm` is the norm of the gradient before it is clipped, `train/grad_norm_max` its largest; DeepSpeed
    tells the former of the logged steps only. A subclass calls `accumulate` in its training step and
    `finish_validation` at the end of each validation.
    """

    units: ClassVar[Mapping[str, str]] = UNITS  # name of a figure → its unit
    has_gradient_norm: ClassVar[bool] = True  # False where the weights are of several independent trainings

    def __init__(
        self, hardware: HardwareConfig, settings: TrainingSettings, *, flops_per_image: float, n_ctx: int
    ) -> None:
        super().__init__()
        self.settings, self.machine = settings, hardware
        self.steps, self.log_every, self.batch_size = settings.steps, settings.log_every, settings.batch_size
        self.flops_per_image, self.n_ctx = flops_per_image, n_ctx  # n_ctx: tokens per image
        self.guard = FiniteGuard()
        self.history: dict[str, list[tuple[int, float]]] = {}  # name → (step, value); saved in checkpoints
        self.numbers: dict[str, Number] = {}  # of the last validation
        self.updated_to = 0  # last optimiser step whose change of the weights has begun in this process
        self._step: dict[str, Tensor] = {}  # running means over the micro-batches of this optimiser step
        self._passes = 0
        self.means = StepMeans(GRADIENT, hardware.rank.count)  # since the last log line; saved in checkpoints
        self.timer: StepTimer | None = None  # of this process, from its first step on
        self.clock = TrainingClock(hardware.rank.count)

    @property
    def flops_here(self) -> float:
        """Floating-point operations per device over the whole training."""
        return self.steps * self.batch_size * self.flops_per_image / self.machine.rank.count

    def accumulate(self, loss: Tensor, figures: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss; accumulates it and the scalar `figures` of one micro-batch for logging."""
        passes = self.trainer.accumulate_grad_batches
        self._passes += 1
        for name, value in {MINIMISED: loss, **figures}.items():
            share = value.detach().float() / passes
            self._step[name] = self._step[name] + share if name in self._step else share
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps the figures of the step; every `log_every` steps checks the loss of all ranks and records the means.

        One process on a CPU checks the loss of every step, before its weights change.
        """
        if self._passes < self.trainer.accumulate_grad_batches:  # DeepSpeed calls this hook for every micro-batch
            return
        step, self._passes = self.global_step + 1, 0
        self.rate = float(optimizer.param_groups[0]["lr"])  # read here: the scheduler steps before the rate is logged
        names = sorted(self._step)
        if self.has_gradient_norm and not self.machine.zero_stage:  # DeepSpeed keeps gradients to itself
            names.append(GRADIENT)
            self._step[GRADIENT] = squared_gradient_norm(optimizer, self.machine.rank.count)
        self.guard.record(self._step[MINIMISED], step)
        self.means.add(step, names, torch.stack([self._step[name] for name in names]))
        self._step = {}
        if step % self.log_every == 0:
            self.agree()
            for name, value in self.means.read().items():
                if name != MINIMISED and math.isfinite(value):  # a gradient may overflow, its loss does not
                    self.record(f"train/{name}", step, value)
        self.updated_to = step  # the optimiser is next: this is the last hook before it

    def agree(self) -> None:
        """Sums the figures of the steps so far over all ranks. A collective; it waits for the device.

        Raises:
            NonFiniteLossError: on every rank, if the loss of a step was not finite on one of them.
        """
        self.guard.report(self.means.gather())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step, strategy = self.updated_to, self.trainer.strategy
        if not isinstance(strategy, ZeRO) or self._passes or step % self.log_every:
            return
        if math.isfinite(norm := strategy.gradient_norm):  # of this step alone
            self.record(f"train/{GRADIENT}", step, norm)

    def record(self, name: str, step: int, value: float) -> None:
        """Appends a point to the curve `name`."""
        self.history.setdefault(name, []).append((step, value))

    def on_train_start(self) -> None:
        self.clock.start(_now(self.device))
        peak = self.machine.peak_tflops
        self.meter = Meter(
            flops_per_image=self.flops_per_image,
            n_ctx=self.n_ctx,
            peak_flops=peak * 1e12 * self.machine.rank.count if peak else None,
        )
        self.logged_step = self.begun = self.global_step
        self.timed_since: float | None = None
        # on a GPU only the steps that are logged are waited for
        self.timer = StepTimer(self.begun, _now(self.device), n_untimed=UNTIMED if self.device.type == "cpu" else 1)
        n_weight = sum(prod(unsharded_shape(p)) for p in self.parameters() if p.requires_grad)
        log.info("%s weights, steps %d to %d", f"{n_weight:,}", self.global_step + 1, self.steps)

    def on_train_end(self) -> None:
        self.clock.stop(_now(self.device))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        step = self.global_step
        self._log_eta(step)
        assert self.timer is not None
        if self.device.type == "cpu" or step % self.log_every == 0:
            self.timer.mark(step, time.perf_counter())
        if step % self.log_every or step == self.logged_step:
            return
        self.meter.add((step - self.logged_step) * self.batch_size)
        self.logged_step = step
        newest = {name: points[-1] for name, points in self.history.items() if name.startswith("train/")}
        train = {name: value for name, (at, value) in newest.items() if at == step}
        figures = self.meter.read()
        self.log_metrics({**train, "lr": self.rate, **figures}, step)
        speed = f"{figures['images_per_s']:,.0f} images/s, {figures['tokens_per_s']:,.0f} tokens/s"
        if "flop_utilisation" in figures:
            speed += f", {figures['flop_utilisation']:.1%} of the stated peak"
        if step < self.steps:
            speed += f", {duration((self.steps - step) * self.batch_size / figures['images_per_s'])} left"
        shown = {name.removeprefix("train/"): value for name, value in train.items() if GRADIENT not in name}
        message = self.format_metrics(shown)
        log.info("step %d/%d: %s, %s", step, self.steps, message, speed, extra={"progress": True})

    def _log_eta(self, step: int) -> None:
        """Logs the expected duration once, a few steps after the start, since the first steps are slower."""
        begun, timed = self.begun + UNTIMED, self.begun + UNTIMED + TIMED
        if step == begun and self.timed_since is None:
            self.timed_since = _now(self.device)
        elif step == timed and self.timed_since is not None:
            seconds, self.timed_since = (_now(self.device) - self.timed_since) / TIMED, None
            log.info("%.3g s a step: %s to go, validation aside", seconds, duration((self.steps - step) * seconds))

    def format_metrics(self, figures: Mapping[str, float]) -> str:
        """Figures as text: `1.2345 nats/token`, or `name value, …` when there are several."""
        if len(figures) == 1:
            ((name, value),) = figures.items()
            return f"{value:.4f} {self.units.get(name, name)}"
        return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        """Sends numbers, and the images and tokens seen, to every logger at `step`, unrounded, and to callbacks."""
        images = step * self.batch_size
        bits = {name.replace("loss_gen", PER_TOKEN.key): value / math.log(2) for name, value in figures.items()
                if name.endswith("/loss_gen")}  # fmt: skip
        figures = {**bits, **figures, "images_seen": images, "tokens_seen": images * self.n_ctx}
        for logger in self.trainer.loggers:
            logger.log_metrics(figures, step=step)
        # Equal on all ranks: `rank_zero_only` keeps Lightning from reducing them, `sync_dist` from advising to. On the
        # host: Lightning reads what its progress bars show, the losses, after every micro-batch.
        how: dict[str, Any] = {"logger": False, "sync_dist": True, "rank_zero_only": True}
        for name, value in figures.items():
            self.log(name, torch.tensor(value, dtype=torch.float32), prog_bar="/loss" in name, **how)

    def finish_validation(self, numbers: dict[str, Number], metrics: list[str]) -> None:
        """Finishes a validation: stores `numbers`; during training also logs and records those named in `metrics`."""
        self.numbers = numbers
        if self.trainer.state.fn != "fit":
            return
        self.log_metrics({name: numbers[name].value for name in metrics}, self.global_step)
        for name in metrics:
            self.record(name, self.global_step, numbers[name].value)
        message = self.format_metrics({name.removeprefix("val/"): numbers[name].value for name in metrics})
        log.info("step %d/%d: val %s", self.global_step, self.steps, message)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self.meter.pause()
            if self.timer is not None:
                self.timer.pause(time.perf_counter())

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == "fit":
            ranks.barrier()  # rank 0 may have drawn or probed alone, longer than a collective of the next step waits
            self.meter.resume()
            if self.timer is not None:
                self.timer.resume(time.perf_counter())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["step_means"] = self.means.state_dict()
        checkpoint["device_seconds"] = self.clock.read(_now(self.device))
        checkpoint["history"] = {name: [list(point) for point in points] for name, points in self.history.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (since_log_line := checkpoint.get("step_means")) is not None:  # releases before had none
            self.means.load_state_dict(since_log_line)
        self.clock.continue_from(checkpoint.get("device_seconds"))
        self.history = {name: [(int(x), float(y)) for x, y in points] for name, points in checkpoint["history"].items()}

    def curves(self) -> dict[str, Curve]:
        """The recorded points as curves over optimiser steps."""
        return {
            name: Curve([float(x) for x, _ in points], [y for _, y in points], "optimiser step",
                        self.units.get(name.rpartition("/")[2], name))
            for name, points in self.history.items()
        }  # fmt: skip


def _now(device: torch.device) -> float:
    """Wall-clock seconds, after pending work of a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def duration(seconds: float) -> str:
    """A human-readable duration: 40 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.0f} s"
