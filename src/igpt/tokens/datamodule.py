"""Batches of tokens: a source's pixels, encoded by a palette on the device that will read them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from igpt import keyed
from igpt.data.order import BatchPlan, EndlessBatches, Item, OncePerImage
from igpt.data.source import Source, Split
from igpt.tokens.palette import Palette
from igpt.tokens.raster import Raster


class Batch(NamedTuple):
    """What a step receives: the image as tokens, its label, and the key of everything random about it."""

    tokens: Tensor  # (B, T) int64; (B, R, R, 3) uint8 pixels until they reach the device
    labels: Tensor  # (B,) int64
    keys: Tensor  # (B,) int64


class _Pixels(Dataset[Any]):
    """A split as a map-style dataset of whole batches, so that items need no collating."""

    def __init__(self, split: Split, *, seed: int, stream: str) -> None:
        self.split, self.seed, self.stream = split, seed, stream

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: Item) -> Batch:
        return self.__getitems__([item])

    def __getitems__(self, items: list[Item]) -> Batch:
        index = torch.tensor([item.image for item in items])
        epochs = torch.tensor([keyed.key(self.seed, self.stream, item.epoch) for item in items])
        keys = keyed.item_keys(epochs, index)  # (B,)
        pixels, labels = self.split.read(index.tolist(), keys.tolist())
        return Batch(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels), keys)


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
    ) -> None:
        super().__init__()
        self.source, self.palette, self.raster = source, palette, raster
        self.plan, self.seed, self.num_workers = plan, seed, num_workers
        self.eval_split = eval_split

    def train_dataloader(self) -> DataLoader[Any]:
        """An endless loader, its position set by the run's step: nothing about it is saved or restored."""
        first_step = self.trainer.global_step if self.trainer else 0
        split = self.source.split("train", augment=True)
        batches = EndlessBatches(len(split), plan=self.plan, seed=self.seed, first_step=first_step)
        return self._loader(split, batches, "train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Every image of `eval_split` exactly once. Raises ValueError when there is none."""
        split = self.source.split(self.eval_split)
        if not len(split):
            raise ValueError(
                f"{self.source.name} has no images in its {self.eval_split} split: "
                f"set data.{self.eval_split}_fraction above 0"
            )
        return self._loader(split, OncePerImage(len(split), plan=self.plan), self.eval_split)

    def _loader(self, split: Split, batches: Iterable[list[Item]], stream: str) -> DataLoader[Any]:
        return DataLoader(
            _Pixels(split, seed=self.seed, stream=stream),
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_whole,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        return batch._replace(tokens=self.encode(batch.tokens))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to the token sequence the network reads: (B, R, R, 3) uint8 → (B, T) int64."""
        return self.raster.flatten(self.palette.encode(pixels))

    def all_tokens(self, name: str) -> Tensor:
        """Every image of a split in order, as tokens on the CPU: (N, T) int64."""
        split = self.source.split(name)
        index = list(range(len(split)))
        return self.encode(torch.from_numpy(split.read(index, [0] * len(split)).pixels))

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Token sequences to pixels: (B, T) → (B, R, R, 3) uint8."""
        return decode(tokens, self.palette, self.raster)


def decode(tokens: Tensor, palette: Palette, raster: Raster) -> np.ndarray:
    """Token sequences to pixels: (B, T) → (B, R, R, 3) uint8."""
    return palette.decode(raster.unflatten(tokens))
