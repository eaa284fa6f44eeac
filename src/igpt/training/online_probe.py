"""Callback: linear probes of a few layers during pretraining."""

import logging
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.probe.lbfgs import TOLERANCE, logistic_regression
from igpt.report.bystanders import Bystander
from igpt.settings.fields import Count, Norm, Positive, Share
from igpt.tokens.datamodule import TokenDataModule
from igpt.utils import keyed

log = logging.getLogger(__name__)


class OnlineLinearProbe(L.Callback):
    """Logs the val accuracy of logistic regression on the features of layers at relative `depths` in [0, 1].

    The images are the same at every validation, drawn by the run's seed, and C is fixed, so the points of a curve
    compare. For a result to report use `task=probe`, which searches layer and C on all images.
    """

    is_observer = True  # changes nothing in training

    def __init__(
        self,
        *,
        every: Count,
        depths: Annotated[list[Share], Field(min_length=1)],
        train_images: Count,
        val_images: Count,
        strength: Positive,
        batch_size: Count,
        norm: Norm,
    ) -> None:
        self.every, self.depths, self.batch_size = every, depths, batch_size
        self.counts = {"train": train_images, "val": val_images}
        self.strength, self.norm = strength, norm
        self.bystander = Bystander("callbacks.probe")
        self._images: dict[str, tuple[Tensor, np.ndarray]] = {}  # split → tokens (N, T), labels (N,)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TokenDataModule):
            raise ValueError("callbacks=probe reads the layers of a network, this run trains none: leave it out")
        if data.source.n_class is None:
            raise ValueError(f"callbacks=probe needs labels, data={data.source.name} has none")
        module: Any = pl_module  # a PretrainModule
        if isinstance(module.net.wte, DTensor) or hasattr(module.net.wte, "ds_shape"):
            raise ValueError(
                "callbacks=probe reads every layer of a whole network: leave it out under trainer=fsdp and DeepSpeed's"
            )
        if not trainer.limit_val_batches:
            raise ValueError("callbacks=probe looks at every validation: set task.val_every above 0")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        passes = trainer.global_step * trainer.accumulate_grad_batches
        due = trainer.state.fn == "fit" and passes // int(trainer.val_check_interval or 1) % self.every == 0
        if not (due and trainer.is_global_zero):
            return
        module: Any = pl_module  # a PretrainModule
        data: Any = getattr(trainer, "datamodule", None)
        with self.bystander:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                accuracies = self.measure_accuracies(module.net, module.objective, data)
            for name, value in accuracies.items():
                module.record(name, trainer.global_step, value)
            for logger in trainer.loggers:
                logger.log_metrics(accuracies, step=trainer.global_step)

    def measure_accuracies(self, net: GPT, objective: Any, data: TokenDataModule) -> dict[str, float]:
        """Metric name (`probe/layer_4/accuracy`) → share of val images classified correctly, for every depth."""
        layers = sorted({round(depth * net.n_layer) for depth in self.depths})
        x, labels = {}, {}
        device = net.wte.device
        for split, count in self.counts.items():
            if split not in self._images:
                rows = data.sample_rows(split, at_most=count)
                self._images[split] = data.encode_rows(split, rows), data.source.split(split).labels[rows]
            tokens, of_split = self._images[split]
            run_key = keyed.key(data.seed, f"probe {split}")
            rng_keys = keyed.per_example_keys(run_key, torch.arange(len(tokens))).to(device)
            parts = []
            for some, some_keys in zip(*(torch.split(of, self.batch_size) for of in (tokens, rng_keys)), strict=True):
                batch = some.long().to(device)
                features = layer_features(net, batch, objective.visible_mask(batch, some_keys), norm=self.norm)
                parts.append(features[layers].float())
            x[split] = torch.cat(parts, dim=1)  # (P, N, C)
            labels[split] = torch.from_numpy(of_split).to(device)
        assert data.source.n_class is not None
        with torch.autocast(device.type, enabled=False):
            names = [str(layer) for layer in layers]
            how: Any = {"n_class": data.source.n_class, "C_grid": [self.strength], "names": names}
            heads = logistic_regression(x["train"], labels["train"], **how)
            for layer, gap in zip(layers, heads.suboptimality[:, 0].tolist(), strict=True):
                if gap > TOLERANCE:
                    log.warning("probe of layer %d: may be %.1e nats above its minimum, C = %g", layer, gap,
                                self.strength)  # fmt: skip
            right = (heads.scores(x["val"]).argmax(dim=-1)[:, 0] == labels["val"]).double().mean(dim=-1)
        return {f"probe/layer_{layer}/accuracy": share for layer, share in zip(layers, right.tolist(), strict=True)}
