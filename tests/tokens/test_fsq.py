"""Finite scalar quantisation against another library and by hand."""

import math
from typing import Any

import pytest
import torch
import vector_quantize_pytorch

from igpt.tokens.fsq import FSQ, choose_levels
from igpt.tokens.vqvae import VQVAE, VQVAEConfig
from tests.tokens.test_vqvae import CONFIG


@pytest.mark.parametrize("codes", [64, 128, 1000, 4096])
def test_codes_and_gradients_are_those_of_another_library(codes: int) -> None:
    """Independent source: vector-quantize-pytorch's FSQ, its codes, its tokens and its gradients."""
    own = FSQ(codes)
    reference = vector_quantize_pytorch.FSQ(levels=list(choose_levels(codes)))
    vectors = 3 * torch.randn(2, 200, own.width, generator=torch.Generator().manual_seed(0))
    slopes = []
    for quantize in (lambda z: own(z, torch.arange(2))[:2], reference):
        z = vectors.clone().requires_grad_()
        quantized, tokens = quantize(z)
        quantized.square().sum().backward()
        slopes.append((quantized.detach().view(-1, own.width), tokens.flatten(), z.grad))
    assert torch.allclose(slopes[0][0], slopes[1][0], atol=1e-6)
    assert torch.equal(slopes[0][1], slopes[1][1].long())
    assert torch.allclose(slopes[0][2], slopes[1][2], atol=1e-5)
    assert torch.equal(own.lookup(slopes[0][1]), own.lookup(own.nearest_in_float64(vectors.double().flatten(0, 1))))
    everything = torch.arange(codes)
    assert torch.allclose(own.lookup(everything), reference.indices_to_codes(everything), atol=1e-7)


def test_levels() -> None:
    """By hand: the paper's table, powers of two; else the nearest numbers are named."""
    assert choose_levels(4096) == (8, 8, 8, 8)
    assert choose_levels(4375) == (7, 5, 5, 5, 5)
    for bits in range(2, 17):
        assert math.prod(choose_levels(1 << bits)) == 1 << bits
        assert set(choose_levels(1 << bits)) <= {4, 8}
    for codes, nearest in ((5000, "4,375 or 8,192"), (2, "4"), (65535, "64,000 or 65,536")):
        with pytest.raises(ValueError, match=rf"no levels for tokens.codes={codes:,}: take {nearest}$"):
            choose_levels(codes)


def test_a_certain_token_stays() -> None:
    """Invariant: no move within the distance changes a certain token; 0 lies in the middle of a level."""
    fsq, distance = FSQ(64), 0.01
    vectors = 2 * torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    nearest = fsq.nearest(vectors, torch.full((3000,), distance))
    assert 0.5 < float(nearest.is_certain.double().mean()) < 1
    for angle in torch.linspace(0, 2 * math.pi, 16):
        moved = vectors.double() + distance * torch.stack([angle.cos(), angle.sin()])
        assert torch.equal(fsq.nearest_in_float64(moved)[nearest.is_certain], nearest.tokens[nearest.is_certain])
    assert fsq.lookup(fsq.nearest_in_float64(torch.zeros(1, 2).double())).tolist() == [[0.0, 0.0]]
    assert not fsq.nearest(torch.full((1, 2), math.nan), torch.zeros(1)).is_certain


def test_the_network_has_its_width() -> None:
    """By hand: 4,096 codes are 4 levels of 8, whatever `code_width` says; nothing but weights is trained or saved."""
    config: dict[str, Any] = {**CONFIG, "codes": 4096, "code_width": 7, "quantizer": "fsq"}
    network = VQVAE(VQVAEConfig(**config))
    images, quantized = network(torch.zeros(2, 3, 8, 8), torch.arange(2))
    assert images.shape == (2, 3, 8, 8)
    assert quantized.vectors.shape == (32, 4)
    assert float(quantized.commitment) == 0
    network.quantizer.update(seed=0, step=1, decay=0.99, unquantised_steps=60, restart_below=0.01)
    assert not [name for name in network.state_dict() if name.startswith("quantizer")]
    with pytest.raises(ValueError, match=r"no levels for tokens.codes=5,000"):
        VQVAEConfig(**{**config, "codes": 5000})
