"""A trained network with its tokenizer, for notebooks and other programs: `igpt.load(path or Hub name)`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import CheckpointMetadata, Weights
from igpt.model.features import layer_features
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.utils import keyed

Images = np.ndarray | Tensor | Sequence[Any]


class ImageGPT:
    """A network with its tokenizer and metadata. R is its resolution, T its number of positions.

    Samples depend only on `seed` and the image's index, not on global random state or batch size.
    """

    def __init__(self, net: GPT, metadata: CheckpointMetadata, path: Path) -> None:
        self.net = net.eval().requires_grad_(False)
        self.metadata, self.tokenizer, self.path = metadata, metadata.tokenizer, path

    @staticmethod
    def from_weights(weights: Weights) -> "ImageGPT":
        """Loads the network of some weights."""
        return ImageGPT(weights.net(), weights.metadata, weights.path)

    def __repr__(self) -> str:
        o, n = self.metadata, self.metadata.network
        return (
            f"ImageGPT({o.model} on {o.data}, {o.objective['name']}, step {o.step:,}: {n.n_layer} blocks of "
            f"{n.n_embd}, {self.resolution}×{self.resolution} pixels in {self.tokenizer.describe()}, {self.path})"
        )

    @property
    def resolution(self) -> int:
        """R, pixels a side."""
        return self.tokenizer.side

    @property
    def device(self) -> torch.device:
        return self.net.wte.device

    def to(self, device: str | torch.device) -> "ImageGPT":
        """Moves the network; returns itself."""
        self.net.to(device)
        return self

    def encode(self, images: Images) -> Tensor:
        """Tokens (B, T) int64 of images: (B, R, R, 3) uint8, one (R, R, 3), or a list of PIL images.

        Raises:
            ValueError: another shape or dtype. The caller crops and resizes images of other sizes.
        """
        return self.tokenizer.encode(self._check_images(images))

    def _check_images(self, images: Images) -> Tensor:
        """Images as a batch on the network's device: (B, R, R, 3) uint8."""
        if not isinstance(images, Tensor):
            rows = images if isinstance(images, np.ndarray) else np.stack([np.asarray(image) for image in images])
            images = torch.from_numpy(np.ascontiguousarray(rows))
        pixels, r = images[None] if images.ndim == 3 else images, self.resolution
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (r, r, 3):
            raise ValueError(
                f"images are uint8 of shape (B, {r}, {r}, 3), got {pixels.dtype} {tuple(pixels.shape)}: convert to RGB "
                f"and resize to {r}×{r} first"
            )
        return pixels.to(self.device)

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Images of tokens: (B, T) → (B, R, R, 3) uint8."""
        return self.tokenizer.decode(tokens.cpu())

    @torch.inference_mode()
    def logits(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits of every token at every position: (B, T) → (B, T, V). `visible` (B, T): mask of pixels BERT sees."""
        logits: Tensor = self.net(tokens.to(self.device), visible)
        return logits

    @torch.inference_mode()
    def features(self, tokens: Tensor, *, norm: str = "ln_1") -> Tensor:
        """Hidden states of every layer, averaged over positions: (B, T) → (L + 1, B, C), the embedding first.

        A BERT network sees every pixel. `norm`: as in `layer_features`.
        """
        return layer_features(self.net, tokens.to(self.device), norm=norm)

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """`count` new images, (count, R, R, 3) uint8: the same as `task=sample` draws with this seed."""
        return self.decode(generate(self.net, self._uniforms(count, seed), Sampling(temperature, top_k, top_p)))

    def complete(
        self,
        images: Images,
        *,
        rows: int,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """Completions that keep the top `rows` of each image: (B, R, R, 3) uint8 → the same shape.

        Of the rest of an image nothing is seen. With tokens of several rows, as patches, fewer rows are kept.
        """
        tokens = self.tokenizer.encode_top(self._check_images(images), rows)
        is_given, uniforms = self.tokenizer.known_tokens(rows), self._uniforms(len(tokens), seed)
        drawn = generate(self.net, uniforms, Sampling(temperature, top_k, top_p), prompts=tokens, known=is_given)
        return self.decode(drawn)

    def _uniforms(self, count: int, seed: int) -> Tensor:
        """One uniform number in [0, 1) per image and position, (count, T)."""
        rng_keys = keyed.per_example_keys(keyed.key(seed, "sample"), torch.arange(count))
        return keyed.uniform(rng_keys, self.net.n_ctx).to(self.device)


def load(path: str | Path, *, palette: str | None = None, n_head: int | None = None) -> ImageGPT:
    """A trained network with its tokenizer, on the CPU.

    `path`: a run directory of this project or a checkpoint in it; a Hugging Face ImageGPT folder or a name on the Hub
    (`openai/imagegpt-small`); an OpenAI checkpoint, with its `palette` (`kmeans_centers.npy`).

    Raises:
        ValueError: nothing at that path, or an unknown format.
    """
    return ImageGPT.from_weights(find_weights(str(path), palette=palette, n_head=n_head))
