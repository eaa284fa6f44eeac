"""The cache of pixels: whole or not there, one builder at a time, made anew when it is not what is wanted."""

import errno
import multiprocessing as mp
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from igpt.data import cache
from igpt.data.image_decoding import BadImageError

ROWS = np.arange(0, 1300, 2)  # more than this process makes alone


def make(rows: Sequence[int]) -> np.ndarray:
    """Image r is r everywhere, in base 256."""
    r = np.asarray(rows)
    return np.broadcast_to(np.stack([r // 256, r % 256, r * 0], -1)[:, None, None], (len(r), 4, 4, 3)).astype(np.uint8)


def never(rows: Sequence[int]) -> np.ndarray:
    raise AssertionError("made again")


def test_it_is_made_once_by_several_processes(tmp_path: Path) -> None:
    """Round trip: every row in its place; the second time nothing is made."""
    result = cache.load_pixels(tmp_path / "p.npy", ROWS, 4, make)
    assert np.array_equal(result, make(ROWS.tolist()))
    assert np.array_equal(cache.load_pixels(tmp_path / "p.npy", ROWS, 4, never), result)


def test_half_built_and_damaged_files_are_made_anew(tmp_path: Path) -> None:
    """A kill leaves a .part file, a broken disk a short one: neither is read."""
    path = tmp_path / "p.npy"
    (tmp_path / ".p.npy.abc.part").write_bytes(b"half")
    full = np.array(cache.load_pixels(path, ROWS, 4, make))
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []
    path.write_bytes(path.read_bytes()[:5000])
    assert np.array_equal(cache.load_pixels(path, ROWS, 4, make), full)
    path.write_bytes(b"")
    assert np.array_equal(cache.load_pixels(path, ROWS, 4, make), full)
    assert len(cache.load_pixels(path, ROWS[:9], 4, make)) == 9  # another shape under the same name


def test_a_digest_tells_settings_apart() -> None:
    """Invariant: any setting, and the format, changes it; the order in which they are written does not."""
    first = cache.hash_cache_key({"filter": "box", "resolution": 8})
    assert first == cache.hash_cache_key({"resolution": 8, "filter": "box"})
    assert (
        len({first, cache.hash_cache_key({"filter": "box", "resolution": 9}), cache.hash_cache_key({"filter": "box"})})
        == 3
    )


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """The kernel refuses to write more than 10 kB to a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ValueError, match=r"p.npy cannot be written .*paths.cache="):
            cache.load_pixels(tmp_path / "p.npy", ROWS, 4, make)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["p.npy.lock"]
    assert len(cache.load_pixels(tmp_path / "p.npy", ROWS, 4, make)) == len(ROWS)


def test_it_is_made_where_no_process_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where /dev/shm is read-only: the kernel gives no semaphore, and the rows are made in this process."""

    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", none)
    assert np.array_equal(cache.load_pixels(tmp_path / "p.npy", ROWS, 4, make), make(ROWS.tolist()))
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "read in this process" in message
    assert "(Read-only file system)" in message
    assert "trainer.num_workers=0" in message


def bad_row(rows: Sequence[int]) -> np.ndarray:
    if 700 in rows:
        raise BadImageError("row 700 of made: no image")
    return make(rows)


def test_a_bad_image_ends_the_building_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match=r"^row 700 of made: no image$"):
        cache.load_pixels(tmp_path / "p.npy", ROWS, 4, bad_row)
    assert [p.name for p in tmp_path.iterdir()] == ["p.npy.lock"]


def slowly(rows: Sequence[int]) -> np.ndarray:
    with Path("made.txt").open("a") as file:
        file.write(f"{rows[0]}\n")
    return make(rows)


def build(place: str, path: str, answers: "mp.Queue[int]") -> None:
    import os

    os.chdir(place)
    answers.put(int(cache.load_pixels(Path(path), ROWS[:300], 4, slowly).sum()))


def test_two_processes_that_build_it_at_once(tmp_path: Path) -> None:
    """Invariant: both read the same pixels, and each image was made once."""
    context = mp.get_context("fork")
    answers: mp.Queue[int] = context.Queue()
    both = [context.Process(target=build, args=(str(tmp_path), "p.npy", answers), daemon=True) for _ in range(2)]
    for process in both:
        process.start()
    sums = [answers.get(timeout=30) for _ in both]
    for process in both:
        process.join(30)
    assert sums == [int(make(ROWS[:300].tolist()).sum())] * 2
    starts = (tmp_path / "made.txt").read_text().split()
    assert len(starts) == len(set(starts)) == 5  # ⌈300 / 64⌉ chunks
