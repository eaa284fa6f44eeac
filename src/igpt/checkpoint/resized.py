"""Trained weights for images of another resolution: learned positions interpolated on the token grid."""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.checkpoint.igpt_format import Weights
from igpt.checkpoint.tensors import State
from igpt.model.patterns import SPARSE
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.rgb import RGBTokenizer
from igpt.tokens.tokenizer import TokenGrid

log = logging.getLogger(__name__)

KNOWN = ("learned", "factorised", "rope_2d")  # position encodings that are defined on another grid


def resize_weights(weights: Weights, resolution: int) -> Weights:
    """The weights as a network on images of `resolution` pixels a side; every other tensor is unchanged.

    Learned tables are interpolated (bicubic, pixel centres aligned; antialiased where they shrink), as Dosovitskiy et
    al. 2021, §3.2, do for fine-tuning; rotations (rope_2d) continue with the rows and columns that are added.

    Raises:
        ValueError: tokens other than pixels row by row, or a network that keeps more of the grid than positions.
    """
    saved, old = weights.metadata.network, weights.tokenizer
    if old.side == resolution:
        return weights
    _check(weights)
    assert isinstance(old, PaletteTokenizer | RGBTokenizer)
    tokenizer = replace(old, order=PixelOrder.from_name(resolution, "raster"))
    grid = tokenizer.grid
    network = replace(saved, n_ctx=grid.n_ctx, grid=(grid.rows, grid.columns, grid.channels), permutation=None)
    width, before = saved.n_embd, old.grid
    sizes: dict[str, tuple[TokenGrid, TokenGrid]] = {
        "wpe": (before, grid),
        "positions.factorised.row": (TokenGrid(before.rows, 1), TokenGrid(grid.rows, 1)),
        "positions.factorised.column": (TokenGrid(1, before.columns), TokenGrid(1, grid.columns)),
    }

    def make_resize(source: TokenGrid, to: TokenGrid) -> Callable[[Tensor], Tensor]:
        return lambda table: resize_table(table, source, to)

    def state() -> State:
        tensors = dict(weights.state())
        for name, (source, to) in sizes.items():
            if name in tensors:
                tensors[name] = tensors[name].reshape((to.n_ctx, width), make_resize(source, to))
        return tensors

    log.info("positions of %d×%d pixels interpolated to %d×%d (bicubic)", old.side, old.side, resolution, resolution)
    metadata = replace(weights.metadata, network=network, tokenizer=tokenizer)
    return replace(weights, metadata=metadata, state=state, resized_from=old.side)


def resize_table(table: Tensor, source: TokenGrid, to: TokenGrid) -> Tensor:
    """Vectors of a grid's tokens at another number of rows and columns: (T, C) → (T', C), each channel by itself."""
    cells = table.float().view(source.rows, source.columns, -1)  # (rows, columns, channels · C)
    rows, columns = _interpolation(source.rows, to.rows), _interpolation(source.columns, to.columns)
    return torch.einsum("ir,jc,rcd->ijd", rows, columns, cells).reshape(to.n_ctx, -1).to(table.dtype)


def _interpolation(n: int, to: int) -> Tensor:
    """The weights of n points in each of `to`: (to, n), float32.

    PyTorch's own resize of a table of one column is wrong with `antialias` (2.13), so tables are multiplied by weights.
    """
    points = torch.eye(n)[None, :, :, None].expand(1, n, n, 2)  # (1, points, n, 2)
    of_points = F.interpolate(points, size=(to, 2), mode="bicubic", align_corners=False, antialias=True)
    return of_points[0, :, :, 0].T


def _check(weights: Weights) -> None:
    """Raises ValueError where the network's tokens or settings have no meaning on another grid."""
    network, tokenizer = weights.metadata.network, weights.tokenizer
    names = network.positions.split("+")
    patterns = [name for name in network.attention_names if name in SPARSE]
    lacking = ""
    if type(tokenizer) not in (PaletteTokenizer, RGBTokenizer):
        lacking = f"tokens of pixels, and they read {tokenizer.describe()}"
    elif not tokenizer.order.is_raster:
        lacking = "pixels row by row, and they read them in another order"
    elif unknown := [name for name in names if name not in KNOWN]:
        lacking = f"positions={', '.join(KNOWN)}, and theirs are {unknown[0]}"
    elif network.relative_bias or patterns:
        what = "relative_bias" if network.relative_bias else f"attention={patterns[0]}"
        lacking = f"a network that knows the grid by its positions alone, and theirs has {what}"
    if lacking:
        side = f"{tokenizer.side}×{tokenizer.side}"
        raise ValueError(f"task.resize_positions of {weights.folder} needs {lacking}: take images of {side} pixels")
