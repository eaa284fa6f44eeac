"""The paper's ImageNet probe: heads for every layer and learning rate, trained together on frozen features."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from igpt.metric.share import share_number
from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.probe.scores import vote
from igpt.probe.selection import GridScores, select_strengths
from igpt.run.components import Components
from igpt.settings.probing import ProbeSettings
from igpt.tokens.batches import Batch
from igpt.training.base_module import TrainedModule
from igpt.training.checkpoint_callback import Checkpoints
from igpt.training.nan_guard import FiniteGuard
from igpt.training.optimizers import every_step, make_scheduler
from igpt.training.trainer import Progress
from igpt.utils import keyed

log = logging.getLogger(__name__)


class SGDProbeModule(TrainedModule):
    """P × R linear heads (windows of layers × learning rates), zero at init; momentum SGD, cosine schedule to 0.

    Source: Chen et al. 2020, §3.2 (ImageNet: SGD, momentum 0.9, rates from 30 down, cosine). A head that diverges does
    not affect the others.
    """

    def __init__(
        self, components: Components, settings: ProbeSettings, *, net: GPT, windows: list[list[int]], n_class: int
    ) -> None:
        # the operations of the frozen network are not a training's
        super().__init__(components.hardware, settings.sgd, flops_per_image=0.0, n_ctx=net.n_ctx)
        self.machine.prepare(net)
        self.guard = FiniteGuard(hint="lower task.sgd.rates: every head broke down")
        self.net, self.objective, self.norm = net.requires_grad_(False), components.objective, settings.norm
        self.eval_masks, self.n_class, self.seed = settings.eval_masks, n_class, components.seed
        self.rates, self.windows = settings.sgd.rates, windows
        self.momentum, self.weight_decay = settings.sgd.momentum, settings.sgd.weight_decay
        self.split, self.n_image = "val", len(components.source.split("val"))
        shape = (len(windows), n_class, net.n_embd * len(windows[0]))
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in self.rates)  # (P, K, D) each
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape[:2])) for _ in self.rates)
        self.strict_loading = False  # the frozen network is not in checkpoints
        self._right: Tensor | None = None  # (3, P, R) correct: by vote, under the first mask, in its top five
        self._predictions: list[tuple[Tensor, Tensor]] = []
        self.right: np.ndarray = np.empty((3, 0, 0))
        self.predictions: np.ndarray = np.empty((0, 0, 0))

    def pool_features(self, batch: Batch, mask: int) -> Tensor:
        """The features under one mask, concatenated over the layers of each window: (P, B, D) float32."""
        rng_keys = keyed.fold_in(batch.rng_keys, 100 + mask) if mask else batch.rng_keys
        with torch.no_grad():
            visible = self.objective.visible_mask(batch.tokens, rng_keys)
            layers = layer_features(self.net, batch.tokens, visible, norm=self.norm).float()  # (L + 1, B, C)
            return torch.stack([torch.cat(list(layers[window]), dim=-1) for window in self.windows])

    def scores(self, features: Tensor) -> Tensor:
        """Class scores: (P, B, D) → (P, R, B, K)."""
        weight, bias = torch.stack(list(self.weights), 1), torch.stack(list(self.biases), 1)  # (P, R, K, D)
        scores: Tensor = torch.einsum("pbd,prkd->prbk", features, weight) + bias[:, :, None]
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

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        every = []
        for mask in range(self.eval_masks):
            features = self.pool_features(batch, mask)
            with torch.autocast(self.device.type, enabled=False):
                scores = self.scores(features)  # (P, R, B, K)
            every.append(scores.argmax(dim=-1))
            if mask == 0:
                of_five = scores.topk(min(5, self.n_class), dim=-1).indices == batch.labels[:, None]
        predictions = torch.stack(every, dim=-2)
        rng_keys = keyed.per_example_keys(keyed.key(self.seed, "vote"), batch.rows.cpu())
        by_vote = vote(predictions, n_class=self.n_class, rng_keys=rng_keys)  # (P, R, B)
        rights = [by_vote == batch.labels, predictions[..., 0, :] == batch.labels, of_five.any(dim=-1)]
        right = torch.stack(rights).double().sum(dim=-1)
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
        name = f"{self.split}/accuracy"
        self.finish_validation({name: share_number(self.right[0].max(), self.n_image)}, [name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        heads = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("net.")}
        checkpoint["state_dict"] = heads

    def table(self, labels: np.ndarray) -> GridScores:
        """Val accuracies of the last validation, of images with these labels; 0 for diverged heads."""
        accuracies = [weight.isfinite().flatten(1).all(dim=1) for weight in self.weights]  # R of (P,)
        finite = torch.stack(accuracies, dim=1).cpu().numpy()
        self.right = self.right * finite
        cells = np.arange(len(finite)), select_strengths(self.right[0], self.rates)  # the best rate of each window
        correct = (self.predictions[cells] == labels) & finite[cells][:, None]  # (P, N)
        return GridScores(self.right[0], self.right[1], self.windows, list(self.rates), self.n_image, correct)


def train_heads(
    components: Components, settings: ProbeSettings, *, net: GPT, windows: list[list[int]], n_class: int
) -> tuple[SGDProbeModule, Progress, Callable[[str], None]]:
    """Trains the heads; returns the module, validated on val, its progress, and a function to validate another split.

    Raises:
        ValueError: bf16-true, which would round the heads.
    """
    hardware, sgd = components.hardware, settings.sgd
    if hardware.precision == "bf16-true":
        raise ValueError("task.solver=sgd keeps its heads in float32: choose trainer.precision=bf16-mixed")
    data = components.build_datamodule(plan=hardware.train_batch_layout(sgd.batch_size))
    runner = components.runner  # which starts the loggers
    module = SGDProbeModule(components, settings, net=net, windows=windows, n_class=n_class)
    saving = Checkpoints(
        runner.folder, sgd, module.guard, keep=1, val_every=sgd.val_every, monitor="val/accuracy", highest=True,
        finite=False,
    )  # fmt: skip
    progress = runner.fit(module, data, sgd, saving)
    reading = hardware.eval_batch_layout(sgd.batch_size)

    def read(split: str) -> None:
        module.split, module.n_image = split, len(components.source.split(split))
        runner.validate(module, components.build_datamodule(plan=reading, eval_split=split))

    read("val")  # with the final weights, after all rates have reached 0
    return module, progress, read
