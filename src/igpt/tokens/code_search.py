"""The nearest code of a vector: in float32 with a margin within which the answer is certain, or in float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 20  # most distances at a time on a CPU: they stay in its cache
GPU_CHUNK = 1 << 26
BLOCK = 64  # codes of which the least distance is found first
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
    Where that leaves a doubt, rounding included, the borders to all other codes are computed in float64.
    """
    repeated = find_repeated(codebook)
    tokens, least, second = search(vectors, codebook, runner_up=True, repeated=repeated)
    squares = vectors.square().sum(1)
    rounding = (vectors.shape[1] + 8) * UNIT * (squares.sqrt() + codebook.norm(dim=1).max()) ** 2  # of a square
    radii = [((squares + each).clamp(min=0) + rounding).sqrt() for each in (least, second)]
    is_certain = second - least > 2 * rounding + 2 * distances * (radii[0] + radii[1])  # not if NaN
    codes = codebook.double()
    for rows in torch.split((~is_certain).nonzero()[:, 0], max(1, CHUNK // len(codebook))):
        squares = _squared_distances(vectors[rows].double(), codes)  # (n, K)
        least, tokens[rows] = squares.min(1)
        apart = _squared_distances(codes[tokens[rows]], codes).sqrt()
        margins = ((squares - least[:, None]) / (2 * apart)).nan_to_num(torch.inf, posinf=torch.inf).amin(1)
        is_certain[rows] = (margins > distances[rows]) & least.isfinite()
    return Nearest(tokens, is_certain)


@torch.no_grad()
def nearest_in_float64(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the smallest squared distance, the lowest on a tie: (N, D) float64, (K, D) → (N,) int64.

    Squares are added in the order of the dimensions, so that no machine adds them in another.
    """
    codes = codebook.double()
    nearest = [
        _squared_distances(some, codes).min(1).indices for some in torch.split(vectors, max(1, CHUNK // len(codebook)))
    ]
    return torch.cat(nearest)


def _squared_distances(vectors: Tensor, codes: Tensor) -> Tensor:
    distances = vectors.new_zeros(len(vectors), len(codes))
    for vector, code in zip(vectors.T, codes.T, strict=True):
        distances += (vector[:, None] - code).square()
    return distances


def find_repeated(codebook: Tensor) -> Tensor:
    """Mask of the codes that equal one of a lower index: (K, D) → (K,) bool."""
    distinct, inverse = torch.unique(codebook, dim=0, return_inverse=True)  # (U, D), (K,)
    index = torch.arange(len(codebook), device=codebook.device)
    first = index.new_full((len(distinct),), len(codebook)).scatter_reduce_(0, inverse, index, "amin")
    return first[inverse] != index


def search(
    vectors: Tensor, codebook: Tensor, *, runner_up: bool = False, repeated: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest code, its distance and that of the next, in float32: (N, D), (K, D) → (N,) int64, (N,), (N,).

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
