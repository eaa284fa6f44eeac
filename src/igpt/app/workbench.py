"""The operations of `task=demo`: choose or upload an image, complete it, find its nearest training images."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from igpt.app.nearest import TrainingFeatures
from igpt.checkpoint.classifier import Classifier
from igpt.data.classes import format_class_name
from igpt.data.crop import Crop
from igpt.data.image_decoding import BadImageError, open_image, read_image_file
from igpt.data.source import plain_pixels
from igpt.model.generate import Sampling, generate_stream
from igpt.objective.ar import AR
from igpt.probe.classify import classify, rank_classes
from igpt.settings.generation import DemoSettings
from igpt.task.complete import HIDDEN, prompt_rows
from igpt.task.prediction_table import MOST_RANKED
from igpt.tokens.tokenizer import count_decided_rows
from igpt.utils import keyed

MEBIBYTE = 2**20


@dataclass(frozen=True)
class DemoImage:
    """The chosen image, or a training image found for it."""

    pixels: np.ndarray  # (R, R, 3) uint8
    index: int  # row in its split; for an upload a hash of its pixels
    name: str
    label: int = -1  # -1: none
    cosine: float | None = None  # similarity of a found image


class Drawing(NamedTuple):
    """Completions in progress."""

    pixels: np.ndarray  # (N, R, R, 3) uint8, grey where nothing is drawn yet
    rows: float  # finished pixels, in rows; R: all


class Workbench:
    """A network with the images of a split, and the operations on them. R is the resolution."""

    def __init__(
        self, training: TrainingFeatures, crop: Crop, settings: DemoSettings, classifier: Classifier | None = None
    ) -> None:
        self.classifier = classifier
        self.training, self.stopping, self.crop, self.settings = training, training.stopping, crop, settings
        self.net, self.machine, self.data = training.net, training.machine, training.data
        self.split = self.data.source.split(settings.split)
        if not len(self.split):
            what = f"{self.data.source.name} has no images in its {settings.split} split"
            raise ValueError(f"{what}: choose another, task.split=…")
        self.side = self.data.tokenizer.side  # R, pixels
        self._order = keyed.generator(self.data.seed, "demo").permutation(len(self.split))
        self._reader = ThreadPoolExecutor(1)  # of training images

    def class_name(self, label: int) -> str:
        """The text for a label: the class name, else its number; "" without a label."""
        if label < 0:
            return ""
        names = self.data.source.class_names
        if names is None:
            return f"label\N{NO-BREAK SPACE}{label}"
        return f"class\N{NO-BREAK SPACE}{format_class_name(names[label])}"

    @torch.inference_mode()
    def classify(self, chosen: DemoImage) -> dict[str, float]:
        """The probability of the likeliest classes of an image, by name, as `task=predict` gives them."""
        assert self.classifier is not None, "the page asks only where there is one"
        none, machine = torch.zeros(1, dtype=torch.int64), self.machine  # an autoregressive objective has no masks
        tokens = self._tokens(chosen).to(self.net.wte.device)
        with machine.autocast():
            classes, probabilities = classify(
                self.net, self.classifier.head, AR(), tokens, rng_keys=none, rows=none, masks=1, seed=0
            )
        ranked = rank_classes(classes, probabilities, min(MOST_RANKED, self.classifier.n_class))[0].tolist()
        names = [format_class_name(self.classifier.name_class(label)) for label in ranked]
        return dict(zip(names, probabilities[0, ranked].tolist(), strict=True))

    def choices(self, page: int, count: int | None = None) -> list[DemoImage]:
        """Page `page` of the shuffled held-out images, `count` or `task.choices` a page; wraps around at the end."""
        count = min(count or self.settings.choices, len(self.split))
        rows = self._order.take(range(page * count, (page + 1) * count), mode="wrap").tolist()
        labels = self.split.labels[rows].tolist()
        names = [f"{self.settings.split} image {row}" for row in rows]
        return list(map(DemoImage, plain_pixels(self.split, rows), rows, names, labels))

    def read_upload(self, path: Path) -> DemoImage:
        """The image of an uploaded file, with the evaluation crop of the data.

        Formats: `igpt.data.image_decoding.FORMATS`.

        Raises:
            ValueError: too many bytes or pixels, no image, another format, or a damaged file.
        """
        size = path.stat().st_size / MEBIBYTE
        if size > self.settings.upload_mb:
            raise ValueError(f"The file has {size:.1f} MB, at most {self.settings.upload_mb:g} MB are taken.")
        try:
            data = read_image_file(path)
            width, height = open_image(data).size
            if width * height > self.settings.upload_pixels:
                most = f"{self.settings.upload_pixels / 1e6:g} million"
                raise ValueError(f"The image has {width:,}×{height:,} pixels, at most {most} are taken.")
            pixels = self.crop(data, 0).copy()  # Pillow's array is read-only, PyTorch warns of that
        except BadImageError as error:
            raise ValueError(f"The file cannot be read as an image: {error}.") from error
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=8).digest()
        return DemoImage(pixels, int.from_bytes(digest, "little") >> 1, "your image")

    def show_prompt(self, chosen: DemoImage, rows: int) -> np.ndarray:
        """The top `rows` of an image as decoded from its tokens, grey below: (R, R, 3) uint8."""
        known, given = self._prompt(chosen, rows)
        shown: np.ndarray = self._render(given, known)[0]
        return shown

    def prompt_rows(self, rows: int) -> int:
        """The number of the top `rows` that no drawing changes: fewer if a token shows several rows."""
        return count_decided_rows(self.data.tokenizer, prompt_rows(0, rows, self.side))

    def complete(
        self,
        chosen: DemoImage,
        *,
        rows: int,
        completions: int,
        seed: int,
        temperature: float,
        top_k: int | None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Iterator[Drawing]:
        """Yields `completions` drawings of an image below its top `rows`: at the start, and after each row.

        Equal to those of `task=complete` for a held-out image and this seed. Ends after the current pixel when `wanted`
        returns False or the demo ends.

        Raises:
            ValueError: an invalid setting, before anything is drawn.
        """
        sampling = Sampling(temperature, top_k, None)
        if not 1 <= completions <= self.settings.at_most:
            raise ValueError(f"1 to {self.settings.at_most} completions can be drawn at once, got {completions}")
        known, given = self._prompt(chosen, rows)
        image_keys = keyed.per_example_keys(keyed.key(seed, "complete"), torch.full((completions,), chosen.index))
        rng_keys = keyed.per_example_keys(image_keys, torch.arange(completions))
        device, n_ctx = self.net.wte.device, self.net.n_ctx
        given = given.expand(completions, -1).to(device)
        uniforms = keyed.uniform(rng_keys, n_ctx).to(device)
        steps = generate_stream(self.net, uniforms, sampling, prompts=given, known=known)
        n_known, row = int(known.sum()), n_ctx // self.data.tokenizer.grid.rows
        for there in range(n_known, n_ctx + 1):
            if self.stopping.is_set() or not wanted():
                return
            with self.machine.autocast():  # autocast is per thread, and each row may run in another
                tokens, settled = next(steps)
            if (there - n_known) % row == 0 or there == n_ctx:
                visible = known | (torch.arange(n_ctx) < settled)
                shown = torch.where(visible.to(device), tokens, given)  # what is not drawn may change pixels beside it
                yield Drawing(self._render(shown, visible), there * self.side / n_ctx)

    def nearest(self, chosen: DemoImage, *, layer: int, k: int) -> Iterator[tuple[int, int] | list[DemoImage]]:
        """Yields (done, total) while the training images are read, then the list of the k nearest.

        Raises:
            ValueError: a layer that the network does not have, or training images that cannot be read.
        """
        if self.stopping.is_set():
            return
        reading = self._reader.submit(self.training.read)
        while not wait([reading], timeout=0.5).done:
            yield self.training.done, self.training.total
        reading.result()
        if not self.stopping.is_set():
            rows, cosines = self.training.find(self._tokens(chosen), layer=layer, k=k)
            split = self.data.source.split("train")
            names, labels = [f"training image {row}" for row in rows], split.labels[rows].tolist()
            yield list(map(DemoImage, plain_pixels(split, rows.tolist()), rows.tolist(), names, labels, cosines))

    def stop(self) -> None:
        """Stops drawing and reading after the current step."""
        self.stopping.set()
        self._reader.shutdown()

    def _prompt(self, chosen: DemoImage, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The top `rows` of an image as tokens: (which ones are given (T,), tokens (1, T))."""
        tokenizer, rows = self.data.tokenizer, prompt_rows(0, rows, self.side)
        return tokenizer.known_tokens(rows), tokenizer.encode_top(torch.from_numpy(chosen.pixels[None]), rows)

    def _tokens(self, chosen: DemoImage) -> torch.Tensor:
        return self.data.encode(torch.from_numpy(chosen.pixels[None]))

    def _render(self, tokens: torch.Tensor, there: torch.Tensor) -> np.ndarray:
        pixels = self.data.decode(tokens.cpu())
        grid = self.data.tokenizer.visible_pixels(there).numpy()  # (R, R)
        return np.where(grid[None, :, :, None], pixels, np.uint8(HIDDEN))
