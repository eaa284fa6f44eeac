"""What the runs of docs/evidence/palette show: rows of the README's table, and what its pictures are made of."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from evidence_runs import Row, Run, bits, compare_arms, judge, percent, points, subtract

from igpt.metric.result import Number
from igpt.report.reference import compare_means


def describe_palettes(runs: Sequence[Run]) -> Iterator[Row]:
    """What the paper assumes: 512 colours, and raster order."""
    sizes = list_palettes(runs)
    if len(sizes) > 1:
        smallest, largest = min(sizes), max(sizes)
        ordered = [run for _, run in sorted(sizes.items())]
        steps = [subtract(*map(original_bits, pair)).interval for pair in pairwise(ordered)]
        series = ", ".join(f"{k}: {bits(original_bits(run))}" for k, run in sorted(sizes.items()))
        yield Row(
            "Each finer palette codes the original image in fewer bits", "512 colours, as an assumption",
            f"bits a pixel by colours: {series} (the tokens in context, the rest of each colour without)",
            judge(*steps),
        )  # fmt: skip
        read = {k: run.number("probe/test/accuracy") for k, run in sorted(sizes.items())}
        gap, series = (
            subtract(read[largest], read[smallest]),
            ", ".join(f"{k}: {percent(of)}" for k, of in read.items()),
        )
        yield Row(
            "The features of a finer palette are read better", "512 colours, as an assumption",
            f"by colours: {series}; {largest} against {smallest}: {points(gap.value, gap.interval)}",
            judge(gap.interval),
        )  # fmt: skip
    raster, random = (list_orders(runs).get(order, []) for order in ("raster", "random"))
    if raster and random:
        losses = [[run.number("pretrain/val/loss_gen").value for run in of] for of in (random, raster)]
        loss = compare_means(*losses, lower_is_better=True)
        value, interval = compare_arms(raster, random, "probe/test/accuracy")
        around = "" if loss.interval is None else " [{:.3f}, {:.3f}]".format(*loss.interval)
        yield Row(
            "Raster order is easier to learn than a random one", "assumed",
            f"random order costs {loss.value:.3f}{around} nats a token more ({len(random)} seeds each), and its probe "
            f"is {points(value, interval).removeprefix('+')} worse", judge(loss.interval, interval),
        )  # fmt: skip


def list_palettes(runs: Sequence[Run]) -> dict[int, Run]:
    """The runs of seed 0 in raster order, by palette size."""
    return {run.data["palette_size"]: run for run in runs if run.seed == 0 and run.order == "raster"}


def list_orders(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of the palette size that random order was tried with, by order; each by seed."""
    sizes = {
        of.record["config"]["data"]["palette_size"] for of in runs if of.record["config"]["tokens"]["order"] != "raster"
    }
    by_order: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.record["config"]["data"]["palette_size"] in sizes:
            by_order.setdefault(run.record["config"]["tokens"]["order"], []).append(run)
    return by_order


def original_bits(run: Run) -> Number:
    """Code length of the original image in bits a pixel: the network's of the tokens, and what the palette leaves out.

    The standard errors of both are added, as if the same images were long in both.
    """
    loss, rest = run.number("pretrain/val/loss_gen"), run.number("palette/val/palette_remainder")
    stderr = (loss.stderr or 0) / math.log(2) + (rest.stderr or 0)
    return Number(loss.value / math.log(2) + rest.value, "bits/pixel", min(loss.n, rest.n), stderr)
