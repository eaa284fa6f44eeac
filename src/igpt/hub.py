"""A trained network with its tokenizer, for notebooks and other programs: `igpt.load(path or Hub name)`."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt.checkpoint.classifier import Classifier, find_class_head, has_class_head
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import CheckpointMetadata, Weights
from igpt.data.crop import Crop, evaluation_crop
from igpt.data.image_decoding import BadImageError, decode_rgb, prepare_image, read_image_file, upright_size
from igpt.model.features import layer_features
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.objective.registry import build_objective
from igpt.probe.classify import classify
from igpt.settings.older_configs import read_record
from igpt.utils import keyed

log = logging.getLogger(__name__)

Images = np.ndarray | Tensor | Image.Image | str | Path | Sequence[Any]  # one, or several
TOGETHER = 64  # images classified at a time
NO_HEAD = "has no class head: load a run of task=finetune or task=probe, or name a probe of it, load(…, head=PROBE_RUN)"


class Prediction(NamedTuple):
    """The predicted class of an image."""

    name: str  # `class 3` where the head does not name its classes
    probability: float
    label: int


class ImageGPT:
    """A network with its tokenizer and metadata. R is its resolution, T its number of positions.

    Samples depend only on `seed` and the image's index, not on global random state or batch size.
    """

    def __init__(
        self,
        net: GPT,
        metadata: CheckpointMetadata,
        path: Path,
        *,
        classifier: Classifier | None = None,
        crop: Crop | None = None,
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.metadata, self.tokenizer, self.path = metadata, metadata.tokenizer, path
        self.classifier = classifier  # its class head, or a probe
        self.crop = default_crop(self.resolution) if crop is None else crop
        self._is_told = False  # that images are resized

    @staticmethod
    def from_weights(weights: Weights, *, head: str | None = None) -> "ImageGPT":
        """Loads the network of some weights, with the head that belongs to them, or the probe at `head`."""
        classifier = find_class_head(weights, head) if has_class_head(weights, head) else None
        return ImageGPT(weights.net(), weights.metadata, weights.path, classifier=classifier, crop=find_crop(weights))

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
        if self.classifier is not None and isinstance(self.classifier.head, torch.nn.Module):
            self.classifier.head.to(device)
        return self

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the head's classes, by label; None if they are unknown, or without a head."""
        return None if self.classifier is None else self.classifier.class_names

    def encode(self, images: Images) -> Tensor:
        """Tokens (B, T) int64 of images, as `prepare_images` takes them."""
        return self.tokenizer.encode(self.prepare_images(images))

    def prepare_images(self, images: Images) -> Tensor:
        """Images as the network reads them: (B, R, R, 3) uint8, on its device.

        `images`: one or several files by path, pictures of Pillow, or uint8 arrays, grey (H, W) or (H, W, 1), colour
        (H, W, 3) or (H, W, 4). Those of R×R pixels are taken as they are; of others, and of files, the crop of `crop`:
        that of the evaluation in the training run where that is known, else the largest centred square; resized to
        R×R, as the data's files are.

        Raises:
            ValueError: another type, shape or dtype, or a file that is no image.
        """
        r = self.resolution
        if isinstance(images, Tensor):
            images = images.cpu().numpy()
        if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (r, r, 3):
            return torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        if isinstance(images, Image.Image | str | Path) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        rows = [self._prepare(image) for image in (images if isinstance(images, Iterable) else [images])]
        pixels = np.stack(rows) if rows else np.empty((0, r, r, 3), np.uint8)
        return torch.from_numpy(pixels).to(self.device)

    def _prepare(self, image: Any) -> np.ndarray:
        """One image as `prepare_images` takes it: (R, R, 3) uint8."""
        r, where = self.resolution, ""
        try:
            if isinstance(image, str | Path):
                where = f"{image}: "
                return self.crop(read_image_file(Path(image)), 0)
            opened = prepare_image(image if isinstance(image, Image.Image) else self._open_array(image))
            if upright_size(opened) == (r, r):
                return np.asarray(decode_rgb(opened))
            if not self._is_told:
                log.info("images of other sizes are cropped to a centred square and resized to %d×%d", r, r)
                self._is_told = True
            return self.crop.crop_image(opened, 0)
        except BadImageError as error:
            raise ValueError(f"{where}{str(error).removeprefix(where)}") from error

    def _open_array(self, image: Any) -> Image.Image:
        pixels, r = np.asarray(image), self.resolution
        pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
        is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
        if pixels.dtype != np.uint8 or not is_image or not pixels.size:
            raise ValueError(
                f"images are uint8 of shape (B, {r}, {r}, 3), or each of its own size (H, W, 3), (H, W, 4) or (H, W), "
                f"got {pixels.dtype} {pixels.shape}"
            )
        return Image.fromarray(np.ascontiguousarray(pixels))

    def predict(self, images: Images) -> list[Prediction]:
        """The class of each image, with its probability: those of `task=predict` for these images in this order.

        `images`: as `prepare_images` takes them. With a masked objective the class is a vote over masks, which are
        keyed by an image's place, and the probability their mean.

        Raises:
            ValueError: the weights have no class head.
        """
        classes, probabilities = self._classify(images)
        of_class = probabilities.gather(1, classes[:, None])[:, 0].tolist()
        assert self.classifier is not None, "_classify has seen to it"
        return [
            Prediction(self.classifier.name_class(label), probability, label)
            for label, probability in zip(classes.tolist(), of_class, strict=True)
        ]

    def classify(self, images: Images) -> Tensor:
        """The probability of every class of `class_names`: (B, K) float32. `images`, Raises: as in `predict`."""
        return self._classify(images)[1]

    @torch.inference_mode()
    def _classify(self, images: Images) -> tuple[Tensor, Tensor]:
        """Predicted classes (B,) and probabilities (B, K)."""
        if self.classifier is None:
            raise ValueError(f"{self.path} {NO_HEAD}")
        tokens, objective = self.encode(images), build_objective(**self.metadata.objective)
        if not len(tokens):
            raise ValueError("there is no image to classify")
        rows = torch.arange(len(tokens))
        rng_keys = keyed.per_example_keys(keyed.key(self.classifier.seed, "test", 0), rows)  # as of a test split
        parts = [
            classify(
                self.net, self.classifier.head, objective, tokens[part], rng_keys=rng_keys[part].to(self.device),
                rows=rows[part], masks=self.classifier.eval_masks, seed=self.classifier.seed,
            )
            for part in torch.split(rows, TOGETHER)
        ]  # fmt: skip
        classes, probabilities = zip(*parts, strict=True)
        return torch.cat(classes), torch.cat(probabilities)

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
        tokens = self.tokenizer.encode_top(self.prepare_images(images), rows)
        is_given, uniforms = self.tokenizer.known_tokens(rows), self._uniforms(len(tokens), seed)
        drawn = generate(self.net, uniforms, Sampling(temperature, top_k, top_p), prompts=tokens, known=is_given)
        return self.decode(drawn)

    def _uniforms(self, count: int, seed: int) -> Tensor:
        """One uniform number in [0, 1) per image and position, (count, T)."""
        rng_keys = keyed.per_example_keys(keyed.key(seed, "sample"), torch.arange(count))
        return keyed.uniform(rng_keys, self.net.n_ctx).to(self.device)


def default_crop(resolution: int) -> Crop:
    """The largest centred square, as of `data=folder`."""
    return Crop(resolution, short_side=None, size=None, filter="bilinear", resize="twice", draft=3.0)


def find_crop(weights: Weights) -> Crop | None:
    """The evaluation crop of the run that trained these weights, or whose probe they were found by; None: not known."""
    folder = weights.folder.parent if weights.probe is None else weights.probe.parent
    try:
        data = read_record(folder / "run.json")["config"]["data"]
        crop = evaluation_crop(data) if "crop" in data else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, damaged, or of a later release
        return None
    return crop and replace(crop, resolution=weights.tokenizer.side)


def load(
    path: str | Path, *, palette: str | None = None, n_head: int | None = None, head: str | Path | None = None
) -> ImageGPT:
    """A trained network with its tokenizer, on the CPU; with its class head, if it was fine-tuned.

    `path`: a run directory of this project or a checkpoint in it; a Hugging Face ImageGPT folder or a name on the Hub
    (`openai/imagegpt-small`); an OpenAI checkpoint, with its `palette` (`kmeans_centers.npy`). A run of `task=probe`:
    the weights that it probed, with its probe as head. `head`: such a run, beside the path of the weights.

    Raises:
        ValueError: nothing at that path, or an unknown format; a head of other weights.
    """
    weights = find_weights(str(path), palette=palette, n_head=n_head)
    return ImageGPT.from_weights(weights, head=None if head is None else str(head))
