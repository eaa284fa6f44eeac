"""A trained VQ-VAE as tokenizer: a token is the code of f × f pixels and their surroundings."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from igpt.data.source import Source
from igpt.distributed.process_state import cudnn_tf32, float32_matmul_precision
from igpt.settings.fields import parse_settings
from igpt.tokens.exact_encoding import encode_exactly
from igpt.tokens.pixel_order import PixelOrder, check_rows
from igpt.tokens.tokenizer import GridTokenizer, TokenGrid, TokenizerSettings
from igpt.tokens.vqvae import VQVAE, VQVAEConfig, round_pixels

UNTRAINED = (
    "tokens=vqvae needs a trained tokenizer: tokens.path=RUN_FOLDER of task=tokenizer, or of a network trained on one"
)
_CHUNK = 8  # images at a time
_GPU_CHUNK = 64
_PRECISION = threading.RLock()


class VQVAETokenizer(GridTokenizer):
    """One token for f × f pixels, by a copy of a trained network. Equal networks have equal tokens everywhere.

    Raises:
        ValueError: weights that are not finite, or another number of tokens than the side and the factor make.
    """

    kind = "vqvae"

    def __init__(self, network: VQVAE, side: int, order: PixelOrder) -> None:
        self.config, self.order = network.config, order
        if side != self.side:
            raise ValueError(
                f"{len(order.permutation):,} tokens of {self.config.factor}×{self.config.factor} pixels are not an "
                f"image of {side}×{side}"
            )
        self._tensors = saved_tensors(network)
        for name, tensor in self._tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"the VQ-VAE's {name} holds numbers that are not finite")
        self._networks: dict[tuple[torch.device, torch.dtype], VQVAE] = {}

    @property
    def n_vocab(self) -> int:
        return self.config.codes

    @property
    def cell(self) -> int:
        return self.config.factor

    @property
    def reach(self) -> int:
        return self.config.decoder_reach

    @cached_property
    def hash(self) -> str:
        about = ["vqvae", self.config.model_dump(), self.side, self.order.permutation]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:12]

    def load_network(self, device: torch.device, dtype: torch.dtype = torch.float32) -> VQVAE:
        """The frozen network on a device, made at its first use."""
        if (device, dtype) not in self._networks:
            network = VQVAE(self.config)
            network.load_state_dict(self._tensors, strict=False)
            network = network.eval().requires_grad_(False).to(device, dtype)
            nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)  # three times as fast on a CPU
            self._networks[device, dtype] = network
        return self._networks[device, dtype]

    def encode(self, pixels: Tensor) -> Tensor:
        """Exact: the nearest code of the encoder in float64, the lowest on a tie. See `exact_encoding`."""
        return self.order.flatten(self._encode_grid(pixels))

    def _encode_grid(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, H/f, W/f) int64."""
        device, f = pixels.device, self.config.factor
        networks = self.load_network(device), self.load_network(device, torch.float64)
        grid = pixels.new_empty((len(pixels), pixels.shape[1] // f, pixels.shape[2] // f), dtype=torch.int64)
        with unrounded_float32(device):
            for some, tokens in zip(*(torch.split(each, chunk_size(device)) for each in (pixels, grid)), strict=True):
                if some.numel():
                    tokens.copy_(encode_exactly(*networks, some).tokens)
        return grid

    def encode_top(self, pixels: Tensor, rows: int) -> Tensor:
        """Tokens of which those in `known_tokens(rows)` depend on the top `rows` rows alone: (B, R, R, 3) → (B, T).

        The image is cut below them, as if it ended there; `encode` sees further rows, and may give others for the last
        ones. The other tokens repeat the last row, so that decoded it looks as if the image went on.
        """
        check_rows(rows, self.side)
        n = rows // self.config.factor
        grid = pixels.new_zeros((len(pixels), self.order.side, self.order.side), dtype=torch.int64)
        grid[:, :n] = self._encode_grid(pixels[:, : n * self.config.factor])
        if n:
            grid[:, n:] = grid[:, n - 1 : n]
        return self.order.flatten(grid)

    def decode(self, tokens: Tensor) -> np.ndarray:
        grid = self.order.unflatten(tokens)  # (B, n, n)
        if grid.numel() and (grid.min() < 0 or grid.max() >= self.n_vocab):
            raise ValueError(f"tokens lie in 0 … {self.n_vocab - 1}, got {int(grid.min())} to {int(grid.max())}")
        network = self.load_network(tokens.device)
        images = np.empty((len(grid), self.side, self.side, 3), dtype=np.uint8)
        step = 1 if tokens.device.type == "cpu" else _GPU_CHUNK  # one by one, a CPU rounds each in the same way
        with unrounded_float32(tokens.device):
            for start in range(0, len(grid), step):
                codes = network.quantizer.lookup(grid[start : start + step]).permute(0, 3, 1, 2)  # (b, D, n, n)
                images[start : start + step] = round_pixels(network.decoder(codes)).cpu().numpy()
        return images

    def describe(self) -> str:
        return f"VQ-VAE of {self.n_vocab:,} codes, {self.config.factor}×{self.config.factor} pixels each"

    def to_dict(self) -> dict[str, Any]:
        return {
            "side": self.side,
            "config": self.config.model_dump(),
            "permutation": list(self.order.permutation),
            "weights": base64.b64encode(safetensors.torch.save(self._tensors)).decode(),
            "hash": self.hash,
        }

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "VQVAETokenizer":
        """The inverse of `to_dict`. Raises ValueError on invalid sizes or weights, or a wrong hash."""
        config = parse_settings(VQVAEConfig, saved["config"], "the VQ-VAE's config")
        order = PixelOrder.from_list(saved["permutation"])
        if type(saved["side"]) is not int:
            raise ValueError("the side is no whole number")
        with torch.device("meta"):
            expected = saved_tensors(VQVAE(config))
        size = 4 * sum(tensor.numel() for tensor in expected.values())
        if not isinstance(saved["weights"], str) or len(saved["weights"]) * 3 // 4 < size:
            raise ValueError(f"the VQ-VAE's weights are less than the {size:,} bytes of its config")
        try:
            tensors = safetensors.torch.load(base64.b64decode(saved["weights"], validate=True))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"the VQ-VAE's weights are damaged ({error!s:.100})") from error
        sizes, expected_sizes = (
            {name: (tensor.dtype, tensor.shape) for name, tensor in each.items()} for each in (tensors, expected)
        )
        if sizes != expected_sizes:
            different = sorted(name for name in sizes | expected_sizes if sizes.get(name) != expected_sizes.get(name))
            raise ValueError(f"the VQ-VAE's weights are not those of its config: {different[0]:.60} differs")
        network = VQVAE(config)
        network.load_state_dict(tensors, strict=False)
        tokenizer = VQVAETokenizer(network, saved["side"], order)
        if tokenizer.hash != saved["hash"]:
            raise ValueError(f"the VQ-VAE's hash is {tokenizer.hash}, not the {saved['hash']!r:.60} that is stated")
        return tokenizer


def saved_tensors(network: VQVAE) -> dict[str, Tensor]:
    """The tensors of a VQ-VAE that make tokens and images, without those of its training: copies in float32 on the CPU.

    Those of a network without data (on `meta`) have none either.
    """
    parts = ("encoder.", "decoder.", "quantizer.codebook")
    return {
        name: tensor.detach().to("meta" if tensor.is_meta else "cpu", torch.float32, copy=True).contiguous()
        for name, tensor in network.state_dict().items()
        if name.startswith(parts)
    }


def chunk_size(device: torch.device) -> int:
    """Images at a time."""
    return _CHUNK if device.type == "cpu" else _GPU_CHUNK


@contextmanager
def unrounded_float32(device: torch.device) -> Iterator[None]:
    """Context manager: float32 operands are rounded to no shorter format, and nothing is kept for a gradient.

    One thread at a time, since the precision is the process's.
    """
    matmul, convolutions = float32_matmul_precision("highest"), cudnn_tf32(False)
    with _PRECISION, torch.no_grad(), torch.autocast(device.type, enabled=False), matmul, convolutions:
        yield


class VQVAESettings(VQVAEConfig):
    """The settings of `tokens=vqvae`."""

    path: str | None  # run folder of task=tokenizer
    order: str

    def sizes(self, resolution: int) -> tuple[TokenGrid, int]:
        if resolution % self.factor:
            raise ValueError(
                f"tokens.factor={self.factor} does not divide data.resolution={resolution}: take a multiple of it"
            )
        return TokenGrid(resolution // self.factor, resolution // self.factor), self.codes

    def build(self, source: Source, cache: Path) -> VQVAETokenizer:
        """Raises ValueError: a VQ-VAE is not fitted by the run that uses it, but read from `path` before."""
        raise ValueError(UNTRAINED)


def check_trainable(settings: TokenizerSettings | None, *, task: str, option: str, resolution: int) -> VQVAESettings:
    """The settings of a tokenizer to be trained, those of the `option` of `tokens`; None: the checkpoint's.

    Raises:
        ValueError: it is not one to train, is trained already, or does not fit the images.
    """
    if not isinstance(settings, VQVAESettings):
        raise ValueError(f"task={task} trains a VQ-VAE: tokens=vqvae; tokens={option} is made by the run that uses it")
    if settings.path is not None:
        raise ValueError(f"task={task} trains a tokenizer, tokens.path={settings.path} names one: leave it out")
    settings.sizes(resolution)
    return settings
