"""Features that another program, or `task=features`, has computed: a row for each image, in the order of our splits."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from igpt.checkpoint.tensors import first_line, read_safetensors

SPLITS = ("train", "val", "test")
ALL = "features"  # the rows of all splits in turn: a single .npy, or this tensor of a .safetensors
ROWS = 16_384  # checked at a time


def is_features(spec: str) -> bool:
    """Whether `task.encoder` names features: a .npy, a .safetensors, or a folder with a file of a split."""
    path = Path(spec)
    return path.suffix in (".npy", ".safetensors") or any(_find_split(path, split) for split in SPLITS)


def _find_split(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder: `train.npy`, or as `task=features` names it; None if there is none."""
    names = f"{split}.npy", f"features_{split}.npy", f"features_{split}.safetensors"
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_given_features(spec: str, counts: Mapping[str, int], splits: Sequence[str]) -> dict[str, np.ndarray]:
    """Features (N, D) of each of `splits`; those in .npy files are memory-mapped.

    `counts`: split → images, of train, val and test in this order.

    Raises:
        ValueError: no such file or split, a damaged file, another number of rows than there are images, other
            dimensions, several widths, or NaN or infinity.
    """
    where = f"task.encoder={spec}"
    try:
        arrays = _open_arrays(Path(spec))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{where} cannot be read ({first_line(error)})") from error
    if ALL in arrays and not arrays.keys() & counts.keys():
        full, images = arrays[ALL], list(counts.values())
        _check_shape(full, sum(images), where, f"{' + '.join(counts)} have {' + '.join(map(str, images))} =")
        arrays = dict(zip(counts, np.split(full, np.cumsum(images)[:-1]), strict=True))
    for split in splits:
        if split not in arrays:
            raise ValueError(f"{where} has no features of {split}: {split}.npy in the folder, or a tensor {split}")
        _check_shape(arrays[split], counts[split], f"{where}, {split}", f"{split} has")
        for start in range(0, counts[split], ROWS):
            _check_finite(arrays[split][start : start + ROWS], start, f"{where}, {split}")
    widths = {split: arrays[split].shape[1] for split in splits}
    if len({*widths.values()}) > 1:
        raise ValueError(f"{where}: features of several widths, {widths}: take those of one encoder")
    return {split: arrays[split] for split in splits}


def _open_arrays(path: Path) -> dict[str, np.ndarray]:
    """Split, or `ALL`, → array."""
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError("there is no such file")
        return {name: lazy.to_float32().read().numpy() for name, lazy in read_safetensors(path).items()}
    if path.suffix == ".npy":
        return {ALL: np.lib.format.open_memmap(path, mode="r")}
    named = {split: _find_split(path, split) for split in SPLITS}
    return {split: _open_split(file) for split, file in named.items() if file is not None}


def _open_split(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.lib.format.open_memmap(path, mode="r")
    tensors = read_safetensors(path, ignore="labels")
    if ALL not in tensors:
        raise ValueError(f"{path.name} has no tensor {ALL!r}")
    values: np.ndarray = tensors[ALL].read().numpy()
    return values


def _check_shape(array: np.ndarray, n_image: int, where: str, images: str) -> None:
    is_number = array.dtype.kind in "fiu" and array.dtype.isnative and array.dtype.itemsize <= 8
    if array.ndim != 2 or not is_number or not array.shape[1]:
        raise ValueError(
            f"{where}: {array.dtype} {array.shape}, expected numbers of shape (images, width), at most 64 bits each in "
            "this machine's byte order"
        )
    if len(array) != n_image:
        raise ValueError(f"{where}: {len(array):,} rows, but {images} {n_image:,} images: one row each, in their order")


def _check_finite(rows: np.ndarray, start: int, where: str) -> None:
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
        is_fine = np.isfinite(rows.astype(np.float32)).all(axis=1)
    if not is_fine.all():
        raise ValueError(f"{where}: row {start + int(is_fine.argmin()):,} holds NaN or infinity: compute it again")
