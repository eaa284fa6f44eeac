"""Quantisers of the VQ-VAE: what they share, and the codebook of exponential moving averages without dead codes.

Source: van den Oord et al. 2017, appendix A.1 (EMA). Start by k-means and restarts of unused codes: as in later work
(Dhariwal et al. 2020, Jukebox §3.1). All randomness is keyed, all sums are float64: a resumed training goes on to the
bit, and the number of processes changes nothing but rounding.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.distributed import ranks
from igpt.tokens.code_search import Nearest, nearest_codes, nearest_codes_within, nearest_in_float64
from igpt.utils import keyed

EPSILON = 1e-5  # of Laplace smoothing of the counts, as in the paper's code
LLOYD = 10  # iterations of Lloyd's algorithm in the k-means start


class Quantized(NamedTuple):
    """The outcome of quantising N vectors in training."""

    vectors: Tensor  # (N, D) the nearest codes, with the gradient of the vectors (straight-through)
    tokens: Tensor  # (N,) int64
    commitment: Tensor  # scalar: mean squared distance between vectors and their codes, which are constants


class Quantizer(nn.Module, ABC):
    """K codes of width D: vectors ↔ tokens 0 … K - 1."""

    has_codes = True  # of the codes that start later: whether they have

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.n_code, self.width = codes, width

    @abstractmethod
    def forward(self, vectors: Tensor, keys: Tensor) -> Quantized:
        """Quantises the vectors of B images with their keys: (B, n, D) float32, (B,) int64 → `Quantized`, N = B · n."""

    @abstractmethod
    def lookup(self, tokens: Tensor) -> Tensor:
        """The codes of tokens: (…) int64 → (…, D) float32."""

    @abstractmethod
    def nearest(self, vectors: Tensor, distances: Tensor) -> Nearest:
        """The tokens of vectors, each known up to a Euclidean distance: (N, D) float32, (N,) → `Nearest`."""

    @abstractmethod
    def nearest_in_float64(self, vectors: Tensor) -> Tensor:
        """The tokens of vectors, the lowest on a tie: (N, D) float64 → (N,) int64."""

    def update(self, *, seed: int, step: int, decay: float, unquantised_steps: int, restart_below: float) -> None:
        """Ends an optimiser step, on all ranks together; codes that do not move need none."""


class ImageVectors(NamedTuple):
    """The vectors of B images, kept until the optimiser step, with the keys of the images."""

    vectors: Tensor  # (B, n, D) float32
    keys: Tensor  # (B,) int64
    tokens: Tensor  # (B, n) int64


class EMAQuantizer(Quantizer):
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
        super().__init__(codes, width)
        self.register_buffer("codebook", torch.zeros(codes, width))
        self.register_buffer("counts", torch.zeros(codes, dtype=torch.float64))
        self.register_buffer("totals", torch.zeros(codes, width, dtype=torch.float64))
        self.register_buffer("is_started", torch.zeros((), dtype=torch.bool))
        self.has_codes = False  # `is_started`, known without asking the device
        self.register_load_state_dict_post_hook(_read_is_started)  # type: ignore[no-untyped-call]  # as PyTorch has it
        self._step: list[ImageVectors] = []  # since the last update

    def lookup(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codebook)

    def forward(self, vectors: Tensor, keys: Tensor) -> Quantized:
        """Quantises the vectors of B images with their keys: (B, n, D) float32, (B,) int64 → `Quantized`, N = B · n."""
        flat = vectors.flatten(0, 1)
        if self.has_codes:
            tokens = nearest_codes(flat, self.codebook)
            codes = self.lookup(tokens)
            quantized = Quantized(flat + (codes - flat).detach(), tokens, F.mse_loss(flat, codes))
        else:
            quantized = Quantized(flat, torch.zeros(len(flat), dtype=torch.int64, device=flat.device), flat.sum() * 0)
        if self.training:
            self._step.append(ImageVectors(vectors.detach(), keys, quantized.tokens.view(vectors.shape[:2])))
        return quantized

    def nearest(self, vectors: Tensor, distances: Tensor) -> Nearest:
        return nearest_codes_within(vectors, self.codebook, distances)

    def nearest_in_float64(self, vectors: Tensor) -> Tensor:
        return nearest_in_float64(vectors, self.codebook)

    @torch.no_grad()
    def update(self, *, seed: int, step: int, decay: float, unquantised_steps: int, restart_below: float) -> None:
        """Ends an optimiser step: moves the codes, or starts them, from the vectors of all its micro-batches and ranks.

        A code whose count is below `restart_below` × the mean count becomes a vector of this step, drawn by
        (seed, step, code), with the mean count of all codes.

        Raises:
            ValueError: the vectors of the step that starts the codes are fewer than these, or not finite.
        """
        images, self._step = ImageVectors(*map(torch.cat, zip(*self._step, strict=True))), []
        if not self.has_codes:
            if step >= unquantised_steps:
                self._start(gather_by_key(images), seed=seed)
            return
        counts, totals = sum_by_code(images.vectors.flatten(0, 1), images.tokens.flatten(), self.n_code)
        self.counts.mul_(decay).add_(ranks.sum_over_ranks(counts), alpha=1 - decay)
        self.totals.mul_(decay).add_(ranks.sum_over_ranks(totals), alpha=1 - decay)
        self._restart(images, seed=seed, step=step, below=restart_below)
        total = self.counts.sum()
        smoothed = (self.counts + EPSILON) / (total + self.n_code * EPSILON) * total
        self.codebook.copy_(self.totals / smoothed[:, None])

    def _start(self, vectors: Tensor, *, seed: int) -> None:
        """k-means of the vectors of a step, in an order that no rank changes: (N, D)."""
        if not vectors.isfinite().all():
            raise ValueError(
                "the encoder's vectors are not finite, no codes can begin from them: begin again with a lower "
                "task.learning_rate or more task.warmup_steps"
            )
        if len(vectors) < self.n_code:
            raise ValueError(
                f"the codebook has {self.n_code:,} codes and a step {len(vectors):,} vectors to begin them from: "
                "raise task.batch_size, or lower tokens.codes"
            )
        drawn = keyed.generator(seed, "codes").permutation(len(vectors))[: self.n_code]
        centres = vectors[torch.as_tensor(drawn, device=vectors.device)]
        for _ in range(LLOYD):
            counts, totals = sum_by_code(vectors, nearest_codes(vectors, centres), self.n_code)
            centres = torch.where(counts[:, None] > 0, totals / counts[:, None].clamp(min=1), centres).float()
        counts, _ = sum_by_code(vectors, nearest_codes(vectors, centres), self.n_code)
        totals = centres * counts[:, None]
        for buffer, value in ((self.codebook, centres), (self.counts, counts), (self.totals, totals)):
            buffer.copy_(value)
            if dist.is_initialized():
                dist.broadcast(buffer, src=0)
        self.is_started.fill_(True)
        self.has_codes = True

    def _restart(self, images: ImageVectors, *, seed: int, step: int, below: float) -> None:
        """Draws a vector for every code, so that no device is asked which codes need one."""
        index = torch.arange(self.n_code, device=self.counts.device)
        drawn = keyed.uniform(keyed.per_example_keys(keyed.key(seed, "restart", step), index), 1)[:, 0]
        vectors = select_by_key(images, drawn)  # (K, D)
        mean = self.counts.mean()
        unused = self.counts < below * mean
        self.counts.copy_(torch.where(unused, mean, self.counts))
        self.totals.copy_(torch.where(unused[:, None], vectors * mean, self.totals))


def _read_is_started(quantizer: EMAQuantizer, incompatible: Any) -> None:
    """After weights are loaded."""
    quantizer.has_codes = bool(quantizer.is_started)


def sum_by_code(vectors: Tensor, tokens: Tensor, n_code: int) -> tuple[Tensor, Tensor]:
    """Number and sum of the vectors of each code: (N, D), (N,) → (K,), (K, D) float64."""
    wide = vectors.double()
    counts = wide.new_zeros(n_code).index_add_(0, tokens, wide.new_ones(len(wide)))  # bincount would ask the device
    return counts, wide.new_zeros(n_code, wide.shape[1]).index_add_(0, tokens, wide)


def gather_by_key(images: ImageVectors) -> Tensor:
    """The vectors of all ranks, images in the order of their keys: (N, D)."""
    everywhere: list[Any] = ranks.all_gather_object((images.vectors.cpu(), images.keys.cpu()))
    vectors, keys = map(torch.cat, zip(*everywhere, strict=True))
    return vectors[keys.argsort(stable=True)].flatten(0, 1).to(images.vectors.device)


def select_by_key(images: ImageVectors, drawn: Tensor) -> Tensor:
    """The vector at each share `drawn` of those that `gather_by_key` would gather: (U,) in [0, 1) → (U, D) float64."""
    vectors, keys, _ = images
    n, per_image = vectors.shape[:2]
    everywhere, first = keys, 0  # ranks have the same number of images
    if dist.is_initialized():
        parts = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, keys)
        everywhere, first = torch.cat(parts), dist.get_rank() * n
    index = (drawn * len(everywhere) * per_image).long()  # (U,)
    image = everywhere.argsort(stable=True)[index // per_image] - first  # counted from those of this rank
    found = vectors[image.clamp(0, n - 1), index % per_image].double()
    is_here = (image >= 0) & (image < n)
    return ranks.sum_over_ranks(found.masked_fill(~is_here[:, None], 0.0))
