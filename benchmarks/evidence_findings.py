"""What the runs in docs/evidence/ show of each finding of the paper: rows of the README's table, with intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from igpt.metric.result import Number, Result
from igpt.metric.statistics import mean_interval
from igpt.report.folder import parse_result
from igpt.report.reference import compare_means
from igpt.utils import files

JOINT, ALONE = "pretrained, L_GEN + L_CLF", "pretrained, L_CLF alone"
SCRATCH = "from scratch, L_CLF alone"


@dataclass(frozen=True)
class Run:
    """A run of a finding: its settings, and its numbers."""

    name: str
    record: Mapping[str, Any]  # run.json
    result: Result
    seconds: float

    @property
    def task(self) -> Mapping[str, Any]:
        """Settings of its task."""
        settings: Mapping[str, Any] = self.record["config"]["task"]
        return settings

    @property
    def seed(self) -> int:
        """The seed of its random choices."""
        seed: int = self.record["config"]["seed"]
        return seed

    def number(self, key: str) -> Number:
        """One number of its result. Raises KeyError if it has no such number."""
        return self.result.numbers[key]


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    finding: str
    paper: str
    ours: str
    holds: str


def read_runs(folder: Path) -> list[Run]:
    """The runs in the folder of a finding, by name; none if it is not there."""
    runs = []
    for record in sorted(folder.glob("*/run.json")):
        written = files.read_json(record.with_name("result.json"))
        runs.append(Run(record.parent.name, files.read_json(record), parse_result(written), written["seconds"]))
    return runs


def percent(number: Number) -> str:
    """`57.1 % [55.7, 58.4]`, or `± 0.4 (std of 5)`."""
    share, interval = f"{100 * number.value:.1f} %", number.confidence_interval
    if number.deviation is not None:
        return f"{share} ± {100 * number.deviation:.1f} (std of {number.n})"
    return share if interval is None else f"{share} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def points(value: float, interval: tuple[float, float] | None) -> str:
    """A difference of shares: `+2.1 points [1.0, 3.2]`."""
    around = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * value:+.1f} points{around}"


def judge(*intervals: tuple[float, float] | None) -> str:
    """`yes` where every interval lies above 0, `no` where one lies below it, else `not shown`."""
    lows = [interval[0] if interval else -np.inf for interval in intervals]
    highs = [interval[1] if interval else np.inf for interval in intervals]
    return "**yes**" if min(lows) > 0 else "**no**" if min(highs) < 0 else "not shown"


def describe_depth(runs: Sequence[Run]) -> Iterator[Row]:
    """Figure 2: accuracy over depth, its fall after the best layer, untrained network and raw pixels."""
    for run in runs:
        objective = run.record["of"]["objective"]
        fall, layer = run.number("val/fall_to_last_layer"), run.number("probe/layer")
        best, others = run.number("val/accuracy"), [run.number("val/untrained"), run.number("val/raw_pixels")]
        above = [compare_shares(best, other) for other in others]
        yield Row(
            f"Features are best inside the network, then get worse ({objective.upper()}; Figure 2)",
            "CIFAR-10: best near the middle, 2.4 points less at the last" if objective == "ar" else "below AR's",
            f"{percent(best)} at layer {layer.value:g} of {layer.unit.split()[-1]}, fall to the last "
            f"{points(fall.value, fall.confidence_interval).removeprefix('+')}; untrained {percent(others[0])}, raw "
            f"pixels {percent(others[1])}",
            judge(fall.confidence_interval, *above),
        )  # fmt: skip


def compare_shares(one: Number, other: Number) -> tuple[float, float]:
    """95 % interval of the difference of two shares, from their Wilson intervals (Newcombe 1998, method 10).

    For shares of the same images, which are alike, it is wider than need be.
    """
    (low, high), (other_low, other_high) = one.confidence_interval or (0, 1), other.confidence_interval or (0, 1)
    difference = one.value - other.value
    below = np.hypot(one.value - low, other_high - other.value)
    above = np.hypot(high - one.value, other.value - other_low)
    return float(difference - below), float(difference + above)


def find_arm(run: Run) -> str:
    """How a network was fine-tuned, from its settings."""
    start = "pretrained" if run.record["config"]["init"] else "from scratch"
    loss = "L_GEN + L_CLF" if run.task["loss_weights"]["gen"] else "L_CLF alone"
    return f"{start}, {loss}"


def choose_rates(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Each arm's runs, a seed each, at the rate with the highest accuracy on val among those of the lowest seed."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(find_arm(run), []).append(run)
    chosen = {}
    for arm, of in arms.items():
        rate = choose_best(of).task["learning_rate"]
        chosen[arm] = sorted((run for run in of if run.task["learning_rate"] == rate), key=lambda run: run.seed)
    return chosen


def choose_best(runs: Sequence[Run]) -> Run:
    """The run with the highest accuracy on val among those of the lowest seed."""
    first = min(run.seed for run in runs)
    return max((run for run in runs if run.seed == first), key=lambda run: run.number("val/accuracy").value)


def average(runs: Sequence[Run], key: str = "test/accuracy") -> Number:
    """Mean of one number over seeds, with their standard deviation."""
    values = [run.number(key).value for run in runs]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Number(float(np.mean(values)), "share of images", len(values), deviation=deviation)


def describe_finetuning(runs: Sequence[Run]) -> Iterator[Row]:
    """Joint against L_CLF alone, pretrained against scratch, fine-tuning against the probe (§2.3)."""
    short, long = split_by_length(runs)
    arms = choose_rates(short)
    joint, longest = arms.get(JOINT), choose_rates(long).get(JOINT)
    for against, finding, paper in (
        (SCRATCH, "Pretraining helps fine-tuning", "ImageNet 48×48: 72.6 % against 53.2 % from scratch"),
        (ALONE, "L_GEN + L_CLF beats L_CLF alone (§2.3)", "the joint loss works even better"),
    ):
        others = arms.get(against)
        if joint and others:
            accuracies = [[run.number("test/accuracy").value for run in arm] for arm in (joint, others)]
            gain = compare_means(*accuracies, lower_is_better=False)
            yield Row(
                finding, paper, f"{describe_arm(joint)} against {describe_arm(others)}: "
                f"{points(gain.value, gain.interval)}", judge(gain.interval),
            )  # fmt: skip
    for probe in (run for run in runs if run.task["name"] == "probe" and longest):
        assert longest is not None
        read, mean = probe.number("test/accuracy"), average(longest)
        gain = compare_shares(replace(mean, interval=bound_mean(longest)), read)
        yield Row(
            "Fine-tuning passes the probe", "CIFAR-10: 99.0 % against 96.3 %",
            f"{describe_arm(longest)} against {percent(read)} of the probe with the same labels: "
            f"{points(mean.value - read.value, gain)}", judge(gain),
        )  # fmt: skip


def split_by_length(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Of the runs of fine-tuning those with the fewest steps, which are compared, and those with the most."""
    tuned = [run for run in runs if run.task["name"] == "finetune"]
    steps = [run.task["steps"] for run in tuned]
    fewest, most = (of(steps, default=0) for of in (min, max))
    return [run for run in tuned if run.task["steps"] == fewest], [run for run in tuned if run.task["steps"] == most]


def describe_arm(runs: Sequence[Run]) -> str:
    """`61.2 % ± 0.4 (std of 3) at rate 0.001, 24,000 images`; of one seed its interval."""
    accuracy = average(runs) if len(runs) > 1 else runs[0].number("test/accuracy")
    task = runs[0].task
    return f"{percent(accuracy)} at rate {task['learning_rate']:g}, {task['steps'] * task['batch_size']:,} images"


def bound_mean(runs: Sequence[Run]) -> tuple[float, float]:
    """95 % interval of the mean test accuracy of several seeds, over seeds (Student's t) and test images.

    The half-widths are added as squares; that over images is the largest of one seed, as all saw the same images. One
    seed has no interval over seeds: it is over images alone.
    """
    numbers = [run.number("test/accuracy") for run in runs]
    values = [number.value for number in numbers]
    intervals = [number.confidence_interval or (0.0, 1.0) for number in numbers]
    over_images = max(max(x - low, high - x) for x, (low, high) in zip(values, intervals, strict=True))
    mean, over_seeds = float(np.mean(values)), 0.0
    if len(values) > 1:
        _, (_, high) = mean_interval(values)
        over_seeds = high - mean
    reach = float(np.hypot(over_images, over_seeds))
    return mean - reach, mean + reach


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


def describe_objectives(runs: Sequence[Run]) -> Iterator[Row]:
    """Figure 4: next against masked pixels, probed and fine-tuned."""
    for task, finding, paper in (
        ("probe", "A probe reads AR's features better than BERT's (Figure 4)", "ImageNet: BERT 6 points below AR"),
        ("finetune", "Fine-tuning makes BERT catch up (Figure 4)", "CIFAR-10: 99.0 % AR, 98.6 % BERT"),
    ):
        by_objective: dict[str, list[Run]] = {}
        for run in runs:
            if run.task["name"] == task:
                by_objective.setdefault(run.record["of"]["objective"], []).append(run)
        if len(by_objective) == 2:
            ar, bert = (choose_best(by_objective[name]).number("test/accuracy") for name in ("ar", "bert"))
            gap = compare_shares(ar, bert)
            yield Row(
                finding, paper, f"AR {percent(ar)}, BERT {percent(bert)}: {points(ar.value - bert.value, gap)}",
                judge(gap) if task == "probe" else "",
            )  # fmt: skip


def describe_losses(runs: Sequence[Run]) -> Iterator[Row]:
    """Figure 3: rank correlation of loss and probe accuracy over all points, and the accuracy at equal loss."""
    for run in runs:
        together = run.number("all/rank_correlation")
        yield Row(
            "A better loss goes with a better probe (Figure 3)", "within each run, and from S to M to L",
            f"rank correlation over {together.n} checkpoints: {together.value:.2f} [{{:.2f}}, {{:.2f}}]".format(
                *(together.confidence_interval or (-1, 1))
            ),
            judge(together.confidence_interval),
        )  # fmt: skip


FINDINGS: dict[str, Callable[[Sequence[Run]], Iterator[Row]]] = {
    "network": lambda runs: iter(()),  # the pretraining that the others read: no finding of its own
    "depth": describe_depth,
    "finetuning": describe_finetuning,
    "low_data": describe_low_data,
    "objectives": describe_objectives,
    "losses": describe_losses,
}
