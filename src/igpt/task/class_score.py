"""Classification score of a network with a class head on a split: loss and accuracy, by vote over masks."""

from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.data.source import Source
from igpt.metric.classification import ClassMetrics
from igpt.metric.likelihood import BitUnit, likelihood_numbers
from igpt.metric.result import Number
from igpt.model.gpt import GPT
from igpt.model.head import ClassHead
from igpt.objective.base import Objective, hidden_nats
from igpt.probe.scores import vote
from igpt.task.generative_score import table_of_images
from igpt.tokens.batches import Batch
from igpt.utils import files, keyed


def check_classes(source: Source, splits: Sequence[str]) -> int:
    """The number of classes. Raises ValueError without labels, or if a class has no training images."""
    if source.n_class is None:
        raise ValueError(
            f"data={source.name} has no labels (data.n_class=null): give each class a folder of its own, or set "
            "data.label_column and data.n_class"
        )
    if source.n_class < 2:
        raise ValueError(f"data={source.name} has one class: there is nothing to tell it from")
    present = set(np.unique(source.split("train").labels).tolist())
    if -1 in present:
        raise ValueError(f"data={source.name}: some images have no label, a probe needs them all")
    for split in splits:
        if not len(source.split(split)):
            way_out = "task.test=false, or " if split == "test" else ""
            raise ValueError(
                f"data={source.name} has no images in its {split} split: set {way_out}data.{split}_fraction above 0"
            )
        if unknown := set(np.unique(source.split(split).labels).tolist()) - present:
            raise ValueError(
                f"data={source.name}: class {min(unknown)} is in {split}, but no image of it is in train: "
                "take other splits, or more images"
            )
    return source.n_class


def classes_hash(source: Source) -> str:
    """A hash of dataset name, number of classes and training labels, to check that a class head fits the data."""
    labels = np.unique(source.split("train").labels).tolist()
    return files.hash_json([source.name, source.n_class, labels])[:16]


class ClassScore(nn.Module):
    """Accumulates predictions, then computes losses and `ClassMetrics` over all ranks, each image counted once."""

    def __init__(
        self, objective: Objective, *, n_class: int, eval_masks: int, seed: int, units: Sequence[BitUnit] = ()
    ) -> None:
        super().__init__()
        self.objective, self.n_class, self.seed, self.units = objective, n_class, seed, units
        self.eval_masks = 1 if objective.causal else eval_masks
        self.metrics = ClassMetrics(n_class, has_votes=self.eval_masks > 1)
        self.confusion = np.empty((0, 0))  # (K, K) counts of the last split
        self._seen: list[tuple[Tensor, Tensor]] = []

    def add(self, net: GPT, head: ClassHead, batch: Batch) -> None:
        """Scores a batch: one forward pass per mask; losses are those of the first mask."""
        predictions = []
        for mask in range(self.eval_masks):
            rng_keys = keyed.fold_in(batch.rng_keys, 100 + mask) if mask else batch.rng_keys
            visible = self.objective.visible_mask(batch.tokens, rng_keys)
            hidden = net.trunk(batch.tokens, visible)
            scores = head(hidden).float()  # (B, K)
            predictions.append(scores.argmax(dim=-1))
            if mask == 0:
                first = scores
                nats = self.objective.average_tokens(hidden_nats(net, hidden, batch.tokens), visible).double()
                loss = F.cross_entropy(scores, batch.labels, reduction="none").double()
        rng_keys = keyed.per_example_keys(keyed.key(self.seed, "vote"), batch.rows.cpu())
        by_vote = vote(torch.stack(predictions), n_class=self.n_class, rng_keys=rng_keys)
        self.metrics.update(first, by_vote, batch.labels)
        self._seen.append((batch.rows, torch.stack([nats, loss, by_vote.double()])))

    def numbers(self, split: str, trainer: L.Trainer, n_image: int) -> tuple[dict[str, Number], np.ndarray]:
        """The numbers of the split, and the predicted class of each image, (N,). Clears what was added."""
        nats, loss, predictions = table_of_images(self._seen, trainer, 3, n_image)
        self._seen = []
        numbers = likelihood_numbers(split, nats, self.units)
        stderr = float(loss.std()) / n_image**0.5 if n_image > 1 else None
        numbers[f"{split}/loss_clf"] = Number(float(loss.mean()), "nats/image", n_image, stderr)
        of_classes, self.confusion = self.metrics.compute()
        numbers |= {f"{split}/{name}": number for name, number in of_classes.items()}
        return numbers, predictions.numpy().astype(np.int64)
