"""Settings of the data: splits, crops, augmentation, streams (`conf/data/`)."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from igpt.settings.fields import Count, Settings

Resolution = Annotated[int, Field(ge=1, le=4096)]  # R, pixels a side
Pixels = Annotated[int, Field(ge=1, le=65536)]  # a length
Fraction = Annotated[float, Field(ge=0, lt=1)]  # of the images, held out
LabelsPerClass = Count | None  # None: all
Layout = Literal["auto", "splits", "classes"]  # meaning of the folders directly below data.path
Resize = Literal["once", "twice"]

OWN = "folder"  # data.name of images that only their path names
PACKED = re.compile(r"(\.(tar|tgz|gz|zip|parquet))+$")


def name_dataset(data: Mapping[str, Any]) -> str:
    """The dataset's name; of own images that of the folder, file or Hub dataset at `path`, in letters, digits and _."""
    name, path = str(data.get("name")), data.get("path")
    if name != OWN or path is None:
        return name
    text = str(path).partition("?")[0]
    parts = (text if "://" in text else os.path.abspath(os.path.expanduser(text))).split("/")
    for part in reversed(parts):
        text = PACKED.sub("", re.split(r"[{*\[]", part)[0])
        if own := re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:40]:
            return f"{OWN}_{own}" if own.isdigit() else own
    return name


def name_images(data: Mapping[str, Any]) -> str:
    """Dataset and resolution, with a hyphen where the name ends in a digit: digits8, imagenet32, cifar10-8."""
    name = name_dataset(data)
    return f"{name}{'-' if name[-1:].isdigit() else ''}{data.get('resolution')}"


class SplitNames(Settings):
    """For each split, its possible names in a dataset; the first that exists is used."""

    train: Annotated[list[str], Field(min_length=1)]
    val: list[str]
    test: list[str]


class CropSettings(Settings):
    """The square crop of an image. Source: Chen et al. 2020, §3.1."""

    short_side: Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None  # shortest, longest
    eval_short_side: Pixels | None
    size: Pixels | None
    filter: Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]
    resize: Resize
    draft: Annotated[float, Field(ge=1, le=1000)] | None  # least JPEG decode size / resized size; None: full size

    @model_validator(mode="after")
    def _check_square(self) -> "CropSettings":
        sides = (self.short_side, self.eval_short_side, self.size)
        if any(side is None for side in sides) and any(side is not None for side in sides):
            raise ValueError("data.crop.size and its short sides go together: state all, or none (null)")
        if self.short_side is not None and self.eval_short_side is not None and self.size is not None:
            low, high = self.short_side
            if not self.size <= min(low, self.eval_short_side) or low > high:
                raise ValueError(
                    f"a crop of {self.size} pixels must fit a shorter side of {low} to {high}, and of "
                    f"{self.eval_short_side} in evaluation: data.crop.size <= eval_short_side and short_side "
                    "(shortest, then longest)"
                )
        return self


class AugmentSettings(Settings):
    """Augmentation of training images, at R pixels."""

    pad: Annotated[int, Field(ge=0, le=4095)]  # pixels
    flip: bool


class MixtureStreamSettings(Settings):
    """How a mixture of streams is read."""

    buffer: Count  # size of the shuffle buffer, images
    num_readers: Count | None  # readers that the shards are assigned to; None: one per worker of each rank


class StreamSettings(MixtureStreamSettings):
    """How a stream is read."""

    held_in_memory: Count  # images held in memory: of val, of test, and of train for the palette
