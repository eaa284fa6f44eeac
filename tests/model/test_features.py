"""Pooled features of every layer."""

import numpy as np
import pytest
import torch
from torch import Tensor

from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from tests.oracle import gpt as plain


@pytest.mark.parametrize("norm", ["ln_1", "raw"])
def test_equal_the_plain_rewrite(net: GPT, tokens: Tensor, norm: str) -> None:
    """Independent source: numpy's streams, normed by the next block's ln_1, the last by ln_f (paper §3.2), or not."""
    net = net.double()
    weights = {name: w.numpy() for name, w in net.state_dict().items()}
    with torch.no_grad():
        own = layer_features(net, tokens, norm=norm)
    assert own.shape == (4, 4, 24)
    gains = [*(weights[f"h.{i}.ln_1.g"] for i in range(3)), weights["ln_f.g"]]
    for image in range(4):
        streams = plain.residuals(weights, tokens[image].numpy(), None, 3, True)
        for layer, (h, g) in enumerate(zip(streams, gains, strict=True)):
            expected = (plain.norm(h, g) if norm == "ln_1" else h).mean(0)
            assert np.abs(own[layer, image].numpy() - expected).max() < 1e-12


def test_an_unknown_norm(net: GPT, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="ln_1, raw"):
        layer_features(net, tokens, norm="ln_2")
