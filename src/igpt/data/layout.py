"""Splits and classes from file names: the first folders below the data path. Ambiguous names are errors."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SPLIT_NAMES = {  # folder → split
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD_OF_SEVERAL = re.compile(r"(?P<split>\w[\w.-]*?)-\d+-of-\d+")  # the Hub's file names
_NUMBERED = re.compile(r"(?P<split>[^\W\d_]+)(?:[-_.]?\d[-\d_.]*)?")


@dataclass(frozen=True)
class Splits:
    """File indices by split, and the number of leading folders that name the split."""

    files: dict[str, list[int]]
    unread: list[int]  # indices of files in no split
    depth: int  # leading folders that name the split: 1 or 0


def split_images(names: Sequence[str], *, named: Sequence[str], layout: str, where: str) -> Splits:
    """Assigns image files to splits by their first folder: train/…, val/…, test/…; without such folders, all to train.

    `named`: split names from the settings, accepted as they are.

    Raises:
        ValueError: split folders and other folders side by side.
    """
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    splits = _assign_splits(folders, named, where) if layout != "classes" else {}
    if not splits:
        if layout != "classes":
            _check_deeper(names, named, where)
        return Splits({"train": list(range(len(names)))}, [], 0)
    others = [folder for folder in folders if folder not in splits]
    is_split = any(folder not in SPLIT_NAMES and folder.lower() not in SPLIT_NAMES for folder in splits)
    if others and layout == "auto" and not is_split:
        raise ValueError(
            f"{where}: {next(iter(splits))}/ is called as a split, {others[0]}/ beside it is not: "
            "data.layout=classes if all of them are classes, data.layout=splits to read only the splits"
        )
    files: dict[str, list[int]] = {split: [] for split in splits.values()}
    unread: list[int] = []
    for i, name in enumerate(names):
        folder, slash, _ = name.partition("/")
        (files[splits[folder]] if slash and folder in splits else unread).append(i)
    return Splits(files, unread, 1)


def split_shards(names: Sequence[str], *, named: Sequence[str], layout: str, where: str) -> Splits:
    """Assigns parquet or tar files to splits: by the first folder as for images, else by the start of the file name.

    `train-00000-of-00005`, `train-3`, `train_3` and `train` belong to train; without any split name, all files do.

    Raises:
        ValueError: a split name elsewhere in a file name, or only some files with a split name.
    """
    by_folder = split_images(names, named=named, layout=layout, where=where)
    if by_folder.depth or layout == "classes":
        return by_folder
    stems = [name.rpartition("/")[2].rpartition(".")[0] for name in names]
    files: dict[str, list[int]] = {}
    unclear, rest = [], []
    for i, stem in enumerate(stems):
        match = _SHARD_OF_SEVERAL.fullmatch(stem)
        numbered = _NUMBERED.fullmatch(stem)
        split = match and (_split_name(match["split"], named) or match["split"])
        split = split or (_split_name(numbered["split"], named) if numbered else None)
        if split is not None:
            files.setdefault(split, []).append(i)
            continue
        rest.append(i)
        if any(_split_name(word, named) for word in re.split(r"[\W_]+", stem)):
            unclear.append(names[i])
    split_names = {*SPLIT_NAMES.values(), *named}
    if len(names) > 1 and (unclear or (rest and split_names & set(files))):
        raise ValueError(
            f"{where}: it is not clear of which split {(unclear or [names[rest[0]]])[0]} is: name all as train-0, "
            "test-0, …, put them into folders train/, val/, test/, or read all as training images, data.layout=classes"
        )
    if not split_names & set(files) and len(files) < 2:
        return Splits({"train": list(range(len(names)))}, [], 0)
    return Splits(files, rest, 0)


def class_folder(name: str, depth: int) -> str | None:
    """The class of an image file: its first folder below the split folder; None without one."""
    parts = name.split("/", depth + 1)
    return parts[depth] if len(parts) > depth + 1 else None


def is_nested(name: str, depth: int) -> bool:
    """Whether an image lies in a folder below its class folder."""
    return name.count("/") > depth + 1


def _split_name(folder: str, named: Sequence[str]) -> str | None:
    return folder if folder in named else SPLIT_NAMES.get(folder.lower())


def _assign_splits(folders: Sequence[str], named: Sequence[str], where: str) -> dict[str, str]:
    """Folder → split, for folders with a split name. Raises ValueError if two folders name the same split."""
    splits: dict[str, str] = {}
    for folder in folders:
        if (split := _split_name(folder, named)) is None:
            continue
        same = next((other for other, first in splits.items() if first == split), None)
        if same is not None:
            raise ValueError(
                f"{where}: {same}/ and {folder}/ are both the split {split}: put them together, or name the one to "
                f"read, data.splits.{'val' if split == 'validation' else split}=[{folder}]"
            )
        splits[folder] = split
    return splits


def _check_deeper(names: Sequence[str], named: Sequence[str], where: str) -> None:
    """Raises ValueError if a folder below the first level has a split name."""
    for folder in {name.rpartition("/")[0]: None for name in names}:
        first, *deeper = folder.split("/")
        for part in deeper:
            if _split_name(part, named):
                raise ValueError(
                    f"{where}: a folder called {part}/ lies below {first}/, and splits are the first folders: "
                    f"data.path={where}/{first}, or data.layout=classes if it is no split"
                )
