"""What a person does with a trained network: choose or bring an image, complete it, find what is like it."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from igpt.app.nearest import TrainingFeatures
from igpt.data.classes import format_class_name
from igpt.data.crop import Crop
from igpt.data.image_decoding import BadImageError, opened, read_image_file
from igpt.data.source import plain_pixels
from igpt.model.generate import Sampling, generate_stream
from igpt.settings.generation import DemoSettings
from igpt.task.complete import HIDDEN, prompt_rows
from igpt.tokens.tokenizer import whole_rows
from igpt.utils import keyed

MEBIBYTE = 2**20


@dataclass(frozen=True)
class DemoImage:
    """An image that a person works on, or that is found for it."""

    pixels: np.ndarray  # (R, R, 3) uint8
    index: int  # of its split; of an uploaded one, a number that its pixels decide
    name: str
    label: int = -1  # -1: it has none
    cosine: float | None = None  # of one that was found


class Drawing(NamedTuple):
    """Completions on the way."""

    pixels: np.ndarray  # (N, R, R, 3) uint8, grey where nothing is drawn yet
    rows: float  # as many pixels as so many rows have are there; R: all


class Workbench:
    """A network, the images it is shown, and what can be done with them. R is its resolution."""

    def __init__(self, training: TrainingFeatures, crop: Crop, settings: DemoSettings) -> None:
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
        """What is said of a label: its class by name, else its number; nothing where an image has none."""
        if label < 0:
            return ""
        names = self.data.source.class_names
        if names is None:
            return f"label\N{NO-BREAK SPACE}{label}"
        return f"class\N{NO-BREAK SPACE}{format_class_name(names[label])}"

    def choices(self, page: int, count: int | None = None) -> list[DemoImage]:
        """`count` held-out images, or as many as are shown at a time; after the last come the first again."""
        count = min(count or self.settings.choices, len(self.split))
        rows = self._order.take(range(page * count, (page + 1) * count), mode="wrap").tolist()
        labels = self.split.labels[rows].tolist()
        names = [f"{self.settings.split} image {row}" for row in rows]
        return list(map(DemoImage, plain_pixels(self.split, rows), rows, names, labels))

    def uploaded(self, path: Path) -> DemoImage:
        """The image in an uploaded file, cut out as the data's are for evaluation.

        It may be of every format that data may have (`igpt.data.image_decoding.FORMATS`).

        Raises:
            ValueError: too many bytes or pixels, no image, one of another format, or a damaged one.
        """
        size = path.stat().st_size / MEBIBYTE
        if size > self.settings.upload_mb:
            raise ValueError(f"The file has {size:.1f} MB, at most {self.settings.upload_mb:g} MB are taken.")
        try:
            data = read_image_file(path)
            width, height = opened(data).size
            if width * height > self.settings.upload_pixels:
                most = f"{self.settings.upload_pixels / 1e6:g} million"
                raise ValueError(f"The image has {width:,}×{height:,} pixels, at most {most} are taken.")
            pixels = self.crop(data, 0).copy()  # Pillow's own cannot be written on, of which PyTorch warns
        except BadImageError as error:
            raise ValueError(f"The file cannot be read as an image: {error}.") from error
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=8).digest()
        return DemoImage(pixels, int.from_bytes(digest, "little") >> 1, "your image")

    def given(self, chosen: DemoImage, rows: int) -> np.ndarray:
        """What the network is shown of an image's top `rows`, as their tokens are decoded, grey below: (R, R, 3)."""
        known = self.data.tokenizer.known_tokens(prompt_rows(0, rows, self.side))
        shown: np.ndarray = self._shown(self._tokens(chosen), known)[0]
        return shown

    def given_rows(self, rows: int) -> int:
        """How many of so many rows are given: fewer where a token shows several."""
        return whole_rows(self.data.tokenizer, prompt_rows(0, rows, self.side))

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
        """`completions` of an image below its top `rows`, as they grow: at the start, and after each row's pixels.

        Those of a held-out image are what `task=complete` draws of it with this seed. It ends after a pixel that
        makes `wanted` false, or when the demo ends.

        Raises:
            ValueError: a setting that cannot be, before anything is drawn.
        """
        sampling = Sampling(temperature, top_k, None)
        if not 1 <= completions <= self.settings.at_most:
            raise ValueError(f"1 to {self.settings.at_most} completions can be drawn at once, got {completions}")
        known = self.data.tokenizer.known_tokens(prompt_rows(0, rows, self.side))
        image = torch.full((completions,), chosen.index)
        keys = keyed.item_keys(keyed.item_keys(keyed.key(seed, "complete"), image), torch.arange(completions))
        device, n_ctx = self.net.wte.device, self.net.n_ctx
        given = self._tokens(chosen).expand(completions, -1).to(device)
        steps = generate_stream(self.net, keyed.uniform(keys, n_ctx).to(device), sampling, given=given, known=known)
        n_known, row = int(known.sum()), n_ctx // self.data.tokenizer.grid.rows
        for there in range(n_known, n_ctx + 1):
            if self.stopping.is_set() or not wanted():
                return
            with self.machine.autocast():  # of this thread: each row may be asked for by another
                tokens, settled = next(steps)
            if (there - n_known) % row == 0 or there == n_ctx:
                visible = known | (torch.arange(n_ctx) < settled)
                yield Drawing(self._shown(tokens, visible), there * self.side / n_ctx)

    def nearest(self, chosen: DemoImage, *, layer: int, k: int) -> Iterator[tuple[int, int] | list[DemoImage]]:
        """While the training images are read, how many of how many are; last, unless the demo ends, the k nearest.

        Raises:
            ValueError: a layer that is not there, or training images that cannot be read.
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
        """Ends what is being drawn and read, after its step."""
        self.stopping.set()
        self._reader.shutdown()

    def _tokens(self, chosen: DemoImage) -> torch.Tensor:
        return self.data.encode(torch.from_numpy(chosen.pixels[None]))

    def _shown(self, tokens: torch.Tensor, there: torch.Tensor) -> np.ndarray:
        pixels = self.data.decode(tokens.cpu())
        grid = self.data.tokenizer.visible_pixels(there).numpy()  # (R, R)
        return np.where(grid[None, :, :, None], pixels, np.uint8(HIDDEN))
