"""Image files, tables and archives as tests write them; counts and labels as they are read."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from igpt.data.images import Images
from tests.data.conftest import encoded, photo


def everything(source: Images) -> dict[str, int]:
    return {name: len(source.split(name)) for name in ("train", "val", "test")}


def labels(source: Images, split: str = "train") -> list[int]:
    return source.split(split).labels.tolist()


def write(path: Path, *, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, 8, 8).save(path)
    return path


def cells(path: Path, of: Sequence[Any]) -> Path:
    """A parquet file whose images are other files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": None, "path": cell} for cell in of]}), path)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, members: Sequence[tuple[str, bytes | str]]) -> Path:
    """A tar file of these members; a text is where a link leads."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            if isinstance(content, bytes):
                add(tar, name, content)
                continue
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE if name.endswith("h.png") else tarfile.SYMTYPE, content
            tar.addfile(link)
    return path


def png(seed: int) -> bytes:
    return encoded(photo(seed, 8, 8), "PNG")
