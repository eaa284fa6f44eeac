"""The images that `task=quality` draws, and their comparison with real ones in an encoder's features."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.checkpoint.igpt_format import Weights
from igpt.data.source import plain_pixels
from igpt.encoder.encoder import Encoder
from igpt.metric.generative import (
    FEWEST,
    check_enough,
    find_nearest_images,
    frechet_distance,
    kernel_distance,
    memorisation_numbers,
    precision_and_recall,
)
from igpt.metric.result import Grid, Number
from igpt.model.generate import Sampling
from igpt.model.gpt import GPT
from igpt.run.components import Components
from igpt.settings.generation import QualitySettings
from igpt.task.cached_images import PART, draw_cached, encode_cached
from igpt.tokens.tokenizer import Tokenizer
from igpt.utils import keyed

SHOWN, NEAREST = 8, 4  # images of a picture; training images beside each


@dataclass(frozen=True)
class RealImages:
    """Rows of val and train in random order, so that blocks of images are alike; those whose halves are completed."""

    components: Components
    settings: QualitySettings

    def check(self) -> None:
        """Raises ValueError, with both numbers, where there are fewer images than are needed."""
        settings, source = self.settings, self.components.source
        n_val, n_train = (len(source.split(name)) for name in ("val", "train"))
        for name in ("samples", "held_out_images", "training_images"):
            check_enough(getattr(settings, name), f"task.{name}")
        check_enough(settings.completions or FEWEST, "task.completions")
        taken = f" beside task.completions={settings.completions}" if settings.completions else ""
        check_enough(n_val - settings.completions, f"the val split of {source.name}{taken}")
        check_enough(n_train, f"the train split of {source.name}")

    def _permute(self, split: str) -> np.ndarray:
        n = len(self.components.source.split(split))
        return keyed.generator(self.components.seed, f"quality {split}").permutation(n)

    @property
    def prompts(self) -> np.ndarray:
        """Rows of val of which the upper half is given."""
        return self._permute("val")[: self.settings.completions]

    @property
    def held_out(self) -> np.ndarray:
        """Rows of val to compare with: others."""
        return self._permute("val")[self.settings.completions :][: self.settings.held_out_images]

    @property
    def training(self) -> np.ndarray:
        """Rows of train."""
        return self._permute("train")[: self.settings.training_images]

    def read(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Rows (N,) of a split → (N, R, R, 3) uint8."""
        return plain_pixels(self.components.source.split(split), rows.tolist())


@dataclass(frozen=True)
class Judge:
    """Compares drawn images with real ones by an encoder's features, in float64."""

    real: RealImages
    encoder: Encoder

    @cached_property
    def held_out(self) -> Tensor:
        return self._encode_rows("val", self.real.held_out)

    @cached_property
    def training(self) -> Tensor:
        return self._encode_rows("train", self.real.training)

    def _encode_rows(self, split: str, rows: np.ndarray) -> Tensor:
        self.real.components.source.split(split).prepare()
        parts = (self.real.read(split, rows[start : start + PART]) for start in range(0, len(rows), PART))
        return self._encode(parts, n=len(rows), what=f"{split} images")

    def _encode(self, parts: Iterable[np.ndarray], *, n: int, what: str) -> Tensor:
        cache, size = self.real.components.cache_dir, self.real.settings.batch_size
        return encode_cached(self.encoder, parts, n=n, batch_size=size, cache=cache, what=what)

    def compare_features(self, drawn: Tensor) -> dict[str, Number]:
        """KID, Fréchet distance, precision and recall of drawn images, features (N, D), against the held-out ones."""
        equal = min(len(drawn), len(self.held_out))  # radii depend on the number of images
        precision, recall = precision_and_recall(self.held_out[:equal], drawn[:equal])
        distance = Number(frechet_distance(self.held_out, drawn), "squared distance", len(drawn))
        kid = kernel_distance(self.held_out, drawn)
        return {"kid": kid, f"fd_{self.encoder.name}": distance, "precision": precision, "recall": recall}

    def compare(self, name: str, images: np.ndarray) -> tuple[dict[str, Number], Tensor]:
        """As `compare_features`, of images (N, R, R, 3) uint8, and how many repeat training images; their features.

        Keys are `name/kid` ….
        """
        parts = (images[start : start + PART] for start in range(0, len(images), PART))
        drawn = self._encode(parts, n=len(images), what=name)
        repeated = memorisation_numbers(drawn, training=self.training, held_out=self.held_out)
        return {f"{name}/{key}": number for key, number in {**self.compare_features(drawn), **repeated}.items()}, drawn

    def show_nearest(self, images: np.ndarray, drawn: Tensor) -> Grid:
        """The drawn images that lie closest to a training image, the closest first, beside their nearest ones."""
        distances, rows = find_nearest_images(drawn, self.training, k=NEAREST)
        closest = distances[:, 0].argsort()[:SHOWN]
        beside = self.real.read("train", self.real.training[rows[closest].flatten().numpy()])
        training = beside.reshape(len(closest), NEAREST, *images.shape[1:])
        titles = ("drawn", *(f"training {i + 1}" for i in range(NEAREST)))
        return Grid(np.concatenate([images[closest.numpy()][:, None], training], axis=1), titles)


def draw_kinds(
    weights: Weights, fill: Callable[[GPT], None], tokenizer: Tokenizer, real: RealImages, *, name: str
) -> dict[str, np.ndarray]:
    """`samples` and, if `task.completions`, `completions` of the network of some weights: (N, R, R, 3) uint8.

    `fill` sets its weights: `load_into`, or others.
    Random numbers are the same for every network, those of task=sample. `name`: identifies the network in the cache.
    """
    components, settings = real.components, real.settings
    sampling, seed = Sampling(settings.temperature, settings.top_k, settings.top_p), components.seed
    cache_key = {"weights": name, "precision": components.hardware.precision}
    how: dict[str, Any] = {"batch_size": settings.batch_size, "cache": components.cache_dir, "cache_key": cache_key}
    with components.hardware.inference(weights.build_network, fill) as net:
        draw = partial(draw_cached, net, sampling, **how)
        rng_keys = keyed.per_example_keys(keyed.key(seed, "sample"), torch.arange(settings.samples))
        drawn = {"samples": draw(rng_keys=rng_keys)}
        if settings.completions:
            rows, half = real.prompts, tokenizer.side // 2
            prompts = tokenizer.encode_top(torch.from_numpy(real.read("val", rows)), half)
            rng_keys = keyed.per_example_keys(keyed.key(seed, "complete"), torch.from_numpy(rows))
            drawn["completions"] = draw(rng_keys=rng_keys, prompts=prompts, known=tokenizer.known_tokens(half))
    return {kind: tokenizer.decode(tokens) for kind, tokens in drawn.items()}
