"""Rows of the evidence's table: what they compare, with which intervals, and when a finding holds."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from igpt.metric.result import Number
from tests.evidence.conftest import write_numbers, write_record, write_run


def share(value: float, low: float, high: float) -> Number:
    return Number(value, "share of images", 100, interval=(low, high))


def test_interval_of_a_difference_is_newcombes(reading: ModuleType) -> None:
    """56 of 70 against 48 of 80: method 10 of Newcombe (1998, table II, a) gives [0.0524, 0.3339]."""
    from scipy.stats import binomtest

    wilson = [binomtest(k, n).proportion_ci(method="wilson") for k, n in ((56, 70), (48, 80))]
    one, other = (share(k / n, of.low, of.high) for (k, n), of in zip(((56, 70), (48, 80)), wilson, strict=True))
    difference = reading.subtract(one, other)
    assert difference.value == pytest.approx(0.2)
    assert difference.interval == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.01, 0.02), (0.1, 0.2)], "**yes**"),
        ([(0.01, 0.02), (-0.1, 0.2)], "not shown"),
        ([(-0.2, -0.1)], "**no**"),
        ([(-0.2, -0.1), (0.1, 0.2)], "**no**"),
        ([None], "not shown"),
        ([], "not shown"),
    ],
)
def test_a_finding_holds_only_beyond_every_interval(reading: ModuleType, intervals: Any, verdict: str) -> None:
    assert reading.judge(*intervals) == verdict


def test_the_rate_is_chosen_on_val_and_the_seeds_are_its(reading: ModuleType, tmp_path: Path) -> None:
    """The rate of the best val accuracy wins, not that of the best test accuracy."""
    for name, rate, seed, val, test in (
        ("a", 0.1, 0, 0.60, 0.50), ("b", 0.2, 0, 0.55, 0.90), ("c", 0.1, 1, 0.10, 0.54), ("d", 0.1, 2, 0.10, 0.58),
    ):  # fmt: skip
        write_run(tmp_path / name, rate=rate, seed=seed, val=val, test=test)
    ((arm, chosen),) = reading.choose_rates(reading.read_runs(tmp_path)).items()
    assert arm == reading.JOINT
    assert [run.number("test/accuracy").value for run in chosen] == [0.50, 0.54, 0.58]
    assert reading.bound_mean(chosen).value == pytest.approx(0.54)
    assert "± 4.0 (std of 3)" in reading.describe_arm(chosen)


def test_the_interval_over_seeds_and_images_has_both_parts(reading: ModuleType, tmp_path: Path) -> None:
    """Independent source: scipy's t interval of the seeds, beside 2 points over images, which one seed has alone."""
    from scipy.stats import ttest_1samp

    tests = (0.50, 0.54, 0.58)
    for seed, test in enumerate(tests):
        write_run(tmp_path / str(seed), rate=0.1, seed=seed, val=0.5, test=test)
    runs = reading.read_runs(tmp_path)
    low, high = ttest_1samp(tests, 0.0).confidence_interval(0.95)
    reach = (((high - low) / 2) ** 2 + 0.02**2) ** 0.5
    assert reading.bound_mean(runs).value == pytest.approx(0.54)
    assert reading.bound_mean(runs).interval == pytest.approx((0.54 - reach, 0.54 + reach))
    assert reading.bound_mean(runs[:1]).interval == pytest.approx((0.48, 0.52))


def test_objectives_are_compared_at_the_rates_chosen_on_val(
    findings: ModuleType, reading: ModuleType, tmp_path: Path
) -> None:
    """By hand: each objective's second rate is better on val, so 60 % against 58 %; the probes are 20 points apart."""
    for objective, accuracies in (("ar", (0.70, 0.60)), ("bert", (0.20, 0.58))):
        for name, rate, val, test in zip("ab", (0.1, 0.2), (0.50, 0.55), accuracies, strict=True):
            folder = tmp_path / f"{objective}-{name}"
            write_run(folder, rate=rate, seed=0, val=val, test=test)
            write_record(folder, of={"objective": objective}, data={"labels_per_class": 10})
        probe = tmp_path / f"{objective}-probe"
        write_run(probe, rate=0, seed=0, val=0.5, test={"ar": 0.55, "bert": 0.35}[objective])
        write_record(probe, of={"objective": objective}, data={"labels_per_class": 10}, task={"name": "probe"})
        write_numbers(
            probe, test__accuracy_one_mask={"value": 0.30, "interval": [0.28, 0.32]},
            test__gain_by_vote={"value": 0.05, "stderr": 0.01},
        )  # fmt: skip
        y = {"ar": [0.3, 0.5, 0.6], "bert": [0.3, 0.4, 0.57]}[objective]
        curve = {"x": [0.0, 1.0, 2.0], "y": y, "x_unit": "layer", "y_unit": "accuracy"}
        result = json.loads((probe / "result.json").read_text())
        result["curves"]["probe, val"] = {**curve, "y_intervals": [[of - 0.02, of + 0.02] for of in y]}
        (probe / "result.json").write_text(json.dumps(result))
    rows = {row.finding: row for row in findings.describe_objectives(reading.read_runs(tmp_path))}
    voted, probed, layers, closed, passed = rows.values()
    assert layers.ours == "the smallest difference is +3.0 points [0.2, 5.8], at layer 2"  # 2 and 3 points: √8 around
    assert probed.ours.startswith("AR 55.0 % [53.0, 57.0], BERT 35.0 % [33.0, 37.0]: +20.0 points [17.2, 22.8]")
    assert voted.ours.endswith("+5.0 points [3.0, 7.0]")
    assert "AR 60.0 %" in closed.ours
    assert "BERT 58.0 %" in closed.ours
    assert "larger by 18.0 points [14.0, 22.0]" in closed.ours  # 2 · 2 points: four intervals of ± 2
    assert passed.ours.endswith("+23.0 points [20.2, 25.8] (one seed, interval over images)")
    assert {row.holds for row in rows.values()} == {"**yes**"}
    result["curves"]["probe, val"]["y_intervals"][1] = [0.2, 0.6]  # BERT's at layer 1, 10 points below AR's
    (probe / "result.json").write_text(json.dumps(result))
    again = list(findings.describe_objectives(reading.read_runs(tmp_path)))[2]
    assert (again.ours, again.holds) == (layers.ours, "not shown")


def test_losses_tell_every_pair_of_sizes(findings: ModuleType, reading: ModuleType, tmp_path: Path) -> None:
    """By hand: the finding holds where the gap of every pair lies above 0."""
    for name, low in (("a", 0.01), ("b", -0.01)):
        write_run(tmp_path / name, rate=0, seed=0, val=0.5, test=0.5)
        write_record(tmp_path / name, task={"name": "scaling"})
        gaps = {"equal_loss__igpt_b - igpt_a": {"value": 0.03, "interval": [0.02, 0.04]},
                "equal_loss__igpt_c - igpt_b": {"value": 0.02, "interval": [low, 0.03]}}  # fmt: skip
        along = {f"{size}__rank_correlation": {"value": 0.9, "interval": [0.6, 1.0], "n": 5} for size in "abc"}
        over_all = {"value": 0.8, "interval": [0.5, 0.9], "n": 15}
        write_numbers(tmp_path / name, all__rank_correlation=over_all, **along, **gaps)
        result = json.loads((tmp_path / name / "result.json").read_text())
        result["provenance"] |= {"probed_images": f"images {name}", "weights": {size: [] for size in "abc"}}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    of_a, equal_a, _, equal_b = findings.describe_losses(reading.read_runs(tmp_path))
    each = ", ".join(f"{size} 0.90 [0.60, 1.00]" for size in "abc")
    assert of_a.ours == f"rank correlation over 5 weights each: {each}; over all, 0.80 [0.50, 0.90]"
    assert equal_a.ours.startswith("b - a: +3.0 points [2.0, 4.0], c - b: +2.0 points [1.0, 3.0] (one seed each")
    assert "images a" in equal_a.finding
    assert (of_a.holds, equal_a.holds, equal_b.holds) == ("**yes**", "**yes**", "not shown")


def test_palettes_are_compared_in_bits_of_the_original(
    findings: ModuleType, reading: ModuleType, tmp_path: Path
) -> None:
    """By hand: ln 4 nats are 2 bits; 2 + 10 bits of four colours against 4 + 7 of sixteen, one fewer."""
    for k, order, seed, nats, rest, test in (
        (4, "raster", 0, np.log(4), 10, 0.30), (16, "raster", 0, np.log(16), 7, 0.35),
        (4, "random", 0, np.log(4) + 0.2, 10, 0.20), (4, "random", 1, np.log(4) + 0.3, 10, 0.21),
        (4, "raster", 1, np.log(4) + 0.1, 10, 0.31),
    ):  # fmt: skip
        folder = tmp_path / f"{k}-{order}-{seed}"
        write_run(folder, rate=0, seed=seed, val=0.5, test=0.5)
        write_record(folder, data={"palette_size": k}, tokens={"order": order})
        write_numbers(
            folder, pretrain__val__loss_gen={"value": nats, "stderr": 0.01 * np.log(2)},
            palette__val__palette_remainder={"value": rest, "stderr": 0.02},
            probe__test__accuracy={"value": test, "interval": [test - 0.01, test + 0.01]},
        )  # fmt: skip
    size, features, order = findings.describe_palettes(reading.read_runs(tmp_path))
    assert size.ours.startswith("bits a pixel by colours: 4: 12.00 [11.94, 12.06], 16: 11.00 [10.94, 11.06]")
    assert "16 against 4: +5.0 points [3.6, 6.4]" in features.ours
    assert "random order costs 0.200 [" in order.ours
    assert "(2 seeds each), and its probe is 10.0 points [" in order.ours
    assert (size.holds, features.holds) == ("**yes**", "**yes**")


def test_every_arm_of_the_picture_has_an_interval(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant: its axis promises 95 % intervals."""
    for seed, test in enumerate((0.50, 0.54)):
        write_run(tmp_path / "finetuning" / str(seed), rate=0.1, seed=seed, val=0.5, test=test)
    drawn: list[Any] = []
    monkeypatch.setattr(evidence, "bars_figure", lambda path, bars: drawn.append(bars))
    evidence.draw_finetuning(tmp_path)
    ((number,),) = (group.values() for group in drawn[0].heights.values())
    assert number.confidence_interval[0] < 0.5 < 0.54 < number.confidence_interval[1]


def test_the_longest_runs_are_compared_with_the_probe_alone(reading: ModuleType, tmp_path: Path) -> None:
    for name, steps, seed in (("a", 10, 0), ("b", 10, 1), ("c", 30, 0)):
        write_run(tmp_path / name, rate=0.1, seed=seed, val=0.5, test=0.5, steps=steps)
    short, long = reading.split_by_length(reading.read_runs(tmp_path))
    assert [run.name for run in short] == ["a", "b"]
    assert [run.name for run in long] == ["c"]
    assert reading.describe_arm(short) == "50.0 % ± 0.0 (std of 2) at rate 0.1, 20 images"
    assert reading.describe_arm(long) == "50.0 % [48.0, 52.0] at rate 0.1, 60 images"


def test_an_arm_of_one_seed_is_compared_over_images(reading: ModuleType, tmp_path: Path) -> None:
    """By hand: two seeds around 56 % against one of 50 %; the interval has seeds and images of both."""
    for name, seed, test in (("a", 0, 0.55), ("b", 1, 0.57), ("c", 0, 0.50)):
        write_run(tmp_path / name, rate=0.1, seed=seed, val=0.5, test=test)
    a, b, c = reading.read_runs(tmp_path)
    value, (low, high) = reading.compare_arms([a, b], [c])
    assert value == pytest.approx(0.06)
    reach = reading.bound_mean([a, b]).interval[1] - 0.56
    assert (value - low, high - value) == pytest.approx((np.hypot(reach, 0.02),) * 2)
    assert reading.compare_arms([a], [c])[1] == pytest.approx((0.05 - 8**0.5 / 100, 0.05 + 8**0.5 / 100))
