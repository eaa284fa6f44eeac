"""A trained network with its tokenizer, for notebooks and other programs: `igpt.load(path or Hub name)`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.checkpoint.find import find
from igpt.checkpoint.igpt_format import CheckpointMetadata, Weights
from igpt.model.features import layer_features
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.utils import keyed

Images = np.ndarray | Tensor | Sequence[Any]


class ImageGPT:
    """A network, what its tokens mean, and what it was trained on. R is its resolution, T its positions.

    Nothing random is hidden: what is drawn depends on `seed` alone, image by image.
    """

    def __init__(self, net: GPT, metadata: CheckpointMetadata, path: Path) -> None:
        self.net = net.eval().requires_grad_(False)
        self.metadata, self.tokenizer, self.path = metadata, metadata.tokenizer, path

    @staticmethod
    def of(weights: Weights) -> "ImageGPT":
        """The network of weights that were found, loaded."""
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
        """Images to tokens: (B, R, R, 3) uint8, one (R, R, 3), or a list of PIL images → (B, T) int64.

        Raises:
            ValueError: another shape or kind. Pictures of other sizes are for the caller to crop and resize.
        """
        if isinstance(images, Tensor):
            pixels = images
        else:
            rows = images if isinstance(images, np.ndarray) else np.stack([np.asarray(image) for image in images])
            pixels = torch.from_numpy(np.ascontiguousarray(rows))
        if pixels.ndim == 3:
            pixels = pixels[None]
        r = self.resolution
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (r, r, 3):
            raise ValueError(
                f"images are uint8 of shape (B, {r}, {r}, 3), got {pixels.dtype} {tuple(pixels.shape)}: convert to RGB "
                f"and resize to {r}×{r} first"
            )
        return self.tokenizer.encode(pixels.to(self.device))

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Tokens to images: (B, T) → (B, R, R, 3) uint8."""
        return self.tokenizer.decode(tokens.cpu())

    @torch.inference_mode()
    def logits(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Scores of every token at every position: (B, T) → (B, T, V). `visible` (B, T): which pixels BERT is shown."""
        logits: Tensor = self.net(tokens.to(self.device), visible)
        return logits

    @torch.inference_mode()
    def features(self, tokens: Tensor, *, norm: str = "ln_1") -> Tensor:
        """What every layer knows, averaged over positions: (B, T) → (L + 1, B, C), the embedding first.

        Of a masked-pixel network, with every pixel shown. `norm`: as `layer_features` has it.
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
        """`count` new images, (count, R, R, 3) uint8: those that `task=sample` draws with this seed."""
        uniforms = keyed.uniform(self._keys(count, seed), self.net.n_ctx).to(self.device)
        return self.decode(generate(self.net, uniforms, Sampling(temperature, top_k, top_p)))

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
        """The images with all below their top `rows` drawn anew: (B, R, R, 3) uint8 → the same shape."""
        tokens = self.encode(images)
        known = self.tokenizer.known_tokens(rows)
        uniforms = keyed.uniform(self._keys(len(tokens), seed), self.net.n_ctx).to(self.device)
        drawn = generate(self.net, uniforms, Sampling(temperature, top_k, top_p), given=tokens, known=known)
        return self.decode(drawn)

    @staticmethod
    def _keys(count: int, seed: int) -> Tensor:
        return keyed.item_keys(keyed.key(seed, "sample"), torch.arange(count))


def load(path: str | Path, *, palette: str | None = None, n_head: int | None = None) -> ImageGPT:
    """A trained network with its tokenizer, on the CPU.

    `path`: a run folder of this project, a checkpoint of it; a folder of Hugging Face's ImageGPT or a name on the Hub
    (`openai/imagegpt-small`); a checkpoint of OpenAI's, with its `palette` (`kmeans_centers.npy`).

    Raises:
        ValueError: nothing there, or nothing that can be understood.
    """
    return ImageGPT.of(find(str(path), palette=palette, n_head=n_head))
