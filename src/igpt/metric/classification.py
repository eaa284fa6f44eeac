"""Accuracy, top 5, confusion matrix and calibration error of predicted classes: torchmetrics, summed over ranks."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import (
    BinaryCalibrationError,
    BinaryConfusionMatrix,
    MulticlassConfusionMatrix,
    MulticlassStatScores,
)

from igpt.metric.result import Number
from igpt.metric.share import share_number

N_BIN = 15  # of confidence, for the calibration error (Guo et al. 2017)
TOP = 5


class ClassMetrics(nn.Module):
    """Accumulates predictions of images, each on one rank only; `compute` sums them over all ranks.

    torchmetrics counts, in integers; shares are divided here, in float64, as its own are float32. `has_votes`:
    predictions are votes over masks, so that the accuracy under the first mask alone is another. `synced`: False where
    every rank has all images.
    """

    def __init__(self, n_class: int, *, has_votes: bool = False, synced: bool = True) -> None:
        super().__init__()
        how: dict[str, Any] = {"validate_args": False, "sync_on_compute": synced}
        self.confusion = MulticlassConfusionMatrix(n_class, **how)
        # images (2, 2) that the prediction is right on, by those that the first mask alone is right on
        self.votes = BinaryConfusionMatrix(**how) if has_votes else None
        self.top_5 = MulticlassStatScores(n_class, top_k=TOP, average="micro", **how) if n_class > TOP else None
        # of the class with the highest score: right or wrong, as its probability says
        self.calibration = BinaryCalibrationError(N_BIN, norm="l1", **how).set_dtype(torch.float64)

    def update(self, scores: Tensor, predictions: Tensor, labels: Tensor) -> None:
        """Adds images: scores under the first mask (B, K), predicted classes (B,), labels (B,)."""
        if not len(labels):  # of a rank whose images are done; torchmetrics takes no empty batch
            return
        self.confusion.update(predictions, labels)
        first = scores.argmax(dim=-1)
        if self.votes is not None:
            self.votes.update((predictions == labels).long(), (first == labels).long())  # columns, rows
        if self.top_5 is not None:
            self.top_5.update(scores, labels)
        confidence = scores.double().softmax(dim=-1).amax(dim=-1).float()  # sums of which are exact in float64
        self.calibration.update(confidence.double(), (first == labels).double())

    def compute(self, *, features: str = "") -> tuple[dict[str, Number], np.ndarray]:
        """`accuracy`, `top_5` (more than five classes), `calibration_error`; confusions.

        Of votes also `accuracy_one_mask` and `gain_by_vote`, their difference, paired over images. The confusions are
        counts (K, K), row: true class, column: predicted. Forgets what was added.
        """
        matrix: np.ndarray = self.confusion.compute().cpu().numpy()
        n, right, numbers = int(matrix.sum()), {"accuracy": int(matrix.trace())}, {}
        if self.votes is not None:
            (_, by_vote), (by_one, by_both) = self.votes.compute().tolist()
            right["accuracy_one_mask"] = by_one + by_both
            numbers["gain_by_vote"] = gain_number(by_vote, by_one, n, features=features)
        if self.top_5 is not None:
            right["top_5"] = int(self.top_5.compute()[0])  # of true positives, false positives …
        numbers |= {name: share_number(count / n, n, features=features) for name, count in right.items()}
        error = float(self.calibration.compute())
        for each in filter(None, (self.confusion, self.votes, self.top_5, self.calibration)):
            each.reset()
        return numbers | {"calibration_error": Number(error, "share", n, features=features)}, matrix


def gain_number(gained: int, lost: int, n: int, *, features: str = "") -> Number:
    """Share of n images that one classifier is right on and another wrong, minus the reverse; with its standard error.

    The images are paired, so that those on which both are right or wrong add nothing to the error.
    """
    difference = gained - lost
    variance = (gained + lost - difference**2 / n) / (n - 1) if n > 1 else None  # of -1, 0 and 1
    stderr = None if variance is None else (variance / n) ** 0.5
    return Number(difference / n, "share", n, stderr, features=features)
