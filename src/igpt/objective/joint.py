"""The joint objective of fine-tuning: generative and classification loss of the same images."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from igpt.objective.base import Objective, TokenHead, generative_loss
from igpt.settings.training import LossWeights


def classification_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """L_CLF = -log p(label | image), the mean over images, in nats: scores (B, K), labels (B,) → a scalar."""
    return F.cross_entropy(scores.float(), labels)


@dataclass(frozen=True)
class JointObjective:
    """gen · L_GEN + clf · L_CLF: both losses read the same hidden states. Source: Chen et al. 2020, §2.3."""

    generative: Objective  # L_GEN, the objective of pretraining
    weights: LossWeights  # λ

    @property
    def has_generative_loss(self) -> bool:
        """Whether L_GEN has a weight above 0; otherwise the token head is neither computed nor trained."""
        return self.weights.gen > 0

    def losses(
        self, net: TokenHead, hidden: Tensor, scores: Tensor, tokens: Tensor, labels: Tensor, visible: Tensor | None
    ) -> dict[str, Tensor]:
        """`loss_clf`, and `loss_gen` if it counts; last hidden states (B, T, C), scores (B, K), labels (B,)."""
        losses = {"loss_clf": classification_loss(scores, labels)}
        if self.has_generative_loss:
            losses["loss_gen"] = generative_loss(self.generative, net, hidden, tokens, visible)
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The training loss, a scalar: the weighted sum of `losses`."""
        loss = self.weights.clf * losses["loss_clf"]
        return loss + self.weights.gen * losses["loss_gen"] if self.has_generative_loss else loss
