"""Batches of tokens."""

import errno
import pickle
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from igpt.data.digits import Digits
from igpt.data.order import BatchPlan
from igpt.tokens.batches import Batch, StreamBatch
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.kmeans import fit_palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from tests.data.conftest import RANDOM_CROP, SETTINGS, Shop, class_folders, mixture, tar_shards
from tests.tokens.test_palette import random_palette

SOURCE = Digits(
    name="digits", resolution=8, val_fraction=0.1, test_fraction=0.1, split_seed=0, shift=1, shift_share=0.5
)
PALETTE = fit_palette(SOURCE.split("train").pixels, k=17, iterations=10, restarts=1, seed=0)


def trainer_at(step: int) -> Any:
    return SimpleNamespace(global_step=step, strategy=SimpleNamespace(root_device=torch.device("cpu")))


def module(micro_batch: int = 8, num_workers: int = 0, order: str = "raster") -> TokenDataModule:
    plan = BatchPlan(16, micro_batch)
    raster = PixelOrder.from_name(8, order)
    return TokenDataModule(
        source=SOURCE, tokenizer=PaletteTokenizer(PALETTE, raster), plan=plan, seed=3, num_workers=num_workers
    )


def first_images(data: TokenDataModule, n: int) -> Batch:
    batches, seen = [], 0
    for batch in data.train_dataloader():
        batches.append(data.on_after_batch_transfer(batch))
        seen += len(batch.rng_keys)
        if seen >= n:
            break
    return Batch(*(torch.cat(parts)[:n] for parts in zip(*batches, strict=True)))


@pytest.mark.parametrize(("micro_batch", "num_workers"), [(16, 0), (4, 0), (8, 2)])
def test_the_same_images_whatever_reads_them(micro_batch: int, num_workers: int) -> None:
    """Invariant: tokens, labels and keys do not depend on batch size or workers."""
    expected = first_images(module(), 64)
    for own, reference in zip(first_images(module(micro_batch, num_workers), 64), expected, strict=True):
        assert torch.equal(own, reference)


def test_workers_need_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a batch of a split or of a stream arrives as it was, where PyTorch can share none of its tensors."""

    def none(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr("torch.multiprocessing.reductions.reduce_storage", none)
    monkeypatch.setattr("torch.UntypedStorage._share_fd_cpu_", none)
    batch = next(iter(module().train_dataloader()))
    with pytest.raises(RuntimeError, match="unable to allocate"):
        ForkingPickler.dumps(batch.tokens)
    for result in (batch, StreamBatch(batch, 3, ("place", 7))):
        again = pickle.loads(ForkingPickler.dumps(result))
        assert type(again) is type(result)
        assert all(map(torch.equal, getattr(again, "batch", again), batch))
    assert again[1:] == (3, ("place", 7))
    loader = module(num_workers=1).train_dataloader()
    loader.timeout = 20  # seconds, after which it would wait for ever
    assert all(map(torch.equal, next(iter(loader)), batch))


def test_where_no_worker_can_be_started(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As where /dev/shm is read-only: the same batches, read in this process, which is said."""

    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "StreamBatch-only file system")

    expected = first_images(module(), 16)
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", none)
    assert all(map(torch.equal, first_images(module(num_workers=2), 16), expected))
    assert "images are read in this process, which is slower" in caplog.text


@pytest.mark.parametrize(
    ("val_fraction", "message"),
    [
        (0.0, "data: digits has no val images: what is learnt is measured on none (data.val_fraction"),
        (0.01, "data: digits has only 16 val images: what is measured on them is mostly noise"),
        (0.1, None),
    ],
)
def test_few_held_out_images_are_said_at_the_start(
    val_fraction: float, message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: 1 % of 1,617 digits is 16. Once, however many loaders are asked for."""
    source = Digits(
        name="digits", resolution=8, val_fraction=val_fraction, test_fraction=0.1, split_seed=0, shift=0, shift_share=0
    )
    data = TokenDataModule(
        source=source,
        tokenizer=PaletteTokenizer(PALETTE, PixelOrder.from_name(8, "raster")),
        plan=BatchPlan(4, 4),
        seed=0,
        num_workers=0,
    )
    data.train_dataloader()
    if val_fraction:
        data.val_dataloader()
    data.train_dataloader()
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == (message is not None)
    assert message is None or lines[0].startswith(message)


@pytest.mark.parametrize("order", ["raster", "random"])
def test_decode_undoes_encode(order: str) -> None:
    """Round trip: the digits' palette is exact, so the pixels come back."""
    data = module(order=order)
    pixels = SOURCE.split("val").pixels
    assert np.array_equal(data.decode(data.sample_tokens("val")), pixels)


@pytest.mark.parametrize(("n_device", "micro_batch"), [(2, 200), (3, 64), (8, 128), (2, 10)])
def test_no_process_is_left_without_an_image(n_device: int, micro_batch: int) -> None:
    """Invariant: 162 images over so many processes are all of them once, and every process has some."""
    seen = []
    for rank in range(n_device):
        plan = BatchPlan(n_device * micro_batch, micro_batch, n_device=n_device, rank=rank)
        data = TokenDataModule(
            source=SOURCE,
            tokenizer=PaletteTokenizer(PALETTE, PixelOrder.from_name(8, "raster")),
            plan=plan,
            seed=3,
            num_workers=0,
        )
        rows = [row for batch in data.val_dataloader() for row in batch.rows.tolist()]
        assert rows
        seen += rows
    assert sorted(seen) == list(range(len(SOURCE.split("val"))))


def test_an_empty_split() -> None:
    source = Digits(
        name="digits", resolution=8, val_fraction=0.0, test_fraction=0.1, split_seed=0, shift=1, shift_share=0.5
    )
    data = TokenDataModule(
        source=source,
        tokenizer=PaletteTokenizer(PALETTE, PixelOrder.from_name(8, "raster")),
        plan=BatchPlan(1, 1),
        seed=0,
        num_workers=0,
    )
    with pytest.raises(ValueError, match="no images in its val split"):
        data.val_dataloader()


def photograph_data(
    folder: Path, *, num_workers: int = 0, plan: BatchPlan | None = None, **changed: Any
) -> TokenDataModule:
    """Batches of 6 photographs, cropped at random, from a table or a stream of 15."""
    stream = {**SETTINGS["stream"], "num_readers": 4}  # as many whoever reads them
    source = Shop(folder.parent / "cache")(folder, **{"crop": RANDOM_CROP, "stream": stream, **changed})
    return TokenDataModule(
        source=source,
        tokenizer=PaletteTokenizer(random_palette(32), PixelOrder.from_name(8, "raster")),
        plan=plan or BatchPlan(6, 6),
        seed=3,
        num_workers=num_workers,
    )


def read(data: TokenDataModule, n_batch: int) -> list[Batch]:
    """The first batches; the loader ends its workers here, also after an error, not whenever memory is next tidied."""
    batches, items = iter(data.train_dataloader()), []
    try:
        for batch in islice(batches, n_batch):
            items.append(data.on_after_batch_transfer(batch))
    finally:
        del batches
    return items


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("workers") / "photos", ["a", "b"], 10)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [1, 4])
def test_the_same_batches_with_any_number_of_workers(photographs: Path, num_workers: int, streaming: bool) -> None:
    """Invariant: random crops and all, over three passes; each batch, not only their union."""
    expected = read(photograph_data(photographs, streaming=streaming), 8)
    given = read(photograph_data(photographs, streaming=streaming, num_workers=num_workers), 8)
    for own, reference in zip(given, expected, strict=True):
        assert all(map(torch.equal, own, reference))
    tokens = torch.cat([batch.tokens for batch in expected])
    assert len(tokens.unique(dim=0)) > 40  # 48 images, nearly all cut differently


@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_batches_on_two_ranks(photographs: Path, streaming: bool) -> None:
    """Invariant: the halves that two ranks read, put together, are what one reads (`test_ranks.py` has real ones)."""
    plans = [BatchPlan(6, 3, n_device=2, rank=rank) for rank in range(2)]
    read_by = [read(photograph_data(photographs, plan=plan, streaming=streaming), 8) for plan in plans]
    halves = read(photograph_data(photographs, plan=BatchPlan(6, 3), streaming=streaming), 16)
    for i, half in enumerate(halves):
        assert all(map(torch.equal, half, read_by[i % 2][i // 2]))


def test_it_starts_at_any_step(photographs: Path) -> None:
    """Invariant: starting at step 4, inside the second pass, continues what starting at 0 would have given."""
    later = photograph_data(photographs)
    later.trainer = trainer_at(4)
    expected = read(photograph_data(photographs), 8)[4:]
    assert all(map(torch.equal, joined(read(later, 4)), joined(expected)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_where_it_was_left(tmp_path: Path, num_workers: int) -> None:
    """Round trip: after any number of batches, with other workers and another number of devices than before."""

    def data(**how: Any) -> TokenDataModule:
        given = {"plan": BatchPlan(3, 3), "num_workers": num_workers, "seed": 3, **how}
        shards = mixture(tmp_path / "shards", num_readers=4)
        return TokenDataModule(
            source=shards, tokenizer=PaletteTokenizer(random_palette(32), PixelOrder.from_name(8, "raster")), **given
        )

    full = read(data(), 24)
    for n in (1, 6, 15):
        begun = data(num_workers=0)
        assert all(map(torch.equal, joined(read(begun, n)), joined(full[:n])))
        state = begun.state_dict()
        torch.save(state, tmp_path / "state.pt")
        resumed = data()
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert all(map(torch.equal, joined(read(resumed, 24 - n)), joined(full[n:])))
        halves = []
        for rank in range(2):
            half = data(plan=BatchPlan(6, 3, n_device=2, rank=rank))
            half.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            halves.append(read(half, 4))
        together = [batch for pair in zip(*halves, strict=True) for batch in pair]
        assert all(map(torch.equal, joined(together), joined(full[n : n + 8])))


def test_places_in_a_stream_that_is_not_there(tmp_path: Path) -> None:
    """Another number of shards, of devices that cannot share the readers, or a checkpoint that has no place."""

    def data(plan: BatchPlan) -> TokenDataModule:
        shards = mixture(tmp_path / "shards", num_readers=None)
        return TokenDataModule(
            source=shards,
            tokenizer=PaletteTokenizer(random_palette(32), PixelOrder.from_name(8, "raster")),
            plan=plan,
            seed=3,
            num_workers=0,
        )

    begun = data(BatchPlan(4, 1, n_device=2))
    read(begun, 2)
    state = begun.state_dict()
    three = data(BatchPlan(3, 1, n_device=3))
    three.load_state_dict(state)
    with pytest.raises(ValueError, match="3 devices cannot share the 2 readers"):
        three.train_dataloader()
    tar_shards(tmp_path / "shards" / "tar", [1, 1, 1, 1])
    more = data(BatchPlan(4, 1, n_device=2))
    more.load_state_dict(state)
    with pytest.raises(ValueError, match=r"it has web of 4 shard.*it had web of 3 shard"):
        more.train_dataloader()
    none = data(BatchPlan(1, 1))
    none.trainer = trainer_at(4)
    with pytest.raises(ValueError, match="holds no place in the stream"):
        none.train_dataloader()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_is_named_whoever_reads_it(tmp_path: Path, num_workers: int, streaming: bool) -> None:
    """Its message alone comes from a worker process."""
    root = class_folders(tmp_path / "photos", ["a", "b"], 10)
    (root / "train" / "b" / "4.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^/\S*b/4.jpg: its 7 bytes are no image"):
        read(photograph_data(root, num_workers=num_workers, val_fraction=0.0, streaming=streaming), 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_without_images_for_a_reader(tmp_path: Path, num_workers: int) -> None:
    """Found while reading, not before: one line, whichever process finds it."""
    root = class_folders(tmp_path / "photos", ["a"], 1)
    stream = {**SETTINGS["stream"], "num_readers": 2}
    data = photograph_data(root, num_workers=num_workers, streaming=True, n_class=1, val_fraction=0.0, stream=stream)
    with pytest.raises(
        ValueError, match=r"^the training stream holds no image for reader \d of 2: .*data.stream.num_readers\)$"
    ):
        read(data, 8)


def test_some_tokens_are_some_of_all(photographs: Path) -> None:
    """Invariant: in order, none twice."""
    data = photograph_data(photographs, crop=SETTINGS["crop"])
    full, some = data.sample_tokens("train"), data.sample_tokens("train", at_most=6)
    assert full.shape == (15, 64)
    places = [int((full == row).all(1).nonzero()[0]) for row in some]
    assert len(set(places)) == 6
    assert places == sorted(places)
