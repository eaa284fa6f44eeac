"""Figures of reconstructions and code use over a split, the same for any batch size and number of ranks."""

import math

import lightning as L
import numpy as np
import torch
from torch import Tensor

from igpt.distributed import ranks
from igpt.metric.reconstruction import code_numbers, image_figures, reconstruction_numbers
from igpt.metric.result import Grid, Number
from igpt.task.generative_score import table_of_images
from igpt.tokens.batches import Batch
from igpt.tokens.tokenizer import Tokenizer
from igpt.tokens.vqvae import VQVAEConfig

AMPLIFIED = 8  # times, the differences shown
FEW_USED, LOW_PERPLEXITY = 0.2, 0.05  # share of the codes, perplexity ÷ K: below, the codes have collapsed


class ReconstructionScore:
    """Accumulates figures of every image and the uses of every code, then computes their numbers over all ranks."""

    def __init__(self, n_code: int, n_image: int) -> None:
        self.n_code, self.n_image = n_code, n_image
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._seen: list[tuple[Tensor, Tensor]] = []  # of each batch: rows (B,) and figures (F, B)
        self._counts = torch.zeros(self.n_code, dtype=torch.int64)  # uses of each code

    def add(self, batch: Batch, tokens: Tensor, pixels: Tensor, further: dict[str, Tensor] | None = None) -> None:
        """Adds a batch of pixels: its tokens (B, T), its reconstructions (B, R, R, 3) uint8, `further` figures (B,)."""
        figures = image_figures(batch.tokens, pixels) | (further or {})
        self._names = list(figures)
        self._seen.append((batch.rows, torch.stack([values.double() for values in figures.values()])))
        self._counts += torch.bincount(tokens.flatten(), minlength=self.n_code).cpu()

    def numbers(self, split: str, trainer: L.Trainer) -> tuple[dict[str, Number], Tensor]:
        """The numbers over all images of the split since the last call, and the uses of each code, (K,)."""
        self._names = next(names for names in ranks.all_gather_object(self._names) if names)
        table = table_of_images(self._seen, trainer, len(self._names), self.n_image)
        counts = ranks.sum_over_ranks(self._counts.to(trainer.strategy.root_device))
        figures = dict(zip(self._names, table, strict=True))
        self._reset()
        return reconstruction_numbers(split, figures) | code_numbers(split, counts.cpu()), counts.cpu()


class ReconstructionModule(L.LightningModule):
    """Measures a tokenizer on the validation images."""

    def __init__(self, tokenizer: Tokenizer, *, name: str, n_image: int) -> None:
        super().__init__()
        self.tokenizer, self.name = tokenizer, name
        self.score = ReconstructionScore(tokenizer.n_vocab, n_image)
        self.numbers: dict[str, Number] = {}
        self.counts = torch.empty(0)  # uses of each code

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if len(batch.rows):
            tokens = self.tokenizer.encode(batch.tokens)
            pixels = torch.from_numpy(self.tokenizer.decode(tokens)).to(tokens.device)
            returned = (self.tokenizer.encode(pixels) == tokens).double().mean(1)
            self.score.add(batch, tokens, pixels, {"tokens_returned": returned})

    def on_validation_epoch_end(self) -> None:
        self.numbers, self.counts = self.score.numbers(self.name, self.trainer)
        bits = math.log2(self.tokenizer.n_vocab) * self.tokenizer.grid.n_ctx / self.tokenizer.side**2
        self.numbers[f"{self.name}/rate"] = Number(bits, "bits/pixel", 1)


def draw_comparison(pixels: np.ndarray, tokenizers: dict[str, Tokenizer]) -> Grid:
    """Originals (N, R, R, 3) uint8, and for each tokenizer its reconstructions and their amplified differences."""
    columns, titles = [pixels], ["original"]
    for name, tokenizer in tokenizers.items():
        images = tokenizer.decode(tokenizer.encode(torch.from_numpy(pixels)))
        difference = np.abs(images.astype(np.int64) - pixels) * AMPLIFIED
        columns += [images, difference.clip(max=255).astype(np.uint8)]
        titles += [name, f"error x {AMPLIFIED}"]
    return Grid(np.stack(columns, axis=1), tuple(titles))


def describe_collapse(numbers: dict[str, Number], config: VQVAEConfig) -> str:
    """A warning if few codes are used, or most tokens are of a few of them; else ""."""
    used, perplexity = numbers["val/codes_used"], numbers["val/perplexity_share"]
    most = min(1.0, used.n / config.codes)  # of few images not all codes can be used
    if used.value >= FEW_USED * most and perplexity.value >= LOW_PERPLEXITY * most:
        return ""
    learnt = (
        "narrower codes (tokens.code_width), a higher tokens.restart_below, more tokens.unquantised_steps or a lower "
        "task.learning_rate help"
    )
    fixed = "more task.steps, fewer tokens.codes or tokens.quantizer=ema help"
    return (
        f"the codes have collapsed: {100 * used.value:.1f} % of {config.codes} are used, perplexity ÷ K is "
        f"{perplexity.value:.3f}; {learnt if config.quantizer == 'ema' else fixed}"
    )


def compare_with_patches(numbers: dict[str, Number], *, factor: int) -> str:
    """A warning if k-means on bare patches is as good as the network, else ""."""
    ours, patches = numbers["val/psnr"], numbers.get("patches/psnr")
    if patches is None or ours.value > patches.value:
        return ""
    return (
        f"val/psnr {ours.value:.2f} dB does not beat k-means on bare {factor}×{factor} patches of the same rate, "
        f"{patches.value:.2f} dB: this tokenizer is of no use, train it longer or take tokens=patches"
    )
