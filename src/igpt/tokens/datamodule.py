"""Batches of tokens: a source's pixels, encoded by a palette on the device that will read them."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from igpt import keyed
from igpt.data.cache import in_chunks
from igpt.data.decode import BadImageError
from igpt.data.order import BatchPlan, EndlessBatches, Item, OncePerImage, Positions
from igpt.data.source import Source, Split, Stream, plain_pixels
from igpt.stopping import deaf
from igpt.tokens.lookup import Encoder
from igpt.tokens.openai_npy import OpenAITokens
from igpt.tokens.palette import Palette
from igpt.tokens.raster import Raster


class Batch(NamedTuple):
    """What a step receives: the image as tokens, its label, and the key of everything random about it."""

    tokens: Tensor  # (B, T) int64; (B, R, R, 3) uint8 pixels until they reach the device
    labels: Tensor  # (B,) int64
    keys: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64, which image of its split (of its pass, in a stream)


class _Pixels(Dataset[Any]):
    """A split as a map-style dataset of whole batches, so that items need no collating."""

    def __init__(self, split: Split, *, seed: int, stream: str) -> None:
        self.split, self.seed, self.stream = split, seed, stream

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: Item) -> Batch | BadImageError:
        return self.__getitems__([item])

    def __getitems__(self, items: list[Item]) -> Batch | BadImageError:
        index = torch.tensor([item.image for item in items], dtype=torch.int64)
        epochs = torch.tensor([keyed.key(self.seed, self.stream, item.epoch) for item in items], dtype=torch.int64)
        keys = keyed.item_keys(epochs, index)  # (B,)
        try:
            pixels, labels = self.split.read(index.tolist(), keys.tolist())
        except BadImageError as error:  # as a value: raised here, a worker would wrap it in its own words
            return error
        return Batch(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels), keys, index)


class _Streamed(IterableDataset[Any]):
    """A stream as whole batches. Every process goes through all records and decodes those of its own batches."""

    def __init__(self, images: Stream, *, seed: int, positions: Positions) -> None:
        self.images, self.seed, self.positions = images, seed, positions

    def __iter__(self) -> Iterator[Batch | ValueError]:
        try:
            yield from self._batches()
        except ValueError as error:  # as a value, as above
            yield error

    def _batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        mine = self.positions.mine(worker.id, worker.num_workers) if worker else self.positions.mine(0, 1)
        first, size = next(mine), self.positions.plan.micro_batch
        waiting: list[Any] = []
        keys: list[int] = []
        rows: list[int] = []
        for position, (item, record) in enumerate(self._records()):
            if position < first:
                continue
            waiting.append(record)
            keys.append(item_key(self.seed, "train", item))
            rows.append(item.image)
            if len(waiting) == size:
                pixels, labels = self.images.read(waiting, keys)
                yield Batch(torch.from_numpy(pixels), torch.from_numpy(labels), torch.tensor(keys), torch.tensor(rows))
                waiting, keys, rows, first = [], [], [], next(mine)

    def _records(self) -> Iterator[tuple[Item, Any]]:
        for epoch in count():
            image = -1
            for image, record in enumerate(self.images.records(self.seed, epoch)):
                yield Item(epoch, image), record
            if image < 0:
                raise ValueError("the training stream holds no image")


def item_key(seed: int, stream: str, item: Item) -> int:
    """The key of everything random about one image in one pass over the data."""
    epoch_key = keyed.key(seed, stream, item.epoch)
    return int(keyed.item_keys(epoch_key, torch.tensor([item.image]))[0])


ONE_BY_ONE = BatchPlan(batch_size=1, micro_batch=1)  # for tasks that read images without a loader


def _whole(batch: Any) -> Any:
    """The batch as `__getitems__` made it: there is nothing left to collate."""
    return batch


class TokenDataModule(L.LightningDataModule):
    """Endless training batches, and one pass over `eval_split`; tokens are made on the device that reads them."""

    def __init__(
        self,
        *,
        source: Source,
        palette: Palette,
        raster: Raster,
        seed: int,
        num_workers: int,
        plan: BatchPlan = ONE_BY_ONE,
        eval_split: str = "val",
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        if isinstance(source, OpenAITokens) and source.palette.hash != palette.hash:
            raise ValueError(
                f"data={source.name}: its tokens were made with palette {source.palette.hash}, this run's is "
                f"{palette.hash}: tokens=openai tokens.path=… takes the one in data.clusters"
            )
        self.encoder = Encoder(palette, cache)
        self.source, self.palette, self.raster = source, palette, raster
        self.plan, self.seed, self.num_workers = plan, seed, num_workers
        self.eval_split = eval_split

    def train_dataloader(self) -> DataLoader[Any]:
        """An endless loader, its position set by the run's step: nothing about it is saved or restored."""
        first_step = self.trainer.global_step if self.trainer else 0
        images = self.source.training()
        if isinstance(images, Stream):
            positions = Positions(self.plan, first_step=first_step)
            return self._loader(
                _Streamed(images, seed=self.seed, positions=positions), batch_size=None, collate_fn=_whole
            )
        batches = EndlessBatches(len(images), plan=self.plan, seed=self.seed, first_step=first_step)
        return self._split_loader(images, batches, "train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Every image of `eval_split` exactly once. Raises ValueError when there is none."""
        split = self.source.split(self.eval_split)
        if not len(split):
            raise ValueError(
                f"{self.source.name} has no images in its {self.eval_split} split: "
                f"set data.{self.eval_split}_fraction above 0"
            )
        n, n_device = len(split), self.plan.n_device
        if n < n_device:
            raise ValueError(
                f"{self.source.name}: {n} images of {self.eval_split} cannot be read by {n_device} processes"
            )
        plan = self.plan
        if (n_device - 1) * plan.micro_batch >= n:  # the last process would have none, and leave the others waiting
            size = (n - 1) // (n_device - 1)
            plan = BatchPlan(n_device * size, size, n_device=n_device, rank=plan.rank)
        return self._split_loader(split, OncePerImage(n, plan=plan), self.eval_split)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same, for tasks that write something about every image."""
        return self.val_dataloader()

    def _split_loader(self, split: Split, batches: Iterable[list[Item]], stream: str) -> DataLoader[Any]:
        split.prepare()
        return self._loader(_Pixels(split, seed=self.seed, stream=stream), batch_sampler=batches, collate_fn=_whole)

    def _loader(self, images: Dataset[Any], **how: Any) -> DataLoader[Any]:
        return DataLoader(
            images,
            num_workers=self.num_workers,
            worker_init_fn=deaf,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            **how,
        )

    def on_after_batch_transfer(self, batch: Batch | ValueError, dataloader_idx: int = 0) -> Batch:
        if isinstance(batch, ValueError):
            raise batch
        return batch._replace(tokens=self.encode(batch.tokens))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to the token sequence the network reads: (B, R, R, 3) uint8 → (B, T) int64."""
        return self.raster.flatten(self.encoder(pixels))

    def some_tokens(self, name: str, *, at_most: int | None = None) -> Tensor:
        """A split as tokens on the CPU, in order: (N, T) int16; no more than `at_most` images, drawn by the seed."""
        return self.tokens_of(name, self.some_rows(name, at_most=at_most))

    def some_rows(self, name: str, *, at_most: int | None = None) -> np.ndarray:
        """Which images of a split `some_tokens` gives, (N,) ascending."""
        n = len(self.source.split(name))
        if at_most is None or at_most >= n:
            return np.arange(n)
        return np.sort(keyed.generator(self.seed, "some", at_most).permutation(n)[:at_most])

    def tokens_of(self, name: str, rows: np.ndarray) -> Tensor:
        """Some images of a split as tokens on the CPU, (N, T) int16."""
        split = self.source.split(name)
        split.prepare()
        tokens = torch.empty(len(rows), self.raster.n_ctx, dtype=torch.int16)
        start = 0
        for pixels in in_chunks(partial(plain_pixels, split), rows, f"reading {name}"):
            tokens[start : start + len(pixels)] = self.encode(torch.from_numpy(pixels)).to(torch.int16)
            start += len(pixels)
        return tokens

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Token sequences to pixels: (B, T) → (B, R, R, 3) uint8."""
        return decode(tokens, self.palette, self.raster)


def decode(tokens: Tensor, palette: Palette, raster: Raster) -> np.ndarray:
    """Token sequences to pixels: (B, T) → (B, R, R, 3) uint8."""
    return palette.decode(raster.unflatten(tokens))
