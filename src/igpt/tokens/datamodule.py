"""The LightningDataModules: batches of pixels from a source; the same, tokenized on the model's device."""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from igpt.data.cache import map_chunks
from igpt.data.order import BatchPlan, EvalBatchSampler, InfiniteBatchSampler, Item, ReaderSchedule
from igpt.data.source import JoinedSplit, Source, Split, Stream, plain_pixels
from igpt.data.workers import identity_collate, startable_workers
from igpt.distributed import ranks
from igpt.distributed.signals import ignore_signals
from igpt.tokens.batches import Batch, PixelBatches, StreamBatch, StreamBatches, StreamState
from igpt.tokens.openai_npy import OpenAITokens
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.tokenizer import Tokenizer, token_dtype
from igpt.utils import keyed

log = logging.getLogger(__name__)

FEW = 30  # images; with so many, the standard error of 90 % accuracy is 5 points
ONE_BY_ONE = BatchPlan(batch_size=1, micro_batch=1)  # for tasks without a loader


class PixelDataModule(L.LightningDataModule):
    """Infinite training batches and one pass over `eval_split`: the `tokens` of a batch are pixels, uint8.

    `with_val`: trains on the images of train and val. `augment` false: on the images as in evaluation.
    """

    def __init__(
        self,
        *,
        source: Source,
        seed: int,
        num_workers: int,
        plan: BatchPlan = ONE_BY_ONE,
        eval_split: str = "val",
        with_val: bool = False,
        augment: bool = True,
    ) -> None:
        super().__init__()
        self.source, self.plan, self.seed, self.num_workers = source, plan, seed, num_workers
        self.eval_split, self.with_val, self.augment = eval_split, with_val, augment
        self.stream: StreamState | None = None
        self._warned: set[str] = set()  # splits already warned of

    @property
    def device(self) -> torch.device:
        """The device of the trainer that this is attached to, else the CPU."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def count_images(self, *, val_every: int) -> tuple[int | str, int]:
        """Images to train on ("a stream", of which none are counted) and to validate on, every `val_every` steps.

        Raises:
            ValueError: there are none to validate on.
        """
        n_val, images = len(self.source.split("val")), self.source.training()
        if val_every and not n_val:
            raise ValueError("there is nothing to validate on: set task.val_every=0, or data.val_fraction above 0")
        return "a stream" if isinstance(images, Stream) else len(images), n_val

    def train_dataloader(self) -> DataLoader[Any]:
        """An infinite loader that starts at the trainer's step; for a stream, at the position in the checkpoint."""
        first_step = self.trainer.global_step if self.trainer else 0
        images = self.training_images()
        if isinstance(images, Stream):  # held-out images of a stream are not counted here: that would read them
            return self._stream_loader(images, first_step)
        self._warn_of_few("val")
        batches = InfiniteBatchSampler(len(images), plan=self.plan, seed=self.seed, first_step=first_step)
        return self._split_loader(images, batches, "train")

    def training_images(self) -> Split | Stream:
        """The images of training batches.

        Raises:
            ValueError: a stream, with `with_val` or without `augment`.
        """
        images = self.source.training(with_val=True) if self.with_val else self.source.training()
        if self.augment:
            return images
        if isinstance(images, Stream):
            raise ValueError(
                "the images of a stream come in training crops alone: task.sgd.augment=true, or data.streaming=false"
            )
        train = self.source.split("train")
        return JoinedSplit(train, self.source.split("val")) if self.with_val else train

    def _stream_loader(self, images: Stream, first_step: int) -> DataLoader[Any]:
        if self.stream is None:
            if first_step:
                raise ValueError("the checkpoint holds no place in the stream: its run read something else (data)")
            readers = self.plan.n_device * max(1, self.num_workers)
            self.stream = StreamState.start(images, images.num_readers or readers)
        self.stream.check(images)
        schedule = ReaderSchedule(self.plan, self.stream.count, self.stream.next)
        n_worker = schedule.usable_workers(self.num_workers)
        if n_worker < self.num_workers:
            message = "data: %d readers of the stream (data.stream.num_readers) are read by %d worker(s) on each device"
            log.info(message, schedule.count, n_worker)
        for name, n_shard in images.contents.items():
            if n_shard < schedule.count:
                message = "data: %s has %d shard(s) for %d readers: several read one shard and share its images"
                log.info(message, name, n_shard, schedule.count)
        batches = StreamBatches(images, seed=self.seed, schedule=schedule, states=self.stream.states)
        return self._loader(batches, n_worker, batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream over all ranks; empty for a source with random access."""
        return {} if self.stream is None else {"stream": self.stream.gather()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stream = StreamState.from_dict(state_dict["stream"])

    def val_dataloader(self) -> DataLoader[Any]:
        """A loader of every image of `eval_split` exactly once. Raises ValueError if the split is empty."""
        split = self.source.split(self.eval_split)
        if not len(split):
            raise ValueError(
                f"{self.source.name} has no images in its {self.eval_split} split: "
                f"set data.{self.eval_split}_fraction above 0"
            )
        self._warn_of_few(self.eval_split)
        return self.eval_loader(split, self.eval_split)

    def eval_loader(self, split: Split, stream: str) -> DataLoader[Any]:
        """A loader of every image of a split exactly once, their keys drawn for the random stream of that name."""
        n, n_device = len(split), self.plan.n_device
        plan = self.plan
        if (n_device - 1) * plan.micro_batch >= n:  # else the last rank would get no image
            size = max(1, (n - 1) // (n_device - 1))
            plan = BatchPlan(n_device * size, size, n_device=n_device, rank=plan.rank)
        return self._split_loader(split, EvalBatchSampler(n, plan=plan), stream)

    def _warn_of_few(self, name: str) -> None:
        """Warns, once per split, if it is empty or too small for a measurement."""
        n = len(self.source.split(name))
        if n < FEW and name not in self._warned:
            self._warned.add(name)
            few, none = "what is measured on them is mostly noise", "what is learnt is measured on none"
            what = f"only {n} {name} images: {few}" if n else f"no {name} images: {none}"
            message = "data: %s has %s (data.%s_fraction of the training images, or a split)"
            log.warning(message, self.source.name, what, name)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The validation loader, for tasks that write a record per image."""
        return self.val_dataloader()

    def _split_loader(self, split: Split, batches: Iterable[list[Item]], stream: str) -> DataLoader[Any]:
        split.prepare()
        ranks.barrier()  # it may take long on one machine; Lightning's own barrier, the next, does not wait for long
        return self._loader(PixelBatches(split, seed=self.seed, stream=stream), batch_sampler=batches)

    def _loader(self, images: Dataset[Any], n_worker: int | None = None, **how: Any) -> DataLoader[Any]:
        n_worker = startable_workers(self.num_workers if n_worker is None else n_worker)
        return DataLoader(
            images,
            num_workers=n_worker,
            collate_fn=identity_collate,
            worker_init_fn=ignore_signals,
            pin_memory=self.device.type == "cuda",
            persistent_workers=n_worker > 0,
            **how,
        )

    def on_after_batch_transfer(self, batch: Batch | StreamBatch, dataloader_idx: int = 0) -> Batch:
        if isinstance(batch, StreamBatch):
            assert self.stream is not None
            self.stream.record_read(batch.reader, batch.state, self.plan.n_device)
            batch = batch.batch
        return batch

    def sample_rows(self, name: str, *, at_most: int | None = None) -> np.ndarray:
        """Indices of all images of a split, or of `at_most`, sampled by seed: (N,) ascending."""
        n = len(self.source.split(name))
        if at_most is None or at_most >= n:
            return np.arange(n)
        return np.sort(keyed.generator(self.seed, "some", at_most).permutation(n)[:at_most])


class TokenDataModule(PixelDataModule):
    """The batches of `PixelDataModule`, tokenized after the transfer to the device."""

    def __init__(self, *, source: Source, tokenizer: Tokenizer, cache: Path | None = None, **how: Any) -> None:
        palette = (
            tokenizer.palette.hash if isinstance(tokenizer, PaletteTokenizer) and tokenizer.kind == "palette" else None
        )
        if isinstance(source, OpenAITokens) and source.palette.hash != palette:
            raise ValueError(
                f"data={source.name}: its tokens were made with palette {source.palette.hash}, this run's are "
                f"{tokenizer.describe()} ({tokenizer.hash}): tokens=openai tokens.path=… takes those in data.clusters"
            )
        super().__init__(source=source, **how)
        self.tokenizer, self._encoder = tokenizer, tokenizer.encoder(cache)

    def on_after_batch_transfer(self, batch: Batch | StreamBatch, dataloader_idx: int = 0) -> Batch:
        of_pixels = super().on_after_batch_transfer(batch, dataloader_idx)
        return of_pixels._replace(tokens=self.encode(of_pixels.tokens))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to token sequences: (B, R, R, 3) uint8 → (B, T) int64."""
        return self._encoder(pixels)

    def sample_tokens(self, name: str, *, at_most: int | None = None) -> Tensor:
        """The images at `sample_rows` of a split as tokens on the CPU, (N, T) of `token_dtype`."""
        return self.encode_rows(name, self.sample_rows(name, at_most=at_most))

    def encode_rows(self, name: str, rows: np.ndarray) -> Tensor:
        """The images at `rows` of a split as tokens on the CPU, (N, T) of `token_dtype`.

        They are encoded on the device of the trainer that this is attached to.
        """
        split = self.source.split(name)
        split.prepare()
        dtype = token_dtype(self.tokenizer.n_vocab)
        tokens = torch.empty(len(rows), self.tokenizer.grid.n_ctx, dtype=dtype)
        start = 0
        for pixels in map_chunks(partial(plain_pixels, split), rows, f"reading {name}"):
            tokens[start : start + len(pixels)] = self.encode(torch.from_numpy(pixels).to(self.device)).to(dtype)
            start += len(pixels)
        return tokens

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Token sequences to pixels: (B, T) → (B, R, R, 3) uint8."""
        return self.tokenizer.decode(tokens)
