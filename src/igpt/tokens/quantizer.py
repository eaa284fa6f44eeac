"""The vector quantiser of the VQ-VAE: a codebook updated by exponential moving averages, without dead codes.

Source: van den Oord et al. 2017, appendix A.1 (EMA). Start by k-means and restarts of unused codes: as in later work
(Dhariwal et al. 2020, Jukebox §3.1). All randomness is keyed, all sums are float64: a resumed training goes on to the
bit, and the number of processes changes nothing but rounding.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.distributed import ranks
from igpt.utils import keyed

CHUNK = 1 << 22  # most distances at a time
EPSILON = 1e-5  # of Laplace smoothing of the counts, as in the paper's code
LLOYD = 10  # iterations of Lloyd's algorithm in the k-means start


class Quantized(NamedTuple):
    """The outcome of quantising N vectors in training."""

    vectors: Tensor  # (N, D) the nearest codes, with the gradient of the vectors (straight-through)
    tokens: Tensor  # (N,) int64
    commitment: Tensor  # scalar: mean squared distance between vectors and their codes, which are constants


class MicroBatch(NamedTuple):
    """The vectors of a micro-batch, kept until the optimiser step: of B images, each with a key of its own."""

    vectors: Tensor  # (B, n, D) float32
    keys: Tensor  # (B,) int64
    tokens: Tensor  # (B, n) int64


class EMAQuantizer(nn.Module):
    """K codes of width D. A code is the moving average of the vectors that it was the nearest of.

    `forward` quantises a micro-batch and keeps its vectors; `update` ends the optimiser step. Until step
    `unquantised_steps` vectors pass unchanged; then the codes are the k-means centres of that step's vectors.
    Buffers: `codebook` (K, D) float32; `counts` (K,) and `totals` (K, D) float64, the moving averages of number and sum
    of each code's vectors; `is_started`.
    """

    codebook: Tensor
    counts: Tensor
    totals: Tensor
    is_started: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.n_code, self.width = codes, width
        self.register_buffer("codebook", torch.zeros(codes, width))
        self.register_buffer("counts", torch.zeros(codes, dtype=torch.float64))
        self.register_buffer("totals", torch.zeros(codes, width, dtype=torch.float64))
        self.register_buffer("is_started", torch.zeros((), dtype=torch.bool))
        self._step: list[MicroBatch] = []  # micro-batches since the last update

    def lookup(self, tokens: Tensor) -> Tensor:
        """The codes of tokens: (…) int64 → (…, D) float32."""
        return F.embedding(tokens, self.codebook)

    def forward(self, vectors: Tensor, keys: Tensor) -> Quantized:
        """Quantises the vectors of B images with their keys: (B, n, D) float32, (B,) int64 → `Quantized`, N = B · n."""
        flat = vectors.flatten(0, 1)
        if bool(self.is_started):
            tokens = nearest_codes(flat.detach(), self.codebook)
            codes = self.lookup(tokens)
            quantized = Quantized(flat + (codes - flat).detach(), tokens, F.mse_loss(flat, codes))
        else:
            quantized = Quantized(flat, torch.zeros(len(flat), dtype=torch.int64, device=flat.device), flat.sum() * 0)
        if self.training:
            self._step.append(MicroBatch(vectors.detach(), keys, quantized.tokens.view(vectors.shape[:2])))
        return quantized

    @torch.no_grad()
    def update(self, *, seed: int, step: int, decay: float, unquantised_steps: int, restart_below: float) -> None:
        """Ends an optimiser step: moves the codes, or starts them, from the vectors of all its micro-batches and ranks.

        A code whose count is below `restart_below` × the mean count becomes a vector of this step, drawn by
        (seed, step, code), with the mean count of the others.

        Raises:
            ValueError: the vectors of the step that starts the codes are fewer than these.
        """
        batches, self._step = self._step, []
        if not bool(self.is_started):
            if step >= unquantised_steps:
                self._start(gather_by_key(batches), seed=seed)
            return
        tokens = torch.cat([batch.tokens.flatten() for batch in batches])
        vectors = torch.cat([batch.vectors.flatten(0, 1) for batch in batches])
        counts, sums = sum_by_code(vectors, tokens, self.n_code)
        self.counts.mul_(decay).add_(all_reduce(counts), alpha=1 - decay)
        self.totals.mul_(decay).add_(all_reduce(sums), alpha=1 - decay)
        self._restart(batches, seed=seed, step=step, below=restart_below)
        total = self.counts.sum()
        smoothed = (self.counts + EPSILON) / (total + self.n_code * EPSILON) * total
        self.codebook.copy_(self.totals / smoothed[:, None])

    def _start(self, vectors: Tensor, *, seed: int) -> None:
        """k-means of the vectors of a step, in an order that no rank changes: (N, D)."""
        if len(vectors) < self.n_code:
            raise ValueError(
                f"the codebook has {self.n_code:,} codes and a step {len(vectors):,} vectors to begin them from: "
                "raise task.batch_size, or lower tokens.codes"
            )
        chosen = keyed.generator(seed, "codes").permutation(len(vectors))[: self.n_code]
        centres = vectors[torch.as_tensor(chosen, device=vectors.device)]
        for _ in range(LLOYD):
            counts, sums = sum_by_code(vectors, nearest_codes(vectors, centres), self.n_code)
            centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres).float()
        counts, _ = sum_by_code(vectors, nearest_codes(vectors, centres), self.n_code)
        for buffer, value in (
            (self.codebook, centres),
            (self.counts, counts),
            (self.totals, centres * counts[:, None]),
        ):
            buffer.copy_(value)
            if dist.is_initialized():
                dist.broadcast(buffer, src=0)
        self.is_started.fill_(True)

    def _restart(self, batches: list[MicroBatch], *, seed: int, step: int, below: float) -> None:
        mean = self.counts.mean()
        (unused,) = (self.counts < below * mean).nonzero(as_tuple=True)
        if not len(unused):
            return
        drawn = keyed.uniform(keyed.per_example_keys(keyed.key(seed, "restart", step), unused), 1)[:, 0]
        vectors = select_by_key(batches, drawn)  # (U, D)
        self.counts[unused] = mean
        self.totals[unused] = vectors.double() * mean


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of each vector's nearest code, in float32: (N, D), (K, D) → (N,) int64. Memory: CHUNK distances."""
    norms = codebook.square().sum(1)
    found = [
        torch.addmm(norms, some, codebook.T, alpha=-2).argmin(1)  # without the square of the vector, a constant
        for some in torch.split(vectors, max(1, CHUNK // len(codebook)))
    ]
    return torch.cat(found) if found else vectors.new_zeros(0, dtype=torch.int64)


def sum_by_code(vectors: Tensor, tokens: Tensor, n_code: int) -> tuple[Tensor, Tensor]:
    """Number and sum of the vectors of each code: (N, D), (N,) → (K,), (K, D) float64."""
    counts = torch.bincount(tokens, minlength=n_code).double()
    sums = torch.zeros(n_code, vectors.shape[1], dtype=torch.float64, device=vectors.device)
    return counts, sums.index_add_(0, tokens, vectors.double())


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_by_key(batches: list[MicroBatch]) -> Tensor:
    """The vectors of all micro-batches and ranks, images in the order of their keys: (N, D)."""
    vectors, keys = (torch.cat(parts).cpu() for parts in zip(*(batch[:2] for batch in batches), strict=True))
    everywhere: list[Any] = ranks.all_gather_object((vectors, keys))
    vectors, keys = (torch.cat(parts) for parts in zip(*everywhere, strict=True))
    return vectors[keys.argsort(stable=True)].flatten(0, 1).to(batches[0].vectors.device)


def select_by_key(batches: list[MicroBatch], drawn: Tensor) -> Tensor:
    """The vector at each share `drawn` of those that `gather_by_key` would gather: (U,) in [0, 1) → (U, D)."""
    vectors, keys = (torch.cat(parts) for parts in zip(*(batch[:2] for batch in batches), strict=True))
    per_image = vectors.shape[1]
    everywhere = torch.cat([keys.new_tensor(part) for part in ranks.all_gather_object(keys.tolist())])
    index = (drawn * len(everywhere) * per_image).long()
    wanted = everywhere.sort(stable=True).values[index // per_image]  # (U,) keys of images
    order = keys.argsort(stable=True)
    place = torch.searchsorted(keys[order], wanted).clamp(max=len(keys) - 1)
    here = keys[order][place] == wanted
    found = vectors[order[place], index % per_image] * here[:, None]
    return all_reduce(found)
