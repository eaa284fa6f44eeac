"""Encoding by a lookup table of all 256³ colours: exact, built in seconds and cached on disk."""

import logging
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from igpt.data.cache import map_array
from igpt.tokens.palette import Palette, colour_codes, decode_colour_codes, squared_differences

log = logging.getLogger(__name__)

PAYS = 2_000_000  # number of directly encoded colours that costs as much as the table: docs/data.md
_SIDE = 8  # levels a side of a block of the colour cube
_AT_ONCE = 1 << 23  # most distances per step


def build_table(palette: Palette) -> np.ndarray:
    """The token of colour (r, g, b) at index r·256² + g·256 + b: (256³,) int16, equal to `Palette.encode`.

    For each block of neighbouring colours, a palette colour is pruned if its least distance to the block exceeds the
    greatest distance of another one. Rounding is monotonic, so that pruning is exact. The rest is compared as in
    `encode`.
    """
    channels = [squared_differences(palette, channel) for channel in range(3)]  # each (k, 256) float64
    blocks = [c.view(palette.k, -1, _SIDE) for c in channels]  # (k, 32, 8)
    least, most = ([extreme(b, -1) for b in blocks] for extreme in (torch.amin, torch.amax))  # each (k, 32)
    n = 256 // _SIDE
    table = torch.empty(n, n, n, _SIDE, _SIDE, _SIDE, dtype=torch.int16)
    for r in range(n):
        low, high = (
            ((x[0][:, r, None, None] + x[1][:, :, None]) + x[2][:, None, :]).flatten(1) for x in (least, most)
        )  # (k, 32·32)
        near = (low <= high.amin(0)).T  # (32·32, k): candidates for the nearest colour in each block
        count = near.sum(1)
        slab = table[r].view(n * n, _SIDE, _SIDE, _SIDE)
        order = count.argsort()
        start = 0
        while start < len(order):
            width = int(count[order[start:]][0])
            size = max(1, _AT_ONCE // (_SIDE**3 * max(width, 1)))
            some = order[start : start + size]
            width = int(count[some].max())
            chosen = near[some].byte().topk(width, dim=1).indices.sort(1).values  # (n, width), padded by pruned colours
            where = torch.stack([some // n, some % n], 1)
            dr = blocks[0][chosen, r]  # (n, width, 8)
            dg = blocks[1][chosen, where[:, :1]]
            db = blocks[2][chosen, where[:, 1:]]
            distance = (dr[:, :, :, None, None] + dg[:, :, None, :, None]) + db[:, :, None, None, :]
            nearest = distance.flatten(2).min(1).indices  # (n, 512) in 0 … width-1
            slab[some] = chosen.gather(1, nearest).to(torch.int16).view(-1, _SIDE, _SIDE, _SIDE)
            start += len(some)
    return table.permute(0, 3, 1, 4, 2, 5).reshape(-1).numpy()


class LookupEncoder:
    """`Palette.encode` with a lookup table once that pays: (…, 3) uint8 → (…) int64, on the pixels' device.

    The table is cached below `cache`. A GPU uses it from the first batch on, since `torch.unique` synchronises the
    GPU.
    """

    def __init__(self, palette: Palette, cache: Path | None) -> None:
        self.palette = palette
        self.path = cache / "palettes" / f"lookup1-{palette.hash}.npy" if cache else None
        self.computed = 0  # colours encoded without the table
        self._tables: dict[torch.device, Tensor] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        codes = colour_codes(pixels)
        table = self._tables.get(pixels.device)
        if table is None:
            if not self._is_worthwhile(pixels.device):
                distinct, inverse = torch.unique(codes, return_inverse=True)
                self.computed += len(distinct)
                return self.palette.nearest(decode_colour_codes(distinct))[inverse]
            table = self._tables[pixels.device] = torch.from_numpy(self._load_table()).to(pixels.device)
        return table.index_select(0, codes.flatten()).long().view(codes.shape)

    def _is_worthwhile(self, device: torch.device) -> bool:
        on_disk = self.path is not None and self.path.is_file()
        return on_disk or device.type != "cpu" or self.computed > PAYS

    def _load_table(self) -> np.ndarray:
        if self.path is None:
            return build_table(self.palette)
        try:
            map_array(self.path, (256**3,), np.int16, self._write)
        except (OSError, ValueError) as error:
            log.warning("palette: the table of colours is not kept: %s", error)
            return build_table(self.palette)
        table: np.ndarray = np.load(self.path, mmap_mode="c", allow_pickle=False)  # pages shared by all processes
        return table

    def _write(self, file: IO[bytes]) -> None:
        file.write(build_table(self.palette).tobytes())
        log.info("palette: the token of every colour is kept in %s", self.path)
