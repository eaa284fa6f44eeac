"""What the runs in docs/evidence/ show of each finding of the paper: rows of the README's table, with intervals."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

from evidence_palettes import describe_palettes
from evidence_runs import (
    ALONE,
    JOINT,
    SCRATCH,
    Row,
    Run,
    bound_mean,
    bounds,
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

ONE_MASK, VOTE = "test/accuracy_one_mask", "test/gain_by_vote"  # without the vote; with it, minus that


def describe_depth(runs: Sequence[Run]) -> Iterator[Row]:
    """Figure 2: accuracy over depth, its fall after the best layer, untrained network and raw pixels."""
    for run in runs:
        objective, again = run.objective, f", seed {run.seed}" if run.seed else ""
        fall, layer = run.number("val/fall_to_last_layer"), run.number("probe/layer")
        best, others = run.number("val/accuracy"), [run.number("val/untrained"), run.number("val/raw_pixels")]
        above = [subtract(best, other).interval for other in others]
        yield Row(
            f"Features are best inside the network, then get worse ({objective.upper()}{again}; Figure 2)",
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
                    f"{points(value, interval)}{say_single(arms[JOINT], arms[against])}", judge(interval),
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
        f"{points(gap.value, gap.interval)}{say_single(tuned)}", judge(gap.interval),
    )  # fmt: skip


def say_single(*arms: Sequence[Run]) -> str:
    """` (one seed, interval over images)` where no arm has several; else nothing."""
    if any(len(arm) > 1 for arm in arms):
        return ""
    return f" (one seed{' each' if len(arms) > 1 else ''}, interval over images)"


def describe_low_data(runs: Sequence[Run]) -> Iterator[Row]:
    """Few labels: the best layer's features against raw pixels, and a supervised network's beside them."""
    paper = {4: "73.2 %", 25: "87.6 %", 400: "94.3 % (from memory)"}
    pairs = [(count, run) for run in runs for count in run.task["per_class"]]
    for count, run in sorted(pairs, key=itemgetter(0)):
        ours, pixels = (run.number(f"test/{of}_{count}_per_class") for of in ("accuracy", "raw_pixels"))
        gain = run.number(f"test/gain_over_raw_pixels_{count}_per_class")
        lite0 = run.result.numbers.get(f"test/lite0_{count}_per_class")
        beside = "" if lite0 is None else f"; EfficientNet-Lite0, trained on ImageNet's labels: {percent(lite0)}"
        yield Row(
            f"{10 * count:,} labels: features are worth more than raw pixels", f"{paper[count]}, of iGPT-L",
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
    for labels, of in probes.items():
        if VOTE in of["bert"].result.numbers:
            bert, one, gap = (of["bert"].number(key) for key in ("test/accuracy", ONE_MASK, VOTE))
            yield Row(
                f"BERT's probe gains by a vote over five masks ({labels})", "ImageNet: almost 1 point",
                f"{percent(bert)}, under one mask {percent(one)}: {points(gap.value, gap.confidence_interval)}",
                judge(gap.confidence_interval),
            )  # fmt: skip
    for of in list(probes.values())[-1:]:  # of the most labels
        ar, bert = (of[name].number("test/accuracy") for name in ("ar", "bert"))
        gap = subtract(ar, bert)
        yield Row(
            "A probe reads AR's features better than BERT's (Figure 4)", "ImageNet: BERT 6 points below AR",
            f"AR {percent(ar)}, BERT {percent(bert)}: {points(gap.value, gap.interval)}", judge(gap.interval),
        )  # fmt: skip
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
            f"{points(closed.value, closed.interval).removeprefix('+')}{say_single(tuned['ar'], tuned['bert'])}",
            judge(closed.interval),
        )  # fmt: skip
        paper = "CIFAR-10: 98.6 % against less than 95.3 %"
        yield compare_with_probe(tuned["bert"], probes[same]["bert"], "Fine-tuning passes the probe (BERT)", paper)


def describe_losses(runs: Sequence[Run]) -> Iterator[Row]:
    """Figure 3: rank correlation of loss and probe accuracy over all points, and the accuracy at equal loss."""
    for run in (run for run in runs if run.task["name"] == "scaling"):
        probed, names = run.result.provenance["probed_images"], list(run.result.provenance["weights"])
        along = [run.number(f"{name}/rank_correlation") for name in names]
        told = ", ".join(f"{name} {correlation(of)}" for name, of in zip(names, along, strict=True))
        yield Row(
            f"Along a training, a better loss goes with a better probe (of {probed}; Figure 3)", "yes",
            f"rank correlation over {along[0].n} weights each: {told}; over all, "
            f"{correlation(run.number('all/rank_correlation'))}".replace("igpt_", ""),
            judge(*(of.confidence_interval for of in along)),
        )  # fmt: skip
        gaps = list_gaps(run)
        told = ", ".join(f"{pair}: {points(gap.value, gap.interval)}" for pair, gap in gaps.items())
        yield Row(
            f"At equal loss the larger network's probe is better (of {probed}; Figure 3)", "bigger models do better",
            f"{told} (one seed each, intervals over images)".replace("igpt_", "") if gaps else "no losses overlap",
            judge(*(gap.interval for gap in gaps.values())),
        )  # fmt: skip


def correlation(number: Number) -> str:
    """`0.94 [0.28, 1.00]`."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(number.value, *bounds(number))


def list_gaps(run: Run) -> dict[str, Number]:
    """`igpt_nano - igpt_pico` → how much more the larger one's probe reads at equal loss."""
    start = "equal_loss/"
    return {key.removeprefix(start): of for key, of in run.result.numbers.items() if key.startswith(start)}


def describe_at_32(runs: Sequence[Run]) -> Iterator[Row]:
    """Depth and fine-tuning at the paper's 32×32 in 512 colours."""
    probes = [run for run in runs if run.task["name"] == "probe"]
    depth = describe_depth([run for run in probes if run.data["labels_per_class"] is None])
    few = [run for run in probes if run.data["labels_per_class"] is not None]
    tuned = describe_finetuning([*few, *(run for run in runs if run.task["name"] == "finetune")])
    yield from (replace(row, finding=f"{row.finding}, at 32×32") for row in (*depth, *tuned))


FINDINGS: dict[str, Callable[[Sequence[Run]], Iterator[Row]]] = {
    "network": lambda runs: iter(()),  # the pretraining that the others read: no finding of its own
    "depth": describe_depth,
    "finetuning": describe_finetuning,
    "low_data": describe_low_data,
    "objectives": describe_objectives,
    "losses": describe_losses,
    "palette": describe_palettes,
    "at_32": describe_at_32,
}
READS = {"objectives": ("depth", "finetuning")}  # further folders that a finding reads
