"""Images in tar files and parquet tables: what they claim, name and lead to."""

import os
import resource
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpt.data.image_decoding import BadImageError
from igpt.data.shards import BadShardError
from tests.data.conftest import Shop, encoded, photo
from tests.data.local_files import add, cells, everything, png, write, write_tar


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_in_cells_lead_nowhere_else(images: Shop, tmp_path: Path, streaming: bool) -> None:
    """A private picture, a device and a pipe that cells name are not opened; a file below the folder is."""
    private = write(tmp_path / "private.png", seed=1)
    root = tmp_path / "data"
    write(root / "mine.png", seed=2)
    os.mkfifo(root / "pipe.png")
    (root / "out.png").symlink_to(private)
    bad = [str(private), "../private.png", "/dev/zero", "pipe.png", "out.png", "a/../../private.png", "x\0y"]
    for i, cell in enumerate([*bad, "mine.png"]):
        cells(root / f"train-{i}.parquet", [cell])
    source = images(root, val_fraction=0.0, on_corrupt="skip", streaming=streaming)
    split = source.split("train")
    assert len(split) == 1
    assert np.array_equal(split.read([0], [0]).pixels[0], np.asarray(photo(2, 8, 8)))
    with pytest.raises(BadImageError, match=r"names the file '.*private\.png', which is no file below"):
        strict = images(cells(tmp_path / "one" / "x.parquet", [str(private)]), val_fraction=0.0, streaming=streaming)
        strict.split("train").read([0], [0])


@pytest.fixture
def bounded_memory() -> Any:
    """Two gigabytes more than now, for this process: asking for more is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc to bound this process's memory")
@pytest.mark.parametrize("streaming", [False, True])
def test_tar_members_that_claim_much(images: Shop, tmp_path: Path, streaming: bool, bounded_memory: Any) -> None:
    """A sparse member of 20 GB, a `.gz`, a header that claims 3 GB: good images beside them are read."""
    sparse = tarfile.TarInfo("1.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    head = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    head[483:495] = b"\x80" + (20_000_000_000).to_bytes(11, "big")  # the size it has unpacked
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.png", encoded(photo(0, 8, 8), "PNG"))
        tar.fileobj.write(bytes(head))
        tar.offset += len(head)
        add(tar, "2.jpg.gz", b"\x1f\x8b" + bytes(1000))
        add(tar, "3.png", encoded(photo(3, 8, 8), "PNG"))
    settings = {"val_fraction": 0.0, "image_column": ["png", "jpg"], "streaming": streaming}
    split = images(tmp_path / "a.tar", on_corrupt="skip", **settings).split("train")
    found = {pixels.tobytes() for pixels in split.read(range(len(split)), [0] * len(split)).pixels}
    assert found == {np.asarray(photo(seed, 8, 8)).tobytes() for seed in (0, 3)}

    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    with (tmp_path / "b.tar").open("wb") as file:
        file.write(long.tobuf(tarfile.GNU_FORMAT))
        file.truncate(4 << 30)  # a hole: nothing of it lies on the disk
    with pytest.raises(BadShardError, match="a header claims 3,221,225,472 bytes"):
        images(tmp_path / "b.tar", **settings).split("train")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc to bound this process's memory")
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_that_unpacks_to_much(images: Shop, tmp_path: Path, streaming: bool, bounded_memory: Any) -> None:
    """Some kB whose 2,000 cells share 8 MB of one dictionary: never all at once in memory, and not all on the disk."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([bytes(8 << 20)]))
    pq.write_table(
        pa.table({"image": column}), tmp_path / "x.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 20
    message = "no image" if streaming else "unpacks to more than 100 times its size"
    with pytest.raises(ValueError, match=message):
        images(tmp_path / "x.parquet", val_fraction=0.0, streaming=streaming).split("train")


@pytest.mark.parametrize("streaming", [False, True])
def test_every_image_of_a_tar_file(
    images: Shop, tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Every format by its ending; labels also where a Mac has put its own files between; links are bad images."""
    members: list[tuple[str, bytes | str]] = []
    for i, ending in enumerate(("png", "bmp", "tif", "webp")):
        of_format = {"webp": {"lossless": True}}.get(ending, {})
        content = encoded(photo(i, 8, 8), {"tif": "TIFF"}.get(ending, ending.upper()), **of_format)
        members += [(f"._{i}.{ending}", b"mac"), (f"{i}.{ending}", content), (f"._{i}.cls", b"mac"), (f"{i}.cls", b"1")]
    path = write_tar(tmp_path / "a.tar", [*members, ("5.heic", b"?"), ("5.cls", b"0")])
    how: dict[str, Any] = {"val_fraction": 0.0, "streaming": streaming, "image_column": ["image", "png"]}
    split = images(path, label_column=["cls"], n_class=2, **how).split("train")
    found = {pixels.tobytes() for pixels in split.read(range(len(split)), [0] * len(split)).pixels}
    assert found == {np.asarray(photo(seed, 8, 8)).tobytes() for seed in range(4)}
    assert split.labels.tolist() == [1] * 4
    if not streaming:
        assert "1 .heic" in caplog.text
    links = write_tar(tmp_path / "links.tar", [("0.png", png(0)), ("1h.png", "0.png"), ("2.png", "/etc/hostname")])
    assert len(images(links, on_corrupt="skip", **how).split("train")) == 1
    with pytest.raises(BadImageError, match=r"(1h|2)\.png in .*: it is a link"):
        split = images(links, **how).split("train")
        split.read([1], [0])


def test_images_that_cells_name_are_read_anew(images: Shop, tmp_path: Path) -> None:
    """Invariant: other images under the same names are other pixels, also from the cache."""
    write(tmp_path / "images" / "0.png", seed=1)
    cells(tmp_path / "x.parquet", ["images/0.png"])
    for seed in (1, 2):
        write(tmp_path / "images" / "0.png", seed=seed)
        split = images(tmp_path, val_fraction=0.0).split("train")
        split.prepare()
        assert np.array_equal(split.read([0], [0]).pixels[0], np.asarray(photo(seed, 8, 8)))


def test_a_tar_file_that_ends_early(images: Shop, tmp_path: Path) -> None:
    """As a table, too, `skip` keeps what comes before the damage."""
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(3)])
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(BadShardError, match=r"a\.tar cannot be read after 1 images.*on_corrupt=skip"):
        images(path, val_fraction=0.0)
    assert everything(images(path, val_fraction=0.0, on_corrupt="skip"))["train"] == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_too_large(images: Shop, tmp_path: Path, streaming: bool) -> None:
    """One line that names the file, whatever holds them."""
    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"9" * 20)])
    pq.write_table(pa.table({"image": [png(0)], "label": pa.array([2**63 + 1], pa.uint64())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": [{"bytes": "text", "path": None}], "label": [0]}), tmp_path / "c.parquet")
    for name, message in (("a.tar", r"a\.tar .*0\.cls holds '9+'"), ("b.parquet", r"b\.parquet: row 0 has the label"),
                          ("c.parquet", "expected images")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            source = images(tmp_path / name, val_fraction=0.0, streaming=streaming, label_column=["label", "cls"],
                            image_column=["image", "png"], n_class=2)  # fmt: skip
            source.split("train")
