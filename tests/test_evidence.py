"""docs/evidence/ and the table that README.md makes of it: numbers are those of the files, and no path of a machine."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from igpt.metric.result import Number

ROOT = Path(__file__).parents[1]
MACHINE = re.compile(r"(?<![\w.])(/(tmp|root|home|work|mnt|Users)|~)/")  # a path that a place in a list may precede
RUNS = sorted((ROOT / "docs" / "evidence").glob("*/*/run.json"))


@pytest.fixture(scope="module")
def evidence() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import evidence

    yield evidence
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def findings(evidence: ModuleType) -> ModuleType:
    import evidence_findings

    found: ModuleType = evidence_findings
    return found


@pytest.fixture(scope="module")
def reading(evidence: ModuleType) -> ModuleType:
    import evidence_runs

    read: ModuleType = evidence_runs
    return read


def share(value: float, low: float, high: float) -> Number:
    return Number(value, "share of images", 100, interval=(low, high))


def test_tables_are_what_the_files_give(evidence: ModuleType) -> None:
    assert RUNS, "docs/evidence/ has no runs"
    for path, table in ((evidence.README, evidence.render()), (evidence.PAGE, evidence.render_runs())):
        assert evidence.fill(path, table) == path.read_text(encoding="utf-8"), "python benchmarks/evidence.py write"


def test_every_picture_of_the_page_is_there() -> None:
    """docs/evidence/README.md shows pictures of the runs that are kept."""
    page = ROOT / "docs" / "evidence" / "README.md"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert pictures
    assert all((page.parent / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_kept_run_can_be_started_again_and_names_no_machine(path: Path) -> None:
    record, result = (json.loads(path.with_name(name).read_text()) for name in ("run.json", "result.json"))
    assert record["command"].startswith("python train.py ")
    assert record["versions"]["torch"]
    assert record["commit"]
    for text in (path.read_text(), path.with_name("result.json").read_text()):
        assert not MACHINE.search(text)
    assert result["numbers"]
    for key, number in result["numbers"].items():
        low, high = number.get("interval") or (-np.inf, np.inf)
        assert low <= number["value"] <= high, key


@pytest.mark.parametrize(
    "path", [path for path in RUNS if path.parent.parent.name == "depth"], ids=lambda path: path.parent.name
)
def test_fall_of_a_kept_depth_curve_is_that_of_its_points(path: Path) -> None:
    result = json.loads(path.with_name("result.json").read_text())
    curve = result["curves"]["probe, val"]["y"]
    numbers = {key: number["value"] for key, number in result["numbers"].items()}
    assert max(curve) == pytest.approx(numbers["val/accuracy"], abs=1e-9)
    assert max(curve) - curve[-1] == pytest.approx(numbers["val/fall_to_last_layer"], abs=1e-9)
    assert int(np.argmax(curve)) == numbers["probe/layer"]


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


def write_run(
    folder: Path, *, rate: float, seed: int, val: float, test: float, init: str | None = "runs/a", steps: int = 10
) -> None:
    """A finished run of fine-tuning on a machine's own paths."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed, "init": init, "data": {"path": "/home/me/cifar"}, "objective": {"name": "ar"},
        "task": {"name": "finetune", "learning_rate": rate, "loss_weights": {"gen": 1.0, "clf": 1.0},
                 "steps": steps, "batch_size": 2},
    }  # fmt: skip
    command = f"python /home/me/igpt/train.py data.path=/home/me/cifar seed={seed}"
    record = {"config": config, "working_directory": "/home/me", "command": command, "versions": {}, "commit": ""}
    number = {"unit": "share of images", "n": 100}
    numbers = {
        "val/accuracy": {"value": val, **number},
        "test/accuracy": {"value": test, "interval": [test - 0.02, test + 0.02], **number},
    }
    (folder / "run.json").write_text(json.dumps(record))
    provenance = {"init": "/home/me/runs/a/model"}
    (folder / "result.json").write_text(
        json.dumps({"numbers": numbers, "curves": {}, "files": {}, "provenance": provenance, "seconds": 1})
    )


def test_collected_runs_have_no_path_of_the_machine(evidence: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", rate=0.1, seed=0, val=0.5, test=0.5)
    evidence.collect("finetuning", [tmp_path / "runs" / "one"], tmp_path / "docs" / "evidence")
    kept = tmp_path / "docs" / "evidence" / "finetuning" / "one"
    record = json.loads((kept / "run.json").read_text())
    assert record["command"] == "python train.py data.path=DATA seed=0"
    assert record["config"]["data"]["path"] == "DATA"
    assert json.loads((kept / "result.json").read_text())["provenance"]["init"] == "runs/a/model"
    assert "/home" not in (kept / "run.json").read_text()
    (tmp_path / "runs" / "one" / "result.json").unlink()
    with pytest.raises(SystemExit, match=r"has no result\.json"):
        evidence.collect("finetuning", [tmp_path / "runs" / "one"], tmp_path)


def test_only_whole_paths_are_replaced(evidence: ModuleType) -> None:
    """By hand: a path that merely begins or ends as one of the machine's stays, for the test of kept runs to find."""
    names = {"/data/cifar": "DATA", "/home/me": "."}
    for value, expected in (
        ("init=/home/me/runs/a data.path=/data/cifar", "init=runs/a data.path=DATA"),
        ("task.runs=[/home/me/runs/a,/home/me]", "task.runs=[runs/a,.]"),
        ("/home/melissa/a /data/cifar100/x /backup/home/me", "/home/melissa/a /data/cifar100/x /backup/home/me"),
    ):
        assert evidence.replace_paths([value], names) == [expected]
    assert MACHINE.search("task.runs=[/home/melissa/a]")


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


def write_record(folder: Path, **changes: Any) -> None:
    """Changes run.json of a finished run: `of`, or settings below `config`."""
    record = json.loads((folder / "run.json").read_text())
    for key, value in changes.items():
        if key == "of":
            record["of"] = value
        else:
            record["config"].setdefault(key, {}).update(value)
    (folder / "run.json").write_text(json.dumps(record))


def write_numbers(folder: Path, **numbers: dict[str, Any]) -> None:
    """Adds numbers to result.json of a finished run, `_` for `/`."""
    result = json.loads((folder / "result.json").read_text())
    for key, number in numbers.items():
        result["numbers"][key.replace("__", "/")] = {"unit": "share", "n": 100, **number}
    (folder / "result.json").write_text(json.dumps(result))


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
        write_numbers(probe, test__accuracy_one_mask={"value": 0.30, "interval": [0.28, 0.32]})
        y = {"ar": [0.3, 0.5, 0.6], "bert": [0.3, 0.4, 0.57]}[objective]
        curve = {"x": [0.0, 1.0, 2.0], "y": y, "x_unit": "layer", "y_unit": "accuracy"}
        result = json.loads((probe / "result.json").read_text())
        result["curves"]["probe, val"] = {**curve, "y_intervals": [[of - 0.02, of + 0.02] for of in y]}
        (probe / "result.json").write_text(json.dumps(result))
    rows = {row.finding: row for row in findings.describe_objectives(reading.read_runs(tmp_path))}
    probed, voted, layers, closed, passed = rows.values()
    assert layers.ours == "the smallest difference is +3.0 points [0.2, 5.8], at layer 2"  # 2 and 3 points: √8 around
    assert probed.ours.startswith("AR 55.0 % [53.0, 57.0], BERT 35.0 % [33.0, 37.0]: +20.0 points [17.2, 22.8]")
    assert voted.ours.endswith("+5.0 points [2.2, 7.8]")
    assert "AR 60.0 %" in closed.ours
    assert "BERT 58.0 %" in closed.ours
    assert "larger by 18.0 points [14.0, 22.0]" in closed.ours  # 2 · 2 points: four intervals of ± 2
    assert passed.ours.endswith("+23.0 points [20.2, 25.8]")
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
        write_numbers(tmp_path / name, all__rank_correlation={"value": 0.9, "interval": [0.6, 1.0], "n": 15}, **gaps)
        result = json.loads((tmp_path / name / "result.json").read_text())
        result["provenance"] |= {"probed_images": f"images {name}", "weights": {size: [] for size in "abc"}}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    of_a, equal_a, _, equal_b = findings.describe_losses(reading.read_runs(tmp_path))
    assert of_a.ours == "rank correlation over 15 checkpoints of 3 sizes: 0.90 [0.60, 1.00]"
    assert equal_a.ours == "b - a: +3.0 points [2.0, 4.0], c - b: +2.0 points [1.0, 3.0]"
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
    assert size.ours.startswith("4: 12.00 [11.94, 12.06], 16: 11.00 [10.94, 11.06]")
    assert "16 against 4: 1.00 [0.92, 1.08] fewer" in size.ours
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
