"""Every kind of cached file: damage anywhere is found at the first use, said, and made good, or else an error."""

import errno
import logging
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.data import cache
from igpt.data.digits import Digits
from igpt.probe.feature_files import FeatureWriter, read_features
from igpt.run.launch import run
from igpt.tokens import lookup
from igpt.tokens.kmeans import fit_cached
from igpt.tokens.lookup import LookupEncoder
from igpt.tokens.patches import PatchSettings
from igpt.utils import files
from tests.conftest import ROOT, run_killed
from tests.data.conftest import Shop, class_folders, parquet_shards
from tests.data.test_cache import ROWS, make
from tests.tokens.test_palette import random_palette

DIGITS: dict[str, Any] = {"val_fraction": 0.1, "test_fraction": 0.1, "split_seed": 0, "shift": 0, "shift_share": 0.0}
FIT: dict[str, Any] = {"n_pixels": 10**4, "iterations": 3, "restarts": 1, "seed": 0}


def load_pixels(place: Path) -> bytes:
    return cache.load_pixels(place / "cache" / "pixels" / "p.npy", ROWS[:100], 4, make).tobytes()


def find_corrupt_images(place: Path) -> bytes:
    """Two photographs, the second of which is cut."""
    folder = place / "photos"
    if not folder.is_dir():
        photo = class_folders(folder, ["cat"], 2) / "train" / "cat" / "1.jpg"
        photo.write_bytes(photo.read_bytes()[:300])
    split = Shop(place / "cache")(folder, val_fraction=0.0, on_corrupt="skip").split("train")
    return bytes(len(split))


def copy_parquet(place: Path) -> bytes:
    if not (place / "shards").is_dir():
        parquet_shards(place / "shards", [3, 2])
    split = Shop(place / "cache")(place / "shards", val_fraction=0.0).split("train")
    return split.read(range(5), [0] * 5).pixels.tobytes()


def fit_palette(place: Path) -> bytes:
    source = Digits(name="digits", resolution=8, **DIGITS)
    return fit_cached(source, place / "cache", k=8, **FIT).centres.tobytes()


def fit_patches(place: Path) -> bytes:
    settings = PatchSettings(patch=4, k=4, n_patches=500, iterations=3, order="raster", seed=0)
    return settings.build(Digits(name="digits", resolution=8, **DIGITS), place / "cache").centres.tobytes()


def build_colour_table(place: Path) -> bytes:
    return LookupEncoder(random_palette(2), place / "cache")._load_table().tobytes()


def compute_features(place: Path) -> bytes:
    path = place / "cache" / "features" / "f.npy"
    known = read_features(path, n_layer=1, n_image=7)
    if known is None:
        writer = FeatureWriter(path, n_image=7, dtype="float32")
        try:
            generator = torch.Generator().manual_seed(0)
            writer.add(torch.randn(2, 7, 3, generator=generator), torch.arange(7), torch.arange(7) % 3)
            writer.finish()
        finally:
            writer.discard()
        known = read_features(path, n_layer=1, n_image=7)
    assert known is not None
    return known.values.tobytes() + known.labels.tobytes()


Make = Callable[[Path], bytes]
REQUIRED: list[Make] = [load_pixels, find_corrupt_images, copy_parquet, fit_palette, fit_patches, compute_features]
KINDS = [*REQUIRED, build_colour_table]


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of colours is written without its three seconds of computation: zeros."""
    monkeypatch.setattr(lookup, "build_table", lambda palette: np.zeros(256**3, dtype=np.int16))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing has been checked yet."""
    monkeypatch.setattr(files, "_intact", set())


def cached_files(place: Path) -> dict[str, bytes]:
    paths = [path for path in (place / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): path.read_bytes() for path in paths}


def flip_bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def clear_page(content: bytearray, rng: random.Random) -> None:
    """A page of 4096 zeros; where that would change nothing, of ones."""
    start = rng.randrange(len(content)) & ~4095
    page = content[start : start + 4096]
    content[start : start + 4096] = (b"\1" if not any(page) else b"\0") * len(page)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def append(content: bytearray, rng: random.Random) -> None:
    content += rng.randbytes(100)


@pytest.mark.parametrize("make_cached", KINDS)
def test_damage_anywhere_is_found(
    make_cached: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: whatever happens to a file or to its checksum, what is read and what is stored is the same again."""
    rng = random.Random(make_cached.__name__)
    expected = make_cached(tmp_path)
    complete = cached_files(tmp_path)
    assert complete
    for name, damage in [(name, damage) for name in complete for damage in (flip_bit, clear_page, cut, append)]:
        if make_cached is build_colour_table and damage is not flip_bit:
            continue  # 32 MB
        content = bytearray(complete[name])
        damage(content, rng)
        written = os.stat(name).st_mtime_ns
        Path(name).write_bytes(content)
        os.utime(name, ns=(written, written))  # a bad disk does not change it
        forget(monkeypatch)
        caplog.clear()
        assert make_cached(tmp_path) == expected, (name, damage)
        assert cached_files(tmp_path) == complete, (name, damage)
        (message,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING][:1]
        assert "is made anew: it is damaged: its SHA-256" in message
        assert caplog.text.count("is made anew") == 1


@pytest.mark.parametrize("make_cached", REQUIRED)
def test_a_file_without_a_checksum(
    make_cached: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: files of older releases, which nothing vouches for, are made anew, said; then they have one."""
    expected = make_cached(tmp_path)
    complete = cached_files(tmp_path)
    for name in complete:
        if name.endswith(".sha256"):
            Path(name).unlink()
    forget(monkeypatch)
    assert make_cached(tmp_path) == expected
    assert cached_files(tmp_path) == complete
    assert "is made anew: it has no checksum, as those of older releases" in caplog.text


class ReadOnlyLock:
    """The lock file in a folder on a disk that is mounted read-only."""

    def __init__(self, path: str) -> None: ...

    def acquire(self, timeout: float = 0) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("make_cached", [make for make in KINDS if make is not compute_features])
def test_a_read_only_cache(make_cached: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: it is read without a lock; damaged, it is an error that says so, or the table is done without."""
    expected = make_cached(tmp_path)
    monkeypatch.setattr(cache, "FileLock", ReadOnlyLock)
    forget(monkeypatch)
    assert make_cached(tmp_path) == expected
    (name,) = [name for name in cached_files(tmp_path) if not name.endswith(".sha256")]
    Path(name).write_bytes(Path(name).read_bytes()[:-1])
    forget(monkeypatch)
    if make_cached is build_colour_table:
        assert make_cached(tmp_path) == expected
        return
    with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\): it is damaged: its SHA-256"):
        make_cached(tmp_path)


@pytest.mark.parametrize(
    ("make_cached", "number"),
    [(make, number) for make in REQUIRED for number in (errno.ENOSPC, errno.EIO)]
    + [(build_colour_table, errno.ENOSPC)],
)
def test_a_disk_that_refuses(
    make_cached: Make, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: an error in a line that names the file, or a warning where it only saves time; nothing is left."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        if make_cached is build_colour_table:
            make_cached(tmp_path)
            assert os.strerror(number) in caplog.text
        else:
            with pytest.raises(ValueError, match=rf"cannot be written \({os.strerror(number)}\)") as error:
                make_cached(tmp_path)
            assert "\n" not in str(error.value)
    assert cached_files(tmp_path) == {}
    assert make_cached(tmp_path)


@pytest.mark.parametrize("make_cached", REQUIRED)
def test_what_a_killed_process_left(make_cached: Make, tmp_path: Path) -> None:
    """Invariant: files of dead processes go when something is made beside them; those of live ones stay."""
    make_cached(tmp_path)
    for name in cached_files(tmp_path):
        Path(name).unlink()
    (folder,) = (tmp_path / "cache").iterdir()

    def begin() -> Any:
        unfinished = files.temporary_path(folder / "other.npy")
        return unfinished, unfinished.__enter__()

    run_killed(begin)
    assert len(list(folder.glob(".other.npy.*.part"))) == 1
    with files.temporary_path(folder / "mine.npy") as mine:
        make_cached(tmp_path)
        assert list(folder.glob(".*.part")) == [mine]


@pytest.mark.parametrize("make_cached", [load_pixels, pytest.param(compute_features, marks=pytest.mark.slow)])
def test_killed_at_each_operation(make_cached: Make, tmp_path: Path) -> None:
    """Invariant: whichever sync, rename or removal is the last, the next process reads the same and leaves no more."""
    expected = make_cached(tmp_path)
    complete = cached_files(tmp_path)
    for last in range(100):
        for name in complete:
            Path(name).unlink()

        def kill_at(function: str, done: list[str], last: int = last) -> None:
            call = getattr(os, function)

            def called(*arguments: Any, **how: Any) -> Any:
                done.append(function)
                if len(done) > last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **how)

            setattr(os, function, called)

        def make_and_be_killed() -> None:
            done: list[str] = []
            for function in ("fsync", "replace", "unlink"):
                kill_at(function, done)
            make_cached(tmp_path)
            (tmp_path / "finished").touch()

        run_killed(make_and_be_killed)
        files.remove_parts(tmp_path / "cache", "*/.*.part")  # as every run does at its start
        assert make_cached(tmp_path) == expected, last
        assert cached_files(tmp_path) == complete, last
        if (tmp_path / "finished").exists():
            break
    assert last >= 6


def test_training_on_a_damaged_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a page of zeros in the pixels, and damage to the palette, change no weight."""
    folder = class_folders(tmp_path / "photos", ["cat", "dog"], 10)

    def train(runs: str) -> bytes:
        forget(monkeypatch)
        _, run_dir = run(
            "task=pretrain", "data=folder", f"data.path={folder}", "data.resolution=8", "model=igpt_pico",
            "model.n_layer=1", "tokens.palette.k=8", "task.steps=2", "task.warmup_steps=1", "task.batch_size=4",
            "callbacks=none", "trainer=cpu", f"paths.runs={tmp_path / runs}", f"paths.cache={tmp_path / 'cache'}",
            conf=ROOT / "conf",
        )  # fmt: skip
        assert run_dir is not None
        return (run_dir / "model" / "model.safetensors").read_bytes()

    fresh = train("a")
    (pixels,) = (tmp_path / "cache" / "pixels").glob("*.npy")
    content = bytearray(pixels.read_bytes())
    content[128:3200] = bytes(3072)
    pixels.write_bytes(content)
    (palette,) = (tmp_path / "cache" / "palettes").glob("*.npy")
    np.save(palette, np.load(palette)[::-1])
    left = tmp_path / "cache" / "features" / ".x.npy.y.part"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"of a run that was killed after it wrote x.npy")
    assert train("b") == fresh
    assert not left.exists()


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a process reads each file once to check it; blocks are hashed apart. By hand: two blocks."""
    import hashlib

    path = tmp_path / "a"
    monkeypatch.setattr(files, "BLOCK", 4)
    with files.checksummed_path(path) as temporary:
        temporary.write_bytes(b"123456")
    digest = hashlib.sha256(hashlib.sha256(b"1234").digest() + hashlib.sha256(b"56").digest()).hexdigest()
    assert (tmp_path / "a.sha256").read_text() == f"{digest}\n"
    forget(monkeypatch)
    assert files.find_damage(path) is None
    monkeypatch.setattr(files, "hash_blocks", None)  # not called again
    assert files.find_damage(path) is None
    assert files.find_damage(tmp_path / "b") == "it is missing"
