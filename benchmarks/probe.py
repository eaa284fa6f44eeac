"""Logistic regression on the features of all layers: ours, all layers together, against a loop over scikit-learn.

    python benchmarks/probe.py

Both go on until their objective is within the same distance of the minimum that a far longer run of scikit-learn finds.
Features: 25 layers × 2,000 images × 512, ten classes, with a spectrum that falls as that of pooled features does.
"""

import argparse
import os
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from igpt.probe.lbfgs import logistic_regression
from igpt.task.machine import matmul_precision


def made_up(layers: int, images: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose variance falls by position as 1 / rank, and whose class means lie in the first axes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=generator)
    spectrum = 1 / torch.arange(1, width + 1).sqrt()
    means = torch.randn(classes, width, generator=generator) * spectrum * 0.5
    noise = torch.randn(layers, images, width, generator=generator) * spectrum
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return (noise + means[labels]) @ turn, labels


def objective(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, strength: float) -> float:
    nats = F.cross_entropy(x.double() @ weight.double().T + bias.double(), y)
    return float(nats + weight.double().square().sum() / (2 * strength * len(y)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.01, 1.0])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # how near each ended is measured and printed instead
    x, y = made_up(arguments.layers, arguments.images, arguments.width, 10)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores; {tuple(x.shape)}")
    for strength in arguments.strengths:
        best = [
            LogisticRegression(C=strength, tol=1e-9, max_iter=20000).fit(layer.numpy().astype(np.float64), y.numpy())
            for layer in x[:2]
        ]
        least = [
            objective(x[i], y, torch.tensor(m.coef_), torch.tensor(m.intercept_), strength) for i, m in enumerate(best)
        ]
        start = time.perf_counter()
        with matmul_precision("auto", x.device):  # as `task=probe` does
            ours = logistic_regression(x, y, n_class=10, strengths=[strength])
        seconds = time.perf_counter() - start
        above = max(
            objective(x[i], y, ours.weight[i, 0], ours.bias[i, 0], strength) - low for i, low in enumerate(least)
        )
        print(f"C {strength:g}: ours {seconds:.2f} s, {ours.iterations} steps, {above:.1e} nats above the minimum")
        for name, dtype in (("float64", np.float64), ("float32", np.float32)):
            for tol in (1e-4, 1e-5, 1e-6, 1e-7):
                start = time.perf_counter()
                fits = [
                    LogisticRegression(C=strength, tol=tol, max_iter=20000).fit(layer.numpy().astype(dtype), y.numpy())
                    for layer in x
                ]
                took = time.perf_counter() - start
                short = max(
                    objective(x[i], y, torch.tensor(fits[i].coef_), torch.tensor(fits[i].intercept_), strength) - low
                    for i, low in enumerate(least)
                )
                print(f"    scikit-learn, {name}, tol {tol:g}: {took:.2f} s = {took / seconds:.1f}×, {short:.1e} above")
                if short <= above:
                    break


if __name__ == "__main__":
    main()
