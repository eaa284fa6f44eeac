"""An encoder by its name."""

import torch

from igpt.encoder.encoder import Encoder
from igpt.encoder.lite0 import load_lite0


def find_encoder(spec: str, *, device: torch.device, resolution: int, input_size: int | None = None) -> Encoder:
    """The encoder `spec`, for images of `resolution` pixels a side.

    `spec`: `lite0`, EfficientNet-Lite0 with its ImageNet weights. `input_size`: pixels a side to which images are
    resized; None: the encoder's own.

    Raises:
        ValueError: no such encoder, or its weights or library are not here.
    """
    if spec == "lite0":
        return load_lite0(device=device, resolution=resolution, input_size=input_size)
    raise ValueError(f"task.encoder={spec}: there is lite0")
