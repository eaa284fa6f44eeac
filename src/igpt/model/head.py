"""Linear classification on pooled hidden states: a fine-tuned network's head, and a probe's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.model.features import layer_features
from igpt.model.gpt import GPT


class ClassHead(nn.Module):
    """Class scores from the mean over positions: hidden (B, T, C) → (B, K). No bias, zero at the start.

    So the first class loss is exactly ln K. Source: Chen et al. 2020, §2.3; `model.py`, scope `clf`.
    """

    def __init__(self, *, n_embd: int, n_class: int) -> None:
        super().__init__()
        self.wclf = nn.Parameter(torch.zeros(n_class, n_embd))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.mean(dim=1), self.wclf)

    def scores(self, net: GPT, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """Class scores of the network's last hidden states: tokens (B, T) → (B, K) float32."""
        scores: Tensor = self(net.trunk(tokens, visible)).float()
        return scores


@dataclass(frozen=True)
class ProbeHead:
    """A fitted probe: class scores of the pooled features of some layers, concatenated.

    No module: its weights stay float32 whatever the precision of the network.
    """

    weight: Tensor  # (K, D), D = C · the number of layers
    bias: Tensor  # (K,)
    layers: tuple[int, ...]
    norm: str  # as in `layer_features`
    dtype: torch.dtype  # of the features it was fitted on, to which they are rounded

    def scores(self, net: GPT, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """Class scores of the network's features: tokens (B, T) → (B, K) float32."""
        features = layer_features(net, tokens, visible, norm=self.norm, layers=self.layers)  # (P, B, C)
        with torch.autocast(features.device.type, enabled=False):
            concatenated = torch.cat(list(features.to(self.dtype).float()), dim=-1)  # (B, D)
            return F.linear(concatenated, self.weight.to(concatenated), self.bias.to(concatenated))
