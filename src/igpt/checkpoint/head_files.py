"""Files of a trained class head beside its network: `model/head.safetensors` and its metadata, `model/head.json`."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from igpt.checkpoint.igpt_format import Weights, weights_sha256
from igpt.checkpoint.tensors import is_finite, read_safetensors
from igpt.model.head import ClassHead
from igpt.utils import files

log = logging.getLogger(__name__)

HEAD, ABOUT = "head.safetensors", "head.json"
LONGEST_NAME = 255  # characters of a class name, longer ones are cut; folder names are no longer
ANY = "any"  # instead of the labels' hash: heads in foreign formats do not record their labels


@dataclass(frozen=True)
class HeadMetadata:
    """Metadata of a class head: its training data and the weights it belongs to."""

    n_class: int
    data: str
    classes: str  # hash of the labels
    weights: str  # SHA-256 of the network's weights
    class_names: tuple[str, ...] | None = None  # by label; None: unknown
    eval_masks: int | None = None  # masks per image, combined by vote; None: not recorded
    seed: int | None = None  # of the masks and of the vote; None: not recorded


def save_head(folder: Path, weight: Tensor, about: HeadMetadata) -> None:
    """Writes both files into a run's `model/`, each atomically. Raises ValueError on NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise ValueError("the class head holds NaN or infinity: training had broken down, take an earlier one")
    with files.atomic_write(folder / HEAD) as file:
        file.write(save({"wclf": weight.detach().to("cpu").contiguous()}))
    names = shorten_class_names(about.class_names)
    record = asdict(about) | {"class_names": names, "sha256": files.sha256(folder / HEAD)}
    files.write_json(folder / ABOUT, {key: value for key, value in record.items() if value is not None})


def has_head(weights: Weights) -> bool:
    """Whether these weights include a class head or have one beside them."""
    return weights.wclf is not None or (weights.folder / ABOUT).is_file()


def shorten_class_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names, cut to `LONGEST_NAME` characters, as saved with a head."""
    return None if names is None else tuple(name[:LONGEST_NAME] for name in names)


def find_head(
    weights: Weights, *, n_class: int | None, classes: str, class_names: Sequence[str] | None
) -> ClassHead | None:
    """The class head trained with these weights; None if there is none.

    Raises:
        ValueError: a head of other weights, another number of classes, other labels or other class names (compared
            only if both head and data have names), or a damaged file.
    """
    if not has_head(weights):
        return None
    about, weight = read_head(weights)
    other = _describe_renamed_class(about.class_names, shorten_class_names(class_names))
    if about.n_class != n_class or about.classes not in (classes, ANY) or other:  # the hash includes the data's name
        raise ValueError(
            f"{weights.folder} has a head that tells {about.n_class} classes of {about.data} apart, the labels of this "
            f"data are not those{other}: evaluate it on the data it was trained for, leave it out "
            "(task.accuracy=false), or fine-tune anew"
        )
    if about.classes == ANY:
        log.warning(
            "%s does not say which labels its %d classes are: its accuracy is right only if they are this data's",
            weights.path, about.n_class,
        )  # fmt: skip
    return build_head(weight)


def build_head(weight: Tensor) -> ClassHead:
    """The class head of a weight (K, C)."""
    head = ClassHead(n_embd=weight.shape[1], n_class=weight.shape[0])
    head.load_state_dict({"wclf": weight.to(torch.float32)})
    return head


def copy_head(weights: Weights, folder: Path) -> None:
    """Copies the class head of some weights, if any, into `folder`, a folder with the same weights saved again."""
    if has_head(weights):
        about, weight = read_head(weights)
        save_head(folder, weight, replace(about, weights=weights_sha256(folder)))


def read_head(weights: Weights) -> tuple[HeadMetadata, Tensor]:
    """Metadata and weight (K, C) of a head. Raises ValueError if it belongs to other weights or is damaged."""
    if weights.wclf is not None:
        return HeadMetadata(weights.wclf.shape[0], weights.metadata.data, ANY, weights.sha256), weights.wclf.read()
    try:
        written = dict(files.read_json(weights.folder / ABOUT))
        sha256 = written.pop("sha256")
        about = _parse_metadata(written)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{weights.folder / ABOUT} is damaged ({str(error)!r:.200}): copy it again") from error
    where = weights.folder / HEAD
    if about.weights != weights.sha256:
        raise ValueError(f"{where} belongs to other weights than lie beside it: restore both from one run")
    try:
        if files.sha256(where) != sha256:
            raise ValueError(f"its SHA-256 is not that in {ABOUT}")
        (lazy,) = read_safetensors(where).values()
        if lazy.shape != (about.n_class, weights.metadata.network.n_embd):
            raise ValueError(f"its shape is {lazy.shape}")
        if not is_finite(weight := lazy.read()):
            raise ValueError("it holds NaN or infinity")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{where} is damaged ({error}): copy it again") from error
    return about, weight


def _parse_metadata(written: dict[str, Any]) -> HeadMetadata:
    """Parses `head.json`. Raises TypeError or ValueError on a missing or unknown field, or one of another type."""
    names = written.pop("class_names", None)  # missing in older files, and if unknown
    about = HeadMetadata(**written)
    texts, numbers = (about.data, about.classes, about.weights), (about.eval_masks, about.seed)
    is_number = type(about.n_class) is int and all(number is None or type(number) is int for number in numbers)
    if not is_number or not all(isinstance(text, str) for text in texts) or not 1 <= (about.eval_masks or 1) <= 10**4:
        raise ValueError("a field is of another kind")
    return replace(about, class_names=check_class_names(names, about.n_class))


def check_class_names(names: Any, n_class: int) -> tuple[str, ...] | None:
    """The class names as read from a file; None: unknown. Raises ValueError for anything but `n_class` short names."""
    if names is None:
        return None
    if not (isinstance(names, list) and all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in names)):
        raise ValueError(f"class_names is no list of names of at most {LONGEST_NAME} characters")
    if len(names) != n_class:
        raise ValueError(f"class_names has {len(names)} names, n_class is {n_class}")
    return tuple(names)


def _describe_renamed_class(of_head: tuple[str, ...] | None, of_data: tuple[str, ...] | None) -> str:
    """The first class with different names, in brackets; empty if names agree or are unknown."""
    if of_head is None or of_data is None:
        return ""
    pairs = enumerate(zip(of_head, of_data, strict=False))
    i = next((i for i, (own, expected) in pairs if own != expected), None)
    if i is None:
        return ""  # or another number of classes, which the caller's message tells
    how = "in another order: " if sorted(of_head) == sorted(of_data) else ""
    return f" ({how}class {i} is {of_head[i][:40]!r} to the head, {of_data[i][:40]!r} to the data)"
