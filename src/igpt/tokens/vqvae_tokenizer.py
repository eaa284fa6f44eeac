"""A trained VQ-VAE as tokenizer: a token is the code of f × f pixels and their surroundings."""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from igpt.data.source import Source
from igpt.settings.fields import parse_settings
from igpt.tokens.pixel_order import PixelOrder, check_rows
from igpt.tokens.quantizer import nearest_codes
from igpt.tokens.tokenizer import TokenGrid
from igpt.tokens.vqvae import VQVAE, VQVAEConfig, round_pixels, scale_pixels

_CHUNK = 16  # images at a time


class VQVAETokenizer:
    """One token for f × f pixels, by a trained network.

    Raises:
        ValueError: weights that are not finite.
    """

    kind = "vqvae"

    def __init__(self, network: VQVAE, side: int, order: PixelOrder) -> None:
        self.network = network.float().eval().requires_grad_(False)
        self.config, self.side, self.order = network.config, side, order
        for name, tensor in self._tensors().items():
            if not tensor.isfinite().all():
                raise ValueError(f"the VQ-VAE's {name} holds numbers that are not finite")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VQVAETokenizer) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    def n_vocab(self) -> int:
        return self.config.codes

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(self.order.side, self.order.side)

    @cached_property
    def hash(self) -> str:
        about = json.dumps(["vqvae", self.config.model_dump(), self.side, self.order.permutation], sort_keys=True)
        digest = hashlib.sha256(about.encode())
        for name, tensor in self._tensors().items():
            digest.update(name.encode())
            digest.update(tensor.numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:12]

    def _tensors(self) -> dict[str, Tensor]:
        """The weights that are saved, on the CPU."""
        return saved_tensors(self.network)

    def encode(self, pixels: Tensor) -> Tensor:
        self.network.to(pixels.device)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            tokens = [self._encode(some) for some in torch.split(pixels, _CHUNK)]
        return torch.cat(tokens) if tokens else pixels.new_zeros((0, self.grid.n_ctx), dtype=torch.int64)

    def _encode(self, pixels: Tensor) -> Tensor:
        latents = self.network.encoder(scale_pixels(pixels)).permute(0, 2, 3, 1)  # (B, n, n, D)
        tokens = nearest_codes(latents.flatten(0, 2), self.network.quantizer.codebook)
        return self.order.flatten(tokens.view(latents.shape[:3]))

    def encoder(self, cache: Path | None) -> Callable[[Tensor], Tensor]:
        return self.encode

    def encode_top(self, pixels: Tensor, rows: int) -> Tensor:
        """Tokens of which those in `known_tokens(rows)` depend on the top `rows` rows alone: (B, R, R, 3) → (B, T)."""
        tokens = self.encode(pixels)
        tokens[:, ~self.known_tokens(rows).to(tokens.device)] = 0
        return tokens

    def decode(self, tokens: Tensor) -> np.ndarray:
        grid = self.order.unflatten(tokens)  # (B, n, n)
        if grid.numel() and (grid.min() < 0 or grid.max() >= self.n_vocab):
            raise ValueError(f"tokens lie in 0 … {self.n_vocab - 1}, got {int(grid.min())} to {int(grid.max())}")
        self.network.to(tokens.device)
        images = np.empty((len(grid), self.side, self.side, 3), dtype=np.uint8)
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            for start in range(0, len(grid), _CHUNK):
                codes = self.network.quantizer.lookup(grid[start : start + _CHUNK]).permute(0, 3, 1, 2)
                images[start : start + _CHUNK] = round_pixels(self.network.decoder(codes)).cpu().numpy()
        return images

    def known_tokens(self, rows: int) -> Tensor:
        check_rows(rows, self.side)
        return self.order.known_positions(rows // self.config.factor)

    def visible_pixels(self, tokens: Tensor) -> Tensor:
        grid = self.order.unflatten(tokens[None])[0]  # (n, n)
        return grid.repeat_interleave(self.config.factor, 0).repeat_interleave(self.config.factor, 1)

    def describe(self) -> str:
        return f"VQ-VAE of {self.n_vocab:,} codes, {self.config.factor}×{self.config.factor} pixels each"

    def to_dict(self) -> dict[str, Any]:
        return {
            "side": self.side,
            "config": self.config.model_dump(),
            "permutation": list(self.order.permutation),
            "weights": base64.b64encode(safetensors.torch.save(self._tensors())).decode(),
            "hash": self.hash,
        }

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "VQVAETokenizer":
        """The inverse of `to_dict`. Raises ValueError on invalid sizes or weights, or a wrong hash."""
        config = parse_settings(VQVAEConfig, saved["config"], "the VQ-VAE's config")
        side, permutation = saved["side"], saved["permutation"]
        if not isinstance(permutation, list) or not all(type(i) is int for i in [side, *permutation]):
            raise ValueError("the side and the permutation are whole numbers")
        order = PixelOrder(round(len(permutation) ** 0.5), tuple(permutation))
        if side != order.side * config.factor:
            raise ValueError(f"{len(permutation)} tokens of {config.factor} pixels a side do not make {side} pixels")
        with torch.device("meta"):
            network = VQVAE(config)
        expected = {name: tensor.shape for name, tensor in saved_tensors(network).items()}
        size = 4 * sum(shape.numel() for shape in expected.values())
        if not isinstance(saved["weights"], str) or len(saved["weights"]) * 3 // 4 < size:
            raise ValueError(f"the VQ-VAE's weights are fewer than its config's {size:,} bytes")
        try:
            tensors = safetensors.torch.load(base64.b64decode(saved["weights"], validate=True))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"the VQ-VAE's weights are damaged ({error!s:.100})") from error
        got = {name: tensor.shape for name, tensor in tensors.items()}
        if got != expected:
            raise ValueError("the VQ-VAE's weights are not of the sizes in its config")
        network.to_empty(device="cpu")
        network.load_state_dict(tensors, strict=False)
        tokenizer = VQVAETokenizer(network, side, order)
        if tokenizer.hash != saved["hash"]:
            raise ValueError(f"the VQ-VAE's hash is {tokenizer.hash}, not the {saved['hash']!r:.60} that is stated")
        return tokenizer


def saved_tensors(network: VQVAE) -> dict[str, Tensor]:
    """The tensors of a VQ-VAE that make tokens and images, without those of its training, on the CPU."""
    state = network.state_dict()
    parts = ("encoder.", "decoder.", "quantizer.codebook")
    return {
        name: tensor.detach().float().contiguous() if tensor.is_meta else tensor.detach().cpu().float().contiguous()
        for name, tensor in state.items()
        if name.startswith(parts)
    }


class VQVAESettings(VQVAEConfig):
    """The settings of `tokens=vqvae`."""

    path: str | None  # run folder of task=tokenizer
    order: str

    def sizes(self, resolution: int) -> tuple[int, int]:
        if resolution % self.factor:
            raise ValueError(
                f"tokens.factor={self.factor} does not divide data.resolution={resolution}: take a multiple of it"
            )
        return (resolution // self.factor) ** 2, self.codes

    def build(self, source: Source, cache: Path) -> VQVAETokenizer:
        """The trained tokenizer in `path`. Raises ValueError without one, or for images of another resolution."""
        self.sizes(source.resolution)
        if self.path is None:
            raise ValueError("tokens=vqvae needs a trained tokenizer: tokens.path=RUN_FOLDER of task=tokenizer")
        from igpt.tokens.tokenizer_registry import find_tokenizer  # it imports this module

        tokenizer = find_tokenizer(self.path)
        if not isinstance(tokenizer, VQVAETokenizer):
            raise ValueError(f"tokens.path={self.path} holds {tokenizer.describe()}, not a VQ-VAE")
        if tokenizer.side != source.resolution:
            raise ValueError(
                f"a VQ-VAE of {tokenizer.side}×{tokenizer.side} pixels, data gives {source.resolution}×"
                f"{source.resolution}: take data of its resolution, or train another one with task=tokenizer"
            )
        return tokenizer
