"""Next-pixel prediction: the mean cross-entropy of every token given those before it."""

import torch.nn.functional as F
from torch import Tensor

from igpt.objective.base import token_nats


class AR:
    """-log p(x) = -Σ_i log p(x_i | x_<i), in nats per token. Source: Chen et al. 2020, §2.1; `model.py:model`.

    Labels are the unshifted tokens, the first one too: the network itself shifts its input by `sos`.
    """

    name = "ar"
    causal = True

    def visible_mask(self, tokens: Tensor, rng_keys: Tensor) -> None:
        return None

    def per_example_loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        return self.average_tokens(token_nats(logits, tokens), visible)

    def average_tokens(self, nats: Tensor, visible: Tensor | None) -> Tensor:
        return nats.mean(dim=1)

    def loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
