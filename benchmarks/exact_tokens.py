"""Images a second of a VQ-VAE's exact tokens, by part, and the rounding of its float32 encoder: `ERROR` rests on it.

    python benchmarks/exact_tokens.py --tokenizer RUN --threads 1 2

RUN: a run of task=tokenizer. `--count` crops of scikit-learn's two photographs, and noise for the rounding. Tokens of
an untrained network take longer: its codes lie so close that float32 decides little.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from igpt.checkpoint.find import find_vqvae
from igpt.distributed.process_state import num_threads
from igpt.tokens.code_search import nearest_codes
from igpt.tokens.exact_encoding import encode_exactly
from igpt.tokens.vqvae import scale_pixels
from igpt.tokens.vqvae_tokenizer import VQVAETokenizer, unrounded_float32

CPU = torch.device("cpu")
TWO = "the encoder in float64, of two images"


def crop_photographs(side: int, count: int) -> Tensor:
    """Crops at random places: (count, side, side, 3) uint8."""
    photographs = [torch.from_numpy(image.copy()) for image in load_sample_images().images]
    draw = torch.Generator().manual_seed(0)
    crops = []
    for i in range(count):
        image = photographs[i % 2]
        y, x = (int(torch.randint(n - side + 1, (), generator=draw)) for n in image.shape[:2])
        crops.append(image[y : y + side, x : x + side])
    return torch.stack(crops)


def measure_rounding(tokenizer: VQVAETokenizer, pixels: Tensor) -> float:
    """The greatest |z₃₂ - z₆₄| over the longest vector of its image, of photographs and noise."""
    noise = torch.randint(0, 256, pixels.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    single, double = tokenizer.load_network(CPU), tokenizer.load_network(CPU, torch.float64)
    worst = 0.0
    with unrounded_float32(CPU):
        for image in torch.cat([pixels, noise]).split(1):
            exact = double.encoder(scale_pixels(image, torch.float64))
            error = (single.encoder(scale_pixels(image)) - exact).norm(dim=1).max() / exact.norm(dim=1).max()
            worst = max(worst, error.item())
    return worst


def measure(tokenizer: VQVAETokenizer, pixels: Tensor, rounds: int) -> dict[str, machine.Timed]:
    single, double = tokenizer.load_network(CPU), tokenizer.load_network(CPU, torch.float64)

    def by_eight(run: Any) -> machine.Run:
        def call() -> None:
            with unrounded_float32(CPU):
                for some in pixels.split(8):
                    run(some)

        return machine.with_timer(call)

    vectors = single.encoder(scale_pixels(pixels)).permute(0, 2, 3, 1).flatten(0, 2)
    per_image = len(vectors) // len(pixels)
    rows = {
        "exact tokens": by_eight(tokenizer.encode),
        "of these, float32 convolutions": by_eight(lambda some: single.encoder(scale_pixels(some))),
        "of these, nearest in float32": by_eight(
            lambda some: nearest_codes(vectors[: per_image * len(some)], single.quantizer.codebook)
        ),
        TWO: machine.with_timer(lambda: double.encoder(scale_pixels(pixels[:2], torch.float64))),
    }
    return machine.time_in_turns(rows, rounds)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="run folder of task=tokenizer")
    parser.add_argument("--count", type=int, default=32, help="images")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    print(machine.about())
    tokenizer = find_vqvae(args.tokenizer)
    pixels = crop_photographs(tokenizer.side, args.count)
    networks = tokenizer.load_network(CPU), tokenizer.load_network(CPU, torch.float64)
    with unrounded_float32(CPU):
        recomputed = sum(encode_exactly(*networks, some).n_recomputed for some in pixels.split(8)) / len(pixels)
    report: dict[str, Any] = {"recomputed": recomputed, "rounding": measure_rounding(tokenizer, pixels[:8])}
    print(f"{tokenizer.describe()}; rounding of float32 {report['rounding']:.1e}")
    print(f"{recomputed:.1f} of {tokenizer.grid.n_ctx} vectors an image are computed again in float64")
    for threads in args.threads:
        with num_threads(threads):
            times = measure(tokenizer, pixels, args.rounds)
        report[f"{threads} threads"] = times
        for row, time in times.items():
            n = 2 if row == TWO else len(pixels)
            print(f"{threads} threads, {row}: {n / time.median:.0f} images/s, {1e3 * time.median / n:.1f} ms an image")
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
