"""Picture files → what a page carries of them: checked, within a size, or a word on why not."""

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

SMALLEST = 160  # pixels of the shorter side: no picture is shrunk below
WIDE, HIGH = 460, 560  # pixels: what is larger is shown at half its size, so that one sees all of it at once
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """A picture file and what it shows. `data` is its PNG as base64, empty where it cannot be shown: `said` is why."""

    title: str
    caption: str
    path: Path
    shown_path: str  # as the page names it
    data: str = ""
    width: int = 0
    height: int = 0
    pixels: bool = True  # images pixel by pixel, not a diagram
    whole: bool = False  # never shown at half its size: there are words in it
    said: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page: the picture's, or exactly half, so that its pixels stay squares."""
        by = 2 if self.pixels and not self.whole and (self.width > WIDE or self.height > HIGH) else 1
        return self.width // by, self.height // by

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{self.data}"


def embedded(pictures: Sequence[Picture], *, budget: int) -> list[Picture]:
    """The pictures with their data, together at most `budget` characters: the largest are halved, or left out last."""
    read = [_read(picture) for picture in pictures]
    while sum(len(picture.data) for picture in read) > budget:
        place = max(range(len(read)), key=lambda i: len(read[i].data))
        read[place] = _halved(read[place])
    return read


def _read(picture: Picture) -> Picture:
    if not picture.path.is_file():
        return replace(picture, said="is not there any more")
    try:
        with Image.open(picture.path, formats=("PNG",)) as image:
            image.load()  # a file cut short is met here
            diagram = str(image.info.get("Software", "")).startswith("Matplotlib")
            width, height = image.size
        data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    except DAMAGED as error:
        return replace(picture, said=f"cannot be read ({type(error).__name__}): it is damaged")
    return replace(picture, data=data, width=width, height=height, pixels=not diagram)


def _halved(picture: Picture) -> Picture:
    """At half its size each way, and once more if it was that before; without data where it would be too small."""
    small = replace(picture, width=picture.width // 2, height=picture.height // 2)
    if min(small.width, small.height) < SMALLEST:
        return replace(picture, data="", said="is left out, so that this page stays small")
    with Image.open(io.BytesIO(base64.b64decode(picture.data))) as image:
        how = Image.Resampling.NEAREST if picture.pixels else Image.Resampling.LANCZOS
        plain = image.convert("RGB" if image.mode in ("P", "PA") else image.mode)
        shrunk = plain.resize((small.width, small.height), how)
    file = io.BytesIO()
    shrunk.save(file, format="PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return replace(small, data=data, said="is shown smaller than it is, so that this page stays small")
