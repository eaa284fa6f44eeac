"""What a person does with a trained network: choose or bring an image, complete it, find what is like it."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from igpt import keyed
from igpt.app.nearest import Neighbour, TrainingFeatures
from igpt.data.classes import format_class_name
from igpt.data.crop import Crop
from igpt.data.decode import BadImageError, opened, read_image_file
from igpt.data.source import plain_pixels
from igpt.model.generate import Sampling, generate_stream
from igpt.model.gpt import GPT
from igpt.task.complete import HIDDEN, prompt_rows
from igpt.task.machine import Machine
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.tokenizer import whole_rows

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Chosen:
    """The image that a person works on."""

    pixels: np.ndarray  # (R, R, 3) uint8
    index: int  # of the held-out split; of an uploaded one, a number that its pixels decide
    name: str
    label: int = -1  # -1: it has none


@dataclass(frozen=True)
class Drawing:
    """Completions on the way."""

    pixels: np.ndarray  # (N, R, R, 3) uint8, grey where nothing is drawn yet
    rows: float  # as many pixels as so many rows have are there
    finished: bool


@dataclass(frozen=True)
class Uploads:
    """What an uploaded file may be."""

    crop: Crop
    max_bytes: int
    max_pixels: int

    def read(self, path: Path) -> np.ndarray:
        """The image in a file, cut out as the data's are for evaluation: (R, R, 3) uint8.

        It may be of every format that data may have (`igpt.data.decode.FORMATS`).

        Raises:
            ValueError: too many bytes or pixels, no image, one of another format, or a damaged one.
        """
        size = path.stat().st_size
        if size > self.max_bytes:
            raise ValueError(
                f"The file has {size / MEBIBYTE:.1f} MB, at most {self.max_bytes / MEBIBYTE:g} MB are taken."
            )
        try:
            data = read_image_file(path)
            image = opened(data)
            width, height = image.size
            if width * height > self.max_pixels:
                raise ValueError(
                    f"The image has {width:,}×{height:,} pixels, at most {self.max_pixels / 1e6:g} million are taken."
                )
            return self.crop(data, 0).copy()  # Pillow's own cannot be written on, of which PyTorch warns
        except BadImageError as error:
            raise ValueError(f"The file cannot be read as an image: {error}.") from error


class Workbench:
    """A network, the images it is shown, and what can be done with them. R is its resolution."""

    def __init__(
        self,
        *,
        net: GPT,
        machine: Machine,
        data: TokenDataModule,
        uploads: Uploads,
        training: TrainingFeatures,
        seed: int,
        split: str,
        at_most: int,
    ) -> None:
        self.net, self.machine, self.data = net, machine, data
        self.uploads, self.training, self.seed, self.at_most = uploads, training, seed, at_most
        self.split_name, self.split = split, data.source.split(split)
        if not len(self.split):
            raise ValueError(f"{data.source.name} has no images in its {split} split: choose another, task.split=…")
        self.stopping = threading.Event()
        self._order = keyed.generator(seed, "demo").permutation(len(self.split))

    @property
    def side(self) -> int:
        """R, pixels a side."""
        return self.data.tokenizer.side

    def class_name(self, label: int) -> str:
        """What is said of a label: its class by name, else its number; nothing where an image has none."""
        if label < 0:
            return ""
        names = self.data.source.class_names
        if names is None:
            return f"label\N{NO-BREAK SPACE}{label}"
        return f"class\N{NO-BREAK SPACE}{format_class_name(names[label])}"

    def choices(self, page: int, count: int) -> list[Chosen]:
        """`count` held-out images; the next page has the next ones, and after the last come the first again."""
        n = len(self.split)
        count = min(count, n)
        rows = [int(self._order[(page * count + i) % n]) for i in range(count)]
        pixels, labels = plain_pixels(self.split, rows), self.split.labels
        return [
            Chosen(image, row, f"{self.split_name} image {row}", int(labels[row]))
            for image, row in zip(pixels, rows, strict=True)
        ]

    def uploaded(self, path: Path) -> Chosen:
        """The image in an uploaded file. Raises ValueError, as `Uploads.read`."""
        pixels = self.uploads.read(path)
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=8).digest()
        return Chosen(pixels, int.from_bytes(digest, "little") >> 1, "your image")

    def quantised(self, chosen: Chosen) -> np.ndarray:
        """What the network is shown, the image as its tokens are decoded: (R, R, 3) uint8."""
        shown: np.ndarray = self.data.decode(self._tokens(chosen))[0]
        return shown

    def given(self, chosen: Chosen, rows: int) -> np.ndarray:
        """The same, grey where it is to be completed."""
        known = self.data.tokenizer.known_tokens(prompt_rows(0, rows, self.side))
        shown: np.ndarray = self._shown(self._tokens(chosen), known)[0]
        return shown

    def given_rows(self, rows: int) -> int:
        """How many of so many rows are given: fewer where a token shows several."""
        return whole_rows(self.data.tokenizer, prompt_rows(0, rows, self.side))

    def complete(
        self,
        chosen: Chosen,
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
        if not 1 <= completions <= self.at_most:
            raise ValueError(f"1 to {self.at_most} completions can be drawn at once, got {completions}")
        known = self.data.tokenizer.known_tokens(prompt_rows(0, rows, self.side))
        image = torch.full((completions,), chosen.index)
        keys = keyed.item_keys(keyed.item_keys(keyed.key(seed, "complete"), image), torch.arange(completions))
        device = self.net.wte.device
        uniforms = keyed.uniform(keys, self.net.n_ctx).to(device)
        given = self._tokens(chosen).expand(completions, -1).to(device)
        steps = generate_stream(self.net, uniforms, sampling, given=given, known=known)
        n_known, n_ctx = int(known.sum()), self.net.n_ctx
        for drawn in range(n_ctx - n_known + 1):
            if self.stopping.is_set() or not wanted():
                return
            with self.machine.autocast():  # of this thread: each row may be asked for by another
                tokens, settled = next(steps)
            if drawn % (n_ctx // self.data.tokenizer.grid.rows) == 0 or drawn == n_ctx - n_known:
                there = known | (torch.arange(n_ctx) < settled)
                rows_there = (n_known + drawn) * self.side / n_ctx
                yield Drawing(self._shown(tokens, there), rows_there, drawn == n_ctx - n_known)

    def nearest(self, chosen: Chosen, *, layer: int, k: int) -> Iterator[tuple[int, int] | list[Neighbour]]:
        """While the training images are read, how many of how many are; last, unless the demo ends, the k nearest.

        Raises:
            ValueError: a layer that is not there, or training images that cannot be read.
        """
        while not self.training.ready(wait=0.5):
            if self.stopping.is_set():
                return
            yield self.training.done, self.training.total
        yield self.training.find(self._tokens(chosen), layer=layer, k=k)

    def stop(self) -> None:
        """Ends what is being drawn and read, after its step."""
        self.stopping.set()
        self.training.stop()

    def _tokens(self, chosen: Chosen) -> torch.Tensor:
        return self.data.encode(torch.from_numpy(chosen.pixels[None]))

    def _shown(self, tokens: torch.Tensor, there: torch.Tensor) -> np.ndarray:
        pixels = self.data.decode(tokens.cpu())
        grid = self.data.tokenizer.visible_pixels(there).numpy()  # (R, R)
        return np.where(grid[None, :, :, None], pixels, np.uint8(HIDDEN))
