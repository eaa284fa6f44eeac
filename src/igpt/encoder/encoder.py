"""The interface of image encoders that are compared with our networks, and what all of them do to the pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Pixels → the input of a network: resized to `size`, then (x - mean) / std for each of red, green and blue."""

    size: int  # pixels a side
    mean: tuple[float, float, float]  # of values from 0 to 255
    std: tuple[float, float, float]

    def __call__(self, images: Tensor, device: torch.device) -> Tensor:
        """(B, R, R, 3) uint8 → (B, 3, size, size) float32. Images of another size are resized, bicubic, antialiased."""
        x = images.to(device).permute(0, 3, 1, 2).float()
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


class Encoder(Protocol):
    """A frozen network from images to one vector each."""

    name: str  # for tables and file names
    hash: str  # of the weights and of what is done to the pixels
    width: int  # D, numbers per image
    input_size: int  # pixels a side at which the network sees an image
    preprocess: Preprocessing
    pooling: str  # how the network's last layer becomes one vector: mean over the image, cls, or its own pooler

    def encode(self, images: Tensor) -> Tensor:
        """Features of images: (B, R, R, 3) uint8 → (B, D) float32, on the encoder's device."""
        ...


def each_channel(values: Sequence[float] | float) -> tuple[float, float, float]:
    """One value for red, green and blue each. Raises ValueError for another number of values."""
    red, green, blue = values if isinstance(values, Sequence) else (values,) * 3
    return float(red), float(green), float(blue)
