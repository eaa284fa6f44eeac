"""The paper's ImageNet probe: heads for every layer and learning rate, trained together on frozen features."""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from igpt.metric.classification import ClassMetrics
from igpt.metric.result import Number
from igpt.metric.share import share_number
from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.probe.scores import vote
from igpt.probe.selection import GridScores, select_strengths
from igpt.run.components import Components
from igpt.settings.probing import ProbeSettings, SGDProbeSettings
from igpt.tokens.batches import Batch
from igpt.training.base_module import TrainedModule
from igpt.training.checkpoint_callback import Checkpoints
from igpt.training.frozen_networks import attach_frozen
from igpt.training.nan_guard import FiniteGuard, NonFiniteLossError
from igpt.training.optimizers import every_step, make_scheduler
from igpt.training.trainer import Progress, Runner
from igpt.utils import keyed

log = logging.getLogger(__name__)


class SGDProbeModule(TrainedModule):
    """P × R linear heads (windows of layers × learning rates), zero at init; momentum SGD, cosine schedule to 0.

    Source: Chen et al. 2020, §3.2 (ImageNet: SGD, momentum 0.9, rates from 30 down, cosine). A head that diverges does
    not affect the others.
    """

    net: GPT
    has_gradient_norm = False  # of all heads together, some of which may diverge

    def __init__(
        self, components: Components, settings: ProbeSettings, *, net: GPT, windows: list[list[int]], n_class: int
    ) -> None:
        # the operations of the frozen network are not a training's
        super().__init__(components.hardware, settings.sgd, flops_per_image=0.0, n_ctx=net.n_ctx)
        attach_frozen(self, net)
        self.guard = FiniteGuard(hint="lower task.sgd.rates: every head broke down")
        self.objective, self.norm = components.objective, settings.norm
        self.eval_masks, self.n_class, self.seed = settings.eval_masks, n_class, components.seed
        self.rates, self.windows = settings.sgd.rates, windows
        self.momentum, self.weight_decay = settings.sgd.momentum, settings.sgd.weight_decay
        self.split, self.n_image = "val", len(components.source.split("val"))
        shape = (len(windows), n_class, net.n_embd * len(windows[0]))
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in self.rates)  # (P, K, D) each
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape[:2])) for _ in self.rates)
        self._right: Tensor | None = None  # (2, P, R) correct: by vote, under the first mask
        self._predictions: list[tuple[Tensor, Tensor]] = []
        self.right: np.ndarray = np.empty((2, 0, 0))
        self.predictions: np.ndarray = np.empty((0, 0, 0))
        self.cell = 0, 0  # window and rate of the head that test is read with
        self.metrics = ClassMetrics(n_class, has_votes=self.eval_masks > 1)
        self.test_scores: tuple[dict[str, Number], np.ndarray] = {}, np.empty((0, 0))

    def pool_features(self, batch: Batch, mask: int) -> Tensor:
        """The features under one mask, concatenated over the layers of each window: (P, B, D) float32."""
        rng_keys = keyed.fold_in(batch.rng_keys, 100 + mask) if mask else batch.rng_keys
        with torch.no_grad():
            visible = self.objective.visible_mask(batch.tokens, rng_keys)
            layers = layer_features(self.net, batch.tokens, visible, norm=self.norm).float()  # (L + 1, B, C)
            return torch.stack([torch.cat(list(layers[window]), dim=-1) for window in self.windows])

    def scores(self, features: Tensor) -> Tensor:
        """Class scores: (P, B, D) → (P, R, B, K)."""
        by_rate = [  # a product for each, so that the heads of a rate are the same alone and beside others
            torch.einsum("pbd,pkd->pbk", features, weight) + bias[:, None]
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]
        scores: Tensor = torch.stack(by_rate, 1)
        return scores

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = [
            {"params": [weight, bias], "lr": rate}
            for weight, bias, rate in zip(self.weights, self.biases, self.rates, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, lr=self.rates[0], momentum=self.momentum, weight_decay=self.weight_decay)
        return every_step(make_scheduler(optimizer, warmup_steps=0, steps=self.steps))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features = self.pool_features(batch, 0)
        with torch.autocast(self.device.type, enabled=False):
            scores = self.scores(features)  # (P, R, B, K)
            labels = batch.labels.expand(*scores.shape[:2], -1)
            losses = F.cross_entropy(scores.flatten(0, 2), labels.flatten(), reduction="none")
            losses = losses.view(labels.shape).mean(dim=-1)  # (P, R): heads share no weights, so their sum is minimised
        self.accumulate(least := losses.detach().nan_to_num(torch.inf).min(), {"loss_clf": least})
        return losses.sum()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each head by its own norm, as heads are independent of each other; by value as Lightning does."""
        if gradient_clip_val is None or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for weight, bias in zip(self.weights, self.biases, strict=True):
            assert weight.grad is not None
            assert bias.grad is not None
            norm = (weight.grad.square().sum((1, 2)) + bias.grad.square().sum(1)).sqrt()  # (P,)
            scale = (gradient_clip_val / norm).clamp(max=1.0)
            weight.grad *= scale[:, None, None]
            bias.grad *= scale[:, None]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        every = []
        for mask in range(self.eval_masks):
            features = self.pool_features(batch, mask)
            with torch.autocast(self.device.type, enabled=False):
                scores = self.scores(features)  # (P, R, B, K)
            every.append(scores.argmax(dim=-1))
            if mask == 0:
                first = scores[self.cell]  # (B, K)
        predictions = torch.stack(every, dim=-2)
        rng_keys = keyed.per_example_keys(keyed.key(self.seed, "vote"), batch.rows.cpu())
        by_vote = vote(predictions, n_class=self.n_class, rng_keys=rng_keys)  # (P, R, B)
        if self.split == "test":
            self.metrics.update(first, by_vote[self.cell], batch.labels)
        right = torch.stack([by_vote == batch.labels, predictions[..., 0, :] == batch.labels]).double().sum(dim=-1)
        self._right = right if self._right is None else self._right + right
        self._predictions.append((batch.rows, by_vote))

    def on_validation_epoch_end(self) -> None:
        assert self._right is not None
        right = self.trainer.strategy.reduce(self._right, reduce_op="sum")  # integers: exact in any order
        assert isinstance(right, Tensor)
        heads = len(self.weights[0]), len(self.rates)
        predictions = torch.zeros((*heads, self.n_image), dtype=torch.int64, device=right.device)
        for rows, by_vote in self._predictions:
            predictions[:, :, rows] = by_vote
        together = self.trainer.strategy.reduce(predictions, reduce_op="sum")
        assert isinstance(together, Tensor)
        self._right, self._predictions = None, []
        self.right, self.predictions = right.cpu().numpy() / self.n_image, together.cpu().numpy()
        if self.split == "test":
            self.test_scores = self.metrics.compute()
        name = f"{self.split}/accuracy"
        self.finish_validation({name: share_number(self.right[0].max(), self.n_image)}, [name])

    def mark_broken(self) -> None:
        """Marks every head as diverged: NaN, and right for no image of val."""
        with torch.no_grad():
            for parameter in (*self.weights, *self.biases):
                parameter.fill_(torch.nan)
        heads = len(self.weights[0]), len(self.rates)
        self.right, self.predictions = np.zeros((2, *heads)), np.zeros((*heads, self.n_image), dtype=np.int64)

    def table(self, labels: np.ndarray) -> GridScores:
        """Val accuracies of the last validation, of images with these labels; 0 for diverged heads."""
        accuracies = [weight.isfinite().flatten(1).all(dim=1) for weight in self.weights]  # R of (P,)
        finite = torch.stack(accuracies, dim=1).cpu().numpy()
        self.right = self.right * finite
        cells = np.arange(len(finite)), select_strengths(self.right[0], self.rates)  # the best rate of each window
        correct = (self.predictions[cells] == labels) & finite[cells][:, None]  # (P, N)
        return GridScores(self.right[0], self.right[1], self.windows, list(self.rates), self.n_image, correct)


ModuleFactory = Callable[[list[float]], SGDProbeModule]  # rates → their untrained heads
Validation = Callable[[str], None]  # of heads, on a split


def train_heads(
    components: Components, settings: ProbeSettings, *, net: GPT, windows: list[list[int]], n_class: int
) -> tuple[SGDProbeModule, Progress, Validation]:
    """Trains the heads; returns the module, validated on val, its progress, and a function to validate another split.

    Raises:
        ValueError: bf16-true, which would round the heads; images that a stream does not have.
    """
    sgd = settings.sgd
    if components.hardware.precision == "bf16-true":
        raise ValueError("task.solver=sgd keeps its heads in float32: choose trainer.precision=bf16-mixed")
    components.build_datamodule(augment=sgd.augment, with_val=bool(settings.refit)).training_images()

    def build(rates: list[float]) -> SGDProbeModule:
        own = settings.model_copy(update={"sgd": sgd.model_copy(update={"rates": rates})})
        return SGDProbeModule(components, own, net=net, windows=windows, n_class=n_class)

    if sgd.search == "in_turn":
        module, progress = _search_in_turn(components, sgd.rates, build)
    else:
        module = build(sgd.rates)
        progress = _fit(components, module, components.runner)
        _validate(components, module, "val")  # with the final weights, after all rates have reached 0
    return module, progress, partial(_validate, components, module)


def refit_head(
    components: Components, settings: ProbeSettings, *, net: GPT, window: list[int], rate: float, n_class: int
) -> tuple[SGDProbeModule, Validation]:
    """Trains one head on train and val, in `refit/` of the run; returns it, and a function to validate a split."""
    log.info("training the head of layers %s at rate %g again, on train and val", window, rate)
    settings = settings.model_copy(update={"sgd": settings.sgd.model_copy(update={"rates": [rate]})})
    module = SGDProbeModule(components, settings, net=net, windows=[window], n_class=n_class)
    _fit(components, module, components.runner.subfolder("refit"), with_val=True)
    return module, partial(_validate, components, module)


def _search_in_turn(
    components: Components, rates: list[float], build: ModuleFactory
) -> tuple[SGDProbeModule, Progress]:
    """Trains one rate after another, from the largest down, until the best accuracy on val falls.

    Returns a module of all rates tried, as if they were trained together. A rate at which every head breaks down has
    accuracy 0. Source: Chen et al. 2020, §3.1 and §3.2, whose search ends when the loss rises.

    Raises:
        NonFiniteLossError: every head of every rate broke down.
    """
    tried: list[SGDProbeModule] = []
    progress: Progress | None = None
    before, labels = 0.0, components.source.split("val").labels
    for rate in sorted(rates, reverse=True):
        module = build([rate])
        try:
            progress = _fit(components, module, components.runner.subfolder(f"rates/{rate}"))
            _validate(components, module, "val")
        except NonFiniteLossError as error:
            if progress is None and rate == min(rates):
                raise
            log.info("rate %g: %s", rate, error)
            module.mark_broken()
        tried.append(module)
        best = float(module.table(labels).accuracy.max())
        log.info("rate %g: val accuracy of the best layer %.4f, before it %.4f", rate, best, before)
        if best < before:
            break
        before = best
    assert progress is not None, "else the last rate has raised"
    together = build([module.rates[0] for module in tried])
    with torch.no_grad():
        for r, module in enumerate(tried):
            together.weights[r].copy_(module.weights[0])
            together.biases[r].copy_(module.biases[0])
            for name, points in module.history.items():
                kind, _, figure = name.partition("/")
                together.history[f"{kind}/rate_{module.rates[0]:g}/{figure}"] = points
    together.right = np.concatenate([module.right for module in tried], axis=2)
    together.predictions = np.concatenate([module.predictions for module in tried], axis=1)
    return together, progress


def _fit(components: Components, module: SGDProbeModule, runner: Runner, *, with_val: bool = False) -> Progress:
    """Trains the heads of a module in the folder of `runner`; `with_val`: on train and val, without validations."""
    sgd = module.settings
    assert isinstance(sgd, SGDProbeSettings)
    plan = components.hardware.train_batch_layout(sgd.batch_size)
    data = components.build_datamodule(plan=plan, augment=sgd.augment, with_val=with_val)
    saving = Checkpoints(
        runner.folder, sgd, module.guard, keep=1, val_every=0 if with_val else sgd.val_every, monitor="val/accuracy",
        highest=True, finite=False,
    )  # fmt: skip
    return runner.fit(module, data, sgd, saving, gradient_clip=sgd.gradient_clip)


def _validate(components: Components, module: SGDProbeModule, split: str) -> None:
    module.split, module.n_image = split, len(components.source.split(split))
    plan = components.hardware.eval_batch_layout(module.batch_size)
    components.runner.validate(module, components.build_datamodule(plan=plan, eval_split=split))
