"""Probing: features of all layers against Hugging Face's network, and their classifiers against scikit-learn's.

    python benchmarks/probe.py --rounds 3 --out probe.json

Features: mean over positions of every layer of iGPT-S (the same weights), both without gradients; they must be equal.
Classifiers: logistic regression on 25 layers × 2,000 images × 512 features, ten classes, with a spectrum that falls as
that of pooled features does: ours, all layers together, against a loop over scikit-learn's `LogisticRegression`, at its
default tolerance and at the first that ends as near to the minimum as ours; the minimum is a far longer run of its own.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from networks import SIZES, hugging_face, our_net, token_ids
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from igpt.model.features import layer_features
from igpt.probe.lbfgs import Heads, logistic_regression
from igpt.training.hardware import matmul_precision

TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7)  # from its default on
DTYPES = ("float64", "float32")


def features(size: str, images: int, rounds: int) -> dict[str, machine.Timed]:
    """(L + 1, images, C) of random images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = token_ids(size, device, images)
    net, peer = our_net(size).to(device).eval(), hugging_face(size).to(device).eval()
    shifted = F.pad(tokens[:, :-1], (1, 0), value=SIZES[size][4])

    @torch.inference_mode()
    def igpt_features() -> Tensor:
        with matmul_precision("auto", tokens.device):
            return layer_features(net, tokens)

    @torch.inference_mode()
    def hf_features() -> Tensor:
        *hidden, last = peer.transformer(input_ids=shifted, output_hidden_states=True).hidden_states
        normed = (block.ln_1(h) for block, h in zip(peer.transformer.h, hidden, strict=True))
        return torch.stack([*(h.mean(dim=1) for h in normed), last.mean(dim=1)])

    def hf_features_medium() -> Tensor:
        with matmul_precision("auto", tokens.device):
            return hf_features()

    rows = {"igpt": igpt_features, "hf as shipped": hf_features, "hf with our matrix products": hf_features_medium}
    times = machine.time_in_turns({name: machine.with_timer(run) for name, run in rows.items()}, rounds)
    machine.agree("features", times, lambda _: 1e-4)
    return times


def made_up(layers: int, images: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features whose variance falls by position as 1 / rank, and whose class means lie in the first axes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=generator)
    spectrum = 1 / torch.arange(1, width + 1).sqrt()
    means = torch.randn(classes, width, generator=generator) * spectrum * 0.5
    noise = torch.randn(layers, images, width, generator=generator) * spectrum
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return (noise + means[labels]) @ turn, labels


def objective(x: Tensor, y: Tensor, weight: Any, bias: Any, strength: float) -> float:
    weight, bias = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
    return float(F.cross_entropy(x.double() @ weight.T + bias, y) + weight.square().sum() / (2 * strength * len(y)))


def fits(x: Tensor, y: Tensor, strength: float, rounds: int) -> dict[str, machine.Timed]:
    """Rows in turn; the result of each is how far above the minimum its worst of the first layers ended, in nats."""
    classes = int(y.max()) + 1

    def sklearn(layers: Tensor, dtype: str, tol: float, most: int = 20_000) -> list[LogisticRegression]:
        given = [layer.numpy().astype(dtype) for layer in layers]
        return [LogisticRegression(C=strength, tol=tol, max_iter=most).fit(layer, y.numpy()) for layer in given]

    least = [objective(x[i], y, m.coef_, m.intercept_, strength) for i, m in enumerate(sklearn(x[:2], "float64", 1e-9))]

    def above(heads: list[tuple[Any, Any]]) -> float:
        return max(objective(x[i], y, *heads[i], strength) - low for i, low in enumerate(least))

    def our_fit() -> Heads:
        with matmul_precision("auto", x.device):  # as `task=probe` does
            return logistic_regression(x, y, n_class=classes, C_grid=[strength])

    def ours_above(fit: Heads) -> float:
        return above([(fit.weight[i, 0], fit.bias[i, 0]) for i in range(2)])

    def theirs_above(models: list[LogisticRegression]) -> float:
        return above([(m.coef_, m.intercept_) for m in models[:2]])

    reached = ours_above(our_fit())
    rows: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {"igpt": (our_fit, ours_above)}
    for tol in TOLERANCES:
        near = [dtype for dtype in DTYPES if theirs_above(sklearn(x[:2], dtype, tol)) <= reached]
        for dtype in near or (DTYPES if len(rows) == 1 else ()):
            name = f"scikit-learn {dtype} {tol:g}" + (", as near as ours" if near else ", its default")
            rows[name] = (lambda dtype=dtype, tol=tol: sklearn(x, dtype, tol)), theirs_above
        if near:
            break
    times = machine.time_in_turns({name: machine.with_timer(run) for name, (run, _) in rows.items()}, rounds)
    for name, (_, measure) in rows.items():
        times[name].result = measure(times[name].result)
    return times


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="b", help="of the network that gives features")
    parser.add_argument("--batch", type=int, default=4, help="images of which features are taken")
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--C_grid", type=float, nargs="+", default=[0.01, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # how near each ended is measured and printed instead
        return compare(args)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints all rows."""
    limits = machine.limits("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine.about()}\n{limits}")
    report: dict[str, Any] = {"limits": limits, "fits": {}}
    feature_times = report["features"] = features(args.size, args.batch, args.rounds)
    print(f"\nfeatures of all layers, size {args.size}, {args.batch} images")
    unit = machine.table(feature_times, unit=lambda s: f"{args.batch / s:,.1f} images/s", against="hf as shipped")
    print("\n".join(unit), flush=True)
    x, y = made_up(args.layers, args.images, args.width, 10)
    for strength in args.C_grid:
        times = report["fits"][strength] = fits(x, y, strength, args.rounds)
        peers = [name for name in times if name != "igpt"]
        as_near = min(peers, key=lambda name, times=times: ("as near" not in name, times[name].median))
        print(f"\nlogistic regression {tuple(x.shape)}, C {strength:g}")
        print("\n".join(machine.table(times, unit=lambda s: f"{s:.2f} s", against=as_near)))
        print("above the minimum: " + ", ".join(f"{name} {row.result:.1e}" for name, row in times.items()), flush=True)
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
