"""The nearest code of a vector: in float32 with a margin within which the answer is certain, or in float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 20  # most distances at a time on a CPU: they stay in its cache
GPU_CHUNK = 1 << 26
BLOCK = 64  # codes of which the least distance is found first
MANY = 16  # borders are computed of at most one vector in so many
UNIT = 2.0**-24  # rounding of a float32


class Nearest(NamedTuple):
    """The nearest codes of N vectors that are not known exactly."""

    tokens: Tensor  # (N,) int64
    is_certain: Tensor  # (N,) bool: no vector within the stated distance has another nearest code


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of each vector's nearest code, in float32: (N, D), (K, D) → (N,) int64; never N × K numbers at once."""
    return search(vectors, codebook)[0]


@torch.no_grad()
def nearest_codes_within(vectors: Tensor, codebook: Tensor, distances: Tensor) -> Nearest:
    """The nearest codes of vectors, each known up to a Euclidean distance: (N, D), (K, D), (N,) → `Nearest`.

    With r₁ ≤ r₂ ≤ … the distances to all codes, another code becomes the nearest only after a move by (r₂ - r₁) / 2.
    Where that leaves a doubt, the borders to all other codes are computed in float64, unless the doubts are many.
    """
    repeated = find_repeated(codebook)
    tokens, least, second = search(vectors, codebook, runner_up=True, repeated=repeated)
    rounding = bound_rounding(vectors, codebook)
    squares = vectors.square().sum(1)
    radii = [((squares + each).clamp(min=0) + rounding).sqrt() for each in (least, second)]
    is_certain = second - least > 2 * rounding + 2 * distances * (radii[0] + radii[1])  # not if NaN
    is_certain |= (second == torch.inf) & squares.isfinite()  # all codes are the same
    (doubtful,) = (~is_certain).nonzero(as_tuple=True)
    if len(doubtful) <= len(vectors) // MANY:
        for rows in torch.split(doubtful, max(1, CHUNK // len(codebook))):
            some = vectors[rows].double()
            tokens[rows] = nearest_in_float64(some, codebook)
            is_certain[rows] = _find_borders(some, codebook.double(), tokens[rows], repeated) > distances[rows]
    return Nearest(tokens, is_certain)


def _find_borders(vectors: Tensor, codes: Tensor, nearest: Tensor, repeated: Tensor) -> Tensor:
    """The distance of each vector to the border of its nearest code's cell, in float64, never too large: (N,).

    The border to a code at distance d lies (d² / 2 - (z - e)·(e' - e)) / d from the vector z with the nearest code e.
    """
    own, norms = codes[nearest], codes.square().sum(1)  # (N, D), (K,)
    along = (vectors - own) @ codes.T - ((vectors - own) * own).sum(1, keepdim=True)  # (N, K)
    apart = (norms + norms[nearest][:, None] - 2 * own @ codes.T).clamp(min=0)  # (N, K) squared
    borders = (apart / 2 - along) / apart.clamp(min=1e-12 * norms.max()).sqrt()  # far above the rounding of float64
    borders.masked_fill_(repeated, torch.inf).scatter_(1, nearest[:, None], torch.inf)
    nearest_border: Tensor = borders.amin(1)
    return nearest_border


@torch.no_grad()
def nearest_in_float64(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the smallest squared distance, the lowest on a tie: (N, D) float64, (K, D) → (N,) int64.

    Where the rounding of a product of matrices could decide, squares of differences are added in the order of the
    dimensions, which is the same on every machine.
    """
    codes = codebook.double()
    tokens, least, second = search(vectors, codes, runner_up=True)
    (rows,) = (~(second - least > 2 * bound_rounding(vectors, codes))).nonzero(as_tuple=True)
    for some in torch.split(rows, max(1, CHUNK // len(codes))):
        distances = vectors.new_zeros(len(some), len(codes))
        for vector, code in zip(vectors[some].T, codes.T, strict=True):
            distances += (vector[:, None] - code).square()
        tokens[some] = distances.min(1).indices
    return tokens


def bound_rounding(vectors: Tensor, codebook: Tensor) -> Tensor:
    """How far a squared distance of `search` may be off: (N, D), (K, D) → (N,)."""
    unit = torch.finfo(vectors.dtype).eps / 2
    lengths: Tensor = vectors.norm(dim=1) + codebook.norm(dim=1).max()
    return (vectors.shape[1] + 8) * unit * lengths.square()


def find_repeated(codebook: Tensor) -> Tensor:
    """Mask of the codes that equal one of a lower index: (K, D) → (K,) bool."""
    distinct, inverse = torch.unique(codebook, dim=0, return_inverse=True)  # (U, D), (K,)
    index = torch.arange(len(codebook), device=codebook.device)
    first = index.new_full((len(distinct),), len(codebook)).scatter_reduce_(0, inverse, index, "amin")
    return first[inverse] != index


def search(
    vectors: Tensor, codebook: Tensor, *, runner_up: bool = False, repeated: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest code, its distance and that of the next, in their precision: (N, D), (K, D) → (N,) int64, (N,), (N,).

    Distances are squared, without the square of the vector, a constant. They lie as (K, n), of which a CPU takes the
    least of `BLOCK` codes at a time three times as fast as the index of the least of all. Without `runner_up` the
    third result is the second.
    """
    norms = codebook.square().sum(1)
    if repeated is not None:
        norms = norms.masked_fill(repeated, torch.inf)
    missing = -len(codebook) % BLOCK
    norms = F.pad(norms, (0, missing), value=torch.inf)[:, None]  # (K', 1)
    codes = F.pad(codebook * -2, (0, 0, 0, missing))  # (K', D)
    size = CHUNK if vectors.device.type == "cpu" else GPU_CHUNK
    results = []
    for some in torch.split(vectors, max(1, size // len(codes))):
        blocks = torch.addmm(norms, codes, some.T).view(len(codes) // BLOCK, BLOCK, len(some))
        least = blocks.amin(1)
        values, block = least.min(0)  # (n,)
        within = blocks.gather(0, block[None, None].expand(1, BLOCK, -1))[0]  # (BLOCK, n)
        index = within.min(0).indices
        second = values
        if runner_up:
            within.scatter_(0, index[None], torch.inf)
            second = least.scatter_(0, block[None], within.amin(0, keepdim=True)).amin(0)
        tokens = (block * BLOCK + index).clamp_(max=len(codebook) - 1)  # of a vector that is not finite
        results.append((tokens, values, second))
    tokens, first, second = (torch.cat(parts) for parts in zip(*results, strict=True))
    return tokens, first, second
