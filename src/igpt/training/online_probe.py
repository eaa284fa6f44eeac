"""Callback: linear probes of a few layers during pretraining."""

import logging
from functools import partial
from itertools import zip_longest
from typing import Annotated, Any

import lightning as L
import torch
from pydantic import Field
from torch import Tensor

from igpt.distributed import ranks
from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.probe.lbfgs import TOLERANCE, logistic_regression
from igpt.report.bystanders import Bystander
from igpt.settings.fields import Count, Norm, Positive, Share
from igpt.tokens.datamodule import TokenDataModule
from igpt.training.frozen_networks import full_network
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
        self._tokens: dict[str, Tensor] = {}  # split → those of this rank's batches (N, T)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TokenDataModule):
            raise ValueError("callbacks=probe reads the layers of a network, this run trains none: leave it out")
        if data.source.n_class is None:
            raise ValueError(f"callbacks=probe needs labels, data={data.source.name} has none")
        if not trainer.limit_val_batches:
            raise ValueError("callbacks=probe looks at every validation: set task.val_every above 0")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        passes = trainer.global_step * trainer.accumulate_grad_batches
        due = trainer.state.fn == "fit" and passes // int(trainer.val_check_interval or 1) % self.every == 0
        if not due:
            return
        module: Any = pl_module  # a PretrainModule
        data: Any = getattr(trainer, "datamodule", None)
        with self.bystander:
            with torch.no_grad(), full_network(module.net, module.machine.precision) as net:
                shares = ranks.all_gather_results(partial(self.compute_features, net, module, data))
            if not trainer.is_global_zero:
                return
            with torch.no_grad():
                accuracies = self.fit_probes(shares, data, n_layer=module.net.n_layer, device=module.device)
            for name, value in accuracies.items():
                module.record(name, trainer.global_step, value)
            for logger in trainer.loggers:
                logger.log_metrics(accuracies, step=trainer.global_step)

    def list_layers(self, n_layer: int) -> list[int]:
        """The probed layers of a network of `n_layer` blocks, ascending."""
        return sorted({round(depth * n_layer) for depth in self.depths})

    def compute_features(self, net: GPT, module: Any, data: TokenDataModule) -> dict[str, list[Tensor]]:
        """Of each split the features of every n-th batch, for this one of n ranks: (P, B, C) float32 on the CPU."""
        rank, features = ranks.this_rank(), dict[str, list[Tensor]]()
        for split, count in self.counts.items():
            rows = data.sample_rows(split, at_most=count)
            places = torch.arange(len(rows))
            batches = torch.split(places, self.batch_size)[rank.index :: rank.count]
            if split not in self._tokens:
                self._tokens[split] = data.encode_rows(split, rows[torch.cat([*batches, places[:0]])])
            run_key, features[split] = keyed.key(data.seed, f"probe {split}"), []
            for tokens, places in zip(torch.split(self._tokens[split], self.batch_size), batches, strict=False):
                batch = tokens.long().to(module.device)
                rng_keys = keyed.per_example_keys(run_key, places).to(module.device)
                visible = module.objective.visible_mask(batch, rng_keys)
                with module.machine.autocast():
                    every = layer_features(net, batch, visible, norm=self.norm)
                features[split].append(every[self.list_layers(net.n_layer)].float().cpu())
        return features

    def fit_probes(
        self, shares: list[dict[str, list[Tensor]]], data: TokenDataModule, *, n_layer: int, device: torch.device
    ) -> dict[str, float]:
        """Metric name (`probe/layer_4/accuracy`) → share of val images classified correctly, for every depth.

        `shares`: the `compute_features` of every rank.
        """
        layers, x, labels = self.list_layers(n_layer), dict[str, Tensor](), dict[str, Tensor]()
        for split, count in self.counts.items():
            in_turn = zip_longest(*(of_rank[split] for of_rank in shares))
            x[split] = torch.cat([part for turn in in_turn for part in turn if part is not None], dim=1).to(device)
            rows = data.sample_rows(split, at_most=count)
            labels[split] = torch.from_numpy(data.source.split(split).labels[rows]).to(device)
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
