"""Accuracy, top 5, confusion matrix and calibration error of predicted classes: torchmetrics, summed over ranks."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryCalibrationError, MulticlassConfusionMatrix, MulticlassStatScores

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
        self.one_mask = MulticlassStatScores(n_class, average="micro", **how) if has_votes else None
        self.top_5 = MulticlassStatScores(n_class, top_k=TOP, average="micro", **how) if n_class > TOP else None
        # of the class with the highest score: right or wrong, as its probability says
        self.calibration = BinaryCalibrationError(N_BIN, norm="l1", **how).set_dtype(torch.float64)

    def update(self, scores: Tensor, predictions: Tensor, labels: Tensor) -> None:
        """Adds images: scores under the first mask (B, K), predicted classes (B,), labels (B,)."""
        if not len(labels):  # of a rank whose images are done; torchmetrics takes no empty batch
            return
        self.confusion.update(predictions, labels)
        first = scores.argmax(dim=-1)
        if self.one_mask is not None:
            self.one_mask.update(first, labels)
        if self.top_5 is not None:
            self.top_5.update(scores, labels)
        confidence = scores.double().softmax(dim=-1).amax(dim=-1).float()  # sums of which are exact in float64
        self.calibration.update(confidence.double(), (first == labels).double())

    def compute(self, *, features: str = "") -> tuple[dict[str, Number], np.ndarray]:
        """`accuracy`, `accuracy_one_mask` (votes), `top_5` (more than five classes), `calibration_error`; confusions.

        The latter are counts (K, K), row: true class, column: predicted. Forgets what was added.
        """
        matrix: np.ndarray = self.confusion.compute().cpu().numpy()
        n, right = int(matrix.sum()), {"accuracy": int(matrix.trace())}
        for name, metric in (("accuracy_one_mask", self.one_mask), ("top_5", self.top_5)):
            if metric is not None:
                right[name] = int(metric.compute()[0])  # of true positives, false positives …
        numbers = {name: share_number(count / n, n, features=features) for name, count in right.items()}
        error = float(self.calibration.compute())
        for each in filter(None, (self.confusion, self.one_mask, self.top_5, self.calibration)):
            each.reset()
        return numbers | {"calibration_error": Number(error, "share", n, features=features)}, matrix
