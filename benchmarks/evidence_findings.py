"""What the runs in docs/evidence/ show of each finding of the paper: rows of the README's table, with intervals."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from evidence_runs import (
    ALONE,
    JOINT,
    SCRATCH,
    Run,
    bits,
    bound_mean,
    choose_rates,
    choose_rates_by_objective,
    compare_arms,
    describe_arm,
    describe_labels,
    group_by_labels,
    group_by_objective,
    judge,
    percent,
    points,
    split_by_length,
    subtract,
)

from igpt.metric.result import Number
from igpt.report.reference import compare_means

ONE_MASK = "test/accuracy_one_mask"  # without the vote


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    finding: str
    paper: str
    ours: str
    holds: str


def describe_depth(runs: Sequence[Run]) -> Iterator[Row]:
    """Figure 2: accuracy over depth, its fall after the best layer, untrained network and raw pixels."""
    for run in runs:
        objective = run.objective
        fall, layer = run.number("val/fall_to_last_layer"), run.number("probe/layer")
        best, others = run.number("val/accuracy"), [run.number("val/untrained"), run.number("val/raw_pixels")]
        above = [subtract(best, other).interval for other in others]
        yield Row(
            f"Features are best inside the network, then get worse ({objective.upper()}; Figure 2)",
            "CIFAR-10: best near the middle, 2.4 points less at the last" if objective == "ar" else "no number",
            f"{percent(best)} at layer {layer.value:g} of {layer.unit.split()[-1]}, fall to the last "
            f"{points(fall.value, fall.confidence_interval).removeprefix('+')}; untrained {percent(others[0])}, raw "
            f"pixels {percent(others[1])}",
            judge(fall.confidence_interval, *above),
        )  # fmt: skip


def describe_finetuning(runs: Sequence[Run]) -> Iterator[Row]:
    """Joint against L_CLF alone, pretrained against scratch, fine-tuning against the probe (§2.3)."""
    by_length = [choose_rates(of) for of in split_by_length(runs)]
    for against, finding, paper in (
        (SCRATCH, "Pretraining helps fine-tuning", "ImageNet 48×48: 72.6 % against 53.2 % from scratch"),
        (ALONE, "L_GEN + L_CLF beats L_CLF alone (§2.3)", "the joint loss works even better"),
    ):
        for arms in by_length:
            if JOINT in arms and against in arms:
                value, interval = compare_arms(arms[JOINT], arms[against])
                yield Row(
                    finding, paper, f"{describe_arm(arms[JOINT])} against {describe_arm(arms[against])}: "
                    f"{points(value, interval)}", judge(interval),
                )  # fmt: skip
    longest = by_length[-1].get(JOINT) if by_length else None
    for probe in (run for run in runs if run.task["name"] == "probe" and longest):
        assert longest is not None
        yield compare_with_probe(longest, probe, "Fine-tuning passes the probe", "CIFAR-10: 99.0 % against 96.3 %")


def compare_with_probe(tuned: Sequence[Run], probe: Run, finding: str, paper: str) -> Row:
    """The row of fine-tuning against a probe of the same labels."""
    read = probe.number("test/accuracy")
    gap = subtract(bound_mean(tuned), read)
    return Row(
        finding, paper, f"{describe_arm(tuned)} against {percent(read)} of the probe with the same labels: "
        f"{points(gap.value, gap.interval)}", judge(gap.interval),
    )  # fmt: skip


def describe_low_data(runs: Sequence[Run]) -> Iterator[Row]:
    """Few labels: the best layer's features against raw pixels, and a supervised network's beside them."""
    for run in runs:
        for count, paper in ((4, "73.2 %"), (25, "87.6 %"), (400, "94.3 % (from memory)")):
            ours, pixels = (
                run.number(f"test/accuracy_{count}_per_class"),
                run.number(f"test/raw_pixels_{count}_per_class"),
            )
            gain = run.number(f"test/gain_over_raw_pixels_{count}_per_class")
            lite0 = run.result.numbers.get(f"test/lite0_{count}_per_class")
            beside = "" if lite0 is None else f"; EfficientNet-Lite0, trained on ImageNet's labels: {percent(lite0)}"
            yield Row(
                f"{10 * count:,} labels: features are worth more than raw pixels", f"{paper}, of iGPT-L",
                f"{percent(ours)} against {percent(pixels)} from raw pixels: "
                f"{points(gain.value, gain.confidence_interval)}{beside}", judge(gain.confidence_interval),
            )  # fmt: skip


def list_probes(runs: Sequence[Run]) -> dict[str, dict[str, Run]]:
    """Labels → objective → its probe, where both objectives have one; the fewest labels first."""
    probes = {}
    for of in group_by_labels(run for run in runs if run.task["name"] == "probe"):
        by_objective = {name: min(each, key=lambda run: run.seed) for name, each in group_by_objective(of).items()}
        if len(by_objective) == 2:
            probes[describe_labels(of[0].data["labels_per_class"])] = by_objective
    return probes


def list_tuned(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Objective → its joint fine-tunings, of the longest that both objectives have; empty if there is none."""
    lengths = [choose_rates_by_objective(of) for of in split_by_length(runs)]
    return next((of for of in reversed(lengths) if len(of) == 2), {})


def list_compared(runs: Sequence[Run]) -> dict[str, dict[str, Number]]:
    """What is compared of AR and BERT → objective → test accuracy with its interval."""
    compared = {
        f"probe, {labels}": {name: run.number("test/accuracy") for name, run in of.items()}
        for labels, of in list_probes(runs).items()
    }
    if tuned := list_tuned(runs):
        images = tuned["ar"][0].task["steps"] * tuned["ar"][0].task["batch_size"]
        labels = describe_labels(tuned["ar"][0].data["labels_per_class"])
        compared[f"fine-tuned, {labels}, {images:,} images"] = {name: bound_mean(of) for name, of in tuned.items()}
    return compared


def compare_layers(one: Run, other: Run) -> dict[int, Number]:
    """Difference of two depth curves at each layer above the embedding, on val."""
    curves = [run.result.curves["probe, val"] for run in (one, other)]
    layers = [
        [Number(y, "share", 1, interval=interval) for y, interval in zip(curve.y, curve.y_intervals or (), strict=True)]
        for curve in curves
    ]
    return {i: subtract(*pair) for i, pair in enumerate(zip(*layers, strict=True)) if i > 0}


def describe_objectives(runs: Sequence[Run]) -> Iterator[Row]:
    """Figure 4: next against masked pixels, probed and fine-tuned; a vote over masks."""
    probes, tuned = list_probes(runs), list_tuned(runs)
    for of in list(probes.values())[-1:]:  # of the most labels
        ar, bert, one = (*(of[name].number("test/accuracy") for name in ("ar", "bert")), of["bert"].number(ONE_MASK))
        for finding, paper, told, gap in (
            ("A probe reads AR's features better than BERT's (Figure 4)", "ImageNet: BERT 6 points below AR",
             f"AR {percent(ar)}, BERT {percent(bert)}", subtract(ar, bert)),
            ("BERT's probe gains by a vote over five masks", "ImageNet: almost 1 point",
             f"{percent(bert)}, under one mask {percent(one)}", subtract(bert, one)),
        ):  # fmt: skip
            yield Row(finding, paper, f"{told}: {points(gap.value, gap.interval)}", judge(gap.interval))
        gaps = compare_layers(of["ar"], of["bert"])
        layer, gap = min(gaps.items(), key=lambda each: each[1].value)
        yield Row(
            "BERT's probe is below AR's at every layer (Figure 4)", "yes",
            f"the smallest difference is {points(gap.value, gap.interval)}, at layer {layer}",
            judge(*(each.interval for each in gaps.values())),
        )  # fmt: skip
    same = describe_labels(tuned["ar"][0].data["labels_per_class"]) if tuned else ""
    if same in probes:
        read = {name: run.number("test/accuracy") for name, run in probes[same].items()}
        before, after = subtract(read["ar"], read["bert"]), subtract(bound_mean(tuned["ar"]), bound_mean(tuned["bert"]))
        closed = subtract(before, after)
        yield Row(
            "Fine-tuning brings BERT closer to AR (Figure 4)", "CIFAR-10: 99.0 % AR, 98.6 % BERT",
            f"AR {describe_arm(tuned['ar'])}, BERT {describe_arm(tuned['bert'])}: "
            f"{points(after.value, after.interval)}; the probes' difference with the same labels is larger by "
            f"{points(closed.value, closed.interval).removeprefix('+')}",
            judge(closed.interval),
        )  # fmt: skip
        paper = "CIFAR-10: 98.6 % against less than 95.3 %"
        yield compare_with_probe(tuned["bert"], probes[same]["bert"], "Fine-tuning passes the probe (BERT)", paper)


def describe_losses(runs: Sequence[Run]) -> Iterator[Row]:
    """Figure 3: rank correlation of loss and probe accuracy over all points, and the accuracy at equal loss."""
    for run in (run for run in runs if run.task["name"] == "scaling"):
        together, probed = run.number("all/rank_correlation"), run.result.provenance["probed_images"]
        sizes = len(run.result.provenance["weights"])
        yield Row(
            f"A better loss goes with a better probe (of {probed}; Figure 3)", "within each run, and from S to M to L",
            f"rank correlation over {together.n} checkpoints of {sizes} sizes: {together.value:.2f} "
            "[{:.2f}, {:.2f}]".format(*(together.confidence_interval or (-1, 1))), judge(together.confidence_interval),
        )  # fmt: skip
        gaps = list_gaps(run)
        told = ", ".join(f"{pair}: {points(gap.value, gap.interval)}" for pair, gap in gaps.items())
        yield Row(
            f"At equal loss the larger network's probe is better (of {probed}; Figure 3)", "bigger models do better",
            told.replace("igpt_", "") or "no losses overlap", judge(*(gap.interval for gap in gaps.values())),
        )  # fmt: skip


def list_gaps(run: Run) -> dict[str, Number]:
    """`igpt_nano - igpt_pico` → how much more the larger one's probe reads at equal loss."""
    start = "equal_loss/"
    return {key.removeprefix(start): of for key, of in run.result.numbers.items() if key.startswith(start)}


def describe_palettes(runs: Sequence[Run]) -> Iterator[Row]:
    """What the paper assumes: 512 colours, and raster order."""
    sizes = list_palettes(runs)
    if len(sizes) > 1:
        (smallest, small), (largest, large) = min(sizes.items()), max(sizes.items())
        for finding, numbers in (
            ("A finer palette codes the original image in fewer bits", [original_bits(run) for run in (small, large)]),
            ("… and its features are read as well", [run.number("probe/test/accuracy") for run in (large, small)]),
        ):
            gap = subtract(*numbers)
            is_share = gap.unit == "share"
            told = points(gap.value, gap.interval) if is_share else bits(gap)
            series = ", ".join(
                f"{k}: {percent(of.number('probe/test/accuracy')) if is_share else bits(original_bits(of))}"
                for k, of in sorted(sizes.items())
            )
            yield Row(
                finding, "512 colours “encode faithfully”",
                f"{series} (colours: {'accuracy' if is_share else 'bits a pixel'}); {largest} against {smallest}: "
                f"{told}{'' if is_share else ' fewer'}", judge(gap.interval),
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


FINDINGS: dict[str, Callable[[Sequence[Run]], Iterator[Row]]] = {
    "network": lambda runs: iter(()),  # the pretraining that the others read: no finding of its own
    "depth": describe_depth,
    "finetuning": describe_finetuning,
    "low_data": describe_low_data,
    "objectives": describe_objectives,
    "losses": describe_losses,
    "palette": describe_palettes,
}
READS = {"objectives": ("depth", "finetuning")}  # further folders that a finding reads
