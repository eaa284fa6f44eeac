"""The VQ-VAE network: pixels → a grid of vectors → codes → pixels.

Convolutions of van den Oord et al. 2017, §4.1, as in its released code (residual layers of a quarter of the width). The
network of the Image GPT paper's first version is not published: this has its interface, a grid of R/f × R/f tokens of
K codes. There is no layer that looks at the whole image, so a network trained on crops encodes larger images.
"""

import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from igpt.settings.fields import Decay, NonNegative, Settings, Share, WholeNumber
from igpt.tokens.fsq import FSQ, choose_levels
from igpt.tokens.quantizer import EMAQuantizer, Quantized, Quantizer
from igpt.utils import keyed

MOST_CODES = 1 << 16
MOST_NUMBERS = 40_000_000  # 213 MB as text, within what one JSON file may hold
Width = Annotated[int, Field(ge=1, le=4096)]


class VQVAEConfig(Settings):
    """The sizes of a VQ-VAE and how it is trained, saved with its weights."""

    factor: Literal[2, 4]  # f: pixels a side of a token
    codes: Annotated[int, Field(ge=2, le=MOST_CODES)]  # K
    code_width: Width  # D
    hidden: Width  # channels of the convolutions
    residual_blocks: Annotated[int, Field(ge=0, le=64)]
    quantizer: Literal["ema", "fsq"]
    loss: Literal["l2", "l1"]  # of the reconstruction
    commitment: NonNegative  # β, weight of the commitment loss
    decay: Decay  # of the codes' moving averages
    unquantised_steps: WholeNumber  # optimiser steps before k-means starts the codes
    restart_below: Share  # of the mean count: codes below it are restarted

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        n = count_saved_numbers(self)
        if n > MOST_NUMBERS:
            raise ValueError(
                f"a VQ-VAE of {n:,} numbers is too large to be saved (at most {MOST_NUMBERS:,}): lower "
                "tokens.hidden, tokens.residual_blocks or tokens.codes"
            )
        return self

    @property
    def width(self) -> int:
        """D, numbers of a code: `code_width`, or what FSQ has for so many codes."""
        return len(choose_levels(self.codes)) if self.quantizer == "fsq" else self.code_width

    @property
    def encoder_reach(self) -> int:
        """Tokens on each side of a token that its vector depends on; of the last, all but one row of pixels."""
        return 2 + self.residual_blocks

    @property
    def decoder_reach(self) -> int:
        """Pixels on each side of a token's f × f that also change with it."""
        reach = 1 + self.residual_blocks  # tokens, by the convolutions of width 3
        for _ in range(int(math.log2(self.factor))):
            reach = 2 * reach + 1  # by a transposed convolution of width 4
        return reach


class ResidualBlock(nn.Module):
    """x + conv1(relu(conv3(relu(x)))): (B, H, h, w) → the same."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = max(1, hidden // 4)
        self.conv_3 = nn.Conv2d(hidden, inner, 3, padding=1)
        self.conv_1 = nn.Conv2d(inner, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_1(F.relu(self.conv_3(F.relu(x))))
        return out


def build_encoder(config: VQVAEConfig) -> nn.Sequential:
    """(B, 3, R, R) in [-1, 1] → (B, D, R/f, R/f)."""
    hidden, halvings = config.hidden, int(math.log2(config.factor))
    layers: list[nn.Module] = []
    for i in range(halvings):
        layers += [nn.Conv2d(3 if i == 0 else hidden, hidden, 4, stride=2, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(hidden, hidden, 3, padding=1)]
    layers += [ResidualBlock(hidden) for _ in range(config.residual_blocks)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(hidden, config.width, 1))


def build_decoder(config: VQVAEConfig) -> nn.Sequential:
    """(B, D, R/f, R/f) → (B, 3, R, R), about [-1, 1]."""
    hidden, doublings = config.hidden, int(math.log2(config.factor))
    layers: list[nn.Module] = [nn.Conv2d(config.width, hidden, 3, padding=1)]
    layers += [ResidualBlock(hidden) for _ in range(config.residual_blocks)]
    for i in range(doublings):
        last = i == doublings - 1
        layers += [nn.ReLU(), nn.ConvTranspose2d(hidden, 3 if last else hidden, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


class VQVAE(nn.Module):
    """Encoder, quantiser and decoder. `forward` is of training: it reconstructs through the quantiser."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_encoder(config), build_decoder(config)
        self.quantizer: Quantizer = (
            FSQ(config.codes) if config.quantizer == "fsq" else EMAQuantizer(config.codes, config.code_width)
        )

    def forward(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstructions of images and what the quantiser did: (B, 3, R, R), (B,) → (B, 3, R, R), `Quantized`."""
        latents = self.encoder(images).float()  # (B, D, R/f, R/f)
        b, d, rows, columns = latents.shape
        with torch.autocast(latents.device.type, enabled=False):  # the nearest code of float32, not of bfloat16
            quantized = self.quantizer(latents.permute(0, 2, 3, 1).flatten(1, 2), keys)
        codes = quantized.vectors.view(b, rows, columns, d).permute(0, 3, 1, 2)
        return self.decoder(codes), quantized


def count_saved_numbers(config: VQVAEConfig) -> int:
    """The number of weights and of the codebook's numbers."""
    with torch.device("meta"):
        parts = build_encoder(config), build_decoder(config)
    codebook = config.codes * config.width if config.quantizer == "ema" else 0
    return codebook + sum(weight.numel() for part in parts for weight in part.parameters())


@torch.no_grad()
def init_weights(network: nn.Module, seed: int) -> None:
    """Draws PyTorch's default for convolutions, uniform within 1/√(inputs), keyed by each weight's name."""
    for name, weight in network.named_parameters():
        module = network.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        bound = 1 / math.sqrt(module.weight[0].numel())
        draw = torch.Generator().manual_seed(keyed.key(seed, "init", 0) ^ keyed.key(0, name))
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=draw))


def scale_pixels(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels to [-1, 1], channels first: (B, R, R, 3) uint8 → (B, 3, R, R)."""
    return pixels.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1


def round_pixels(images: Tensor) -> Tensor:
    """The inverse of `scale_pixels`, clamped: (B, 3, R, R) → (B, R, R, 3) uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
