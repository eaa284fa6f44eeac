"""Linear classification on pooled hidden states."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassHead(nn.Module):
    """Class scores from the mean over positions: hidden (B, T, C) → (B, K). No bias, zero at the start.

    So the first class loss is exactly ln K. Source: Chen et al. 2020, §2.3; `model.py`, scope `clf`.
    """

    def __init__(self, *, n_embd: int, n_class: int) -> None:
        super().__init__()
        self.wclf = nn.Parameter(torch.zeros(n_class, n_embd))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.mean(dim=1), self.wclf)
