"""An encoder by its name or path."""

import torch

from igpt.encoder.backbones import load_backbone
from igpt.encoder.encoder import Encoder
from igpt.encoder.given_features import is_features
from igpt.encoder.lite0 import load_lite0
from igpt.settings.fields import Pooling


def find_encoder(
    spec: str, *, device: torch.device, resolution: int, input_size: int | None = None, pooling: Pooling = "auto"
) -> Encoder:
    """The encoder `spec`, for images of `resolution` pixels a side.

    `spec`: `lite0`, EfficientNet-Lite0 with its ImageNet weights; or a vision network of `transformers`, a folder or a
    name on the Hub. `input_size`: pixels a side to which images are resized; None: the encoder's own. `pooling`: as of
    `load_backbone`.

    Raises:
        ValueError: no such encoder, or its weights or library are not here.
    """
    if spec == "lite0":
        if pooling != "auto":
            raise ValueError(f"task.pooling={pooling}: lite0 has one, the mean over the image: task.pooling=auto")
        return load_lite0(device=device, resolution=resolution, input_size=input_size)
    if is_features(spec):
        raise ValueError(
            f"task.encoder={spec} holds features, and other images have none: expected a network; "
            "task=probe_encoder takes features"
        )
    return load_backbone(spec, device=device, input_size=input_size, pooling=pooling)
