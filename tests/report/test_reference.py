"""Further columns of a comparison, differences from a reference, and the cost of an equal loss, on made-up runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from igpt.metric.result import Number
from igpt.report.equal_loss import compare_at_equal_loss, find_crossing, list_answers
from igpt.report.groups import list_differing
from igpt.report.reference import compare_means, find_reference
from igpt.report.summary import summarize
from igpt.report.summary_table import tabulate_summary
from igpt.report.sweep_report import MARKDOWN, PAGE, PLANE, ROWS, check_table, report_sweep
from igpt.utils import files
from tests.report.records import made

LOSSES = {"paper": (2.00, 2.02, 2.01), "local": (1.90, 1.93, 1.94), "axial": (2.00, 2.06, 1.99)}
SHARES = {"paper": (0.40, 0.42, 0.41), "local": (0.30, 0.31, 0.29), "axial": (0.41, 0.42, 0.42)}


def numbers(loss: float, accuracy: float, cost: float = 1e12) -> dict[str, Number]:
    return {
        "pretrain/val/loss_gen": Number(loss, "nats/token", 100),
        "probe/val/accuracy": Number(accuracy, "share", 50),
        "pretrain/train/operations": Number(cost, "FLOP", 1),
    }


def record_variant(folder: Path, variant: str) -> Path:
    record = files.read_json(folder / "run.json")
    files.write_json(folder / "run.json", record | {"of": {"variant": variant}})
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three variants of three seeds."""
    attention = {"paper": ("full", None), "local": ("local", 3), "axial": ("axial", None)}
    runs = []
    for variant in LOSSES:
        for seed, of in enumerate(zip(LOSSES[variant], SHARES[variant], strict=True)):
            pattern, radius = attention[variant]
            settings: dict[str, Any] = {"model__attention": pattern, "model__radius": radius, "seed": seed}
            runs.append(record_variant(made(tmp_path / f"{variant}-{seed}", numbers(*of), **settings), variant))
    return runs


COLUMNS = ("probe/val/accuracy", "train/operations")


def test_columns_and_differences_are_scipys(folders: list[Path]) -> None:
    """Oracle: scipy's t interval of a mean, and its Welch interval of a difference; rows read as their variant."""
    result = summarize(folders, "val/loss_gen", columns=COLUMNS, reference={"variant": "paper"})
    assert [row.name for row in result.rows] == ["variant=local", "variant=paper", "variant=axial"]
    for row in result.rows:
        variant = row.settings["variant"]
        for name, of in (("probe/val/accuracy", SHARES[variant]), (result.metric, LOSSES[variant])):
            mean = row.average(name) or row.number
            expected = stats.t.interval(0.95, 2, np.mean(of), stats.sem(of))
            assert (mean.value, *(mean.interval or ())) == pytest.approx((np.mean(of), *expected))
        if variant != "paper":
            difference = result.differ(row, "probe/val/accuracy")
            welch = stats.ttest_ind(SHARES[variant], SHARES["paper"], equal_var=False).confidence_interval()
            assert difference is not None
            assert difference.value == pytest.approx(np.mean(SHARES[variant]) - np.mean(SHARES["paper"]))
            assert difference.interval == pytest.approx(tuple(welch))
    heading, local, paper, axial = tabulate_summary(result)
    assert heading[1:3] == ("pretrain: validation loss, nats per token (lower is better)", "difference")
    assert heading[3:6] == ("probe: validation accuracy, share", "difference", "operations of training, FLOP")
    verdicts = [(line[2].split("] ")[-1], line[4].split("] ")[-1]) for line in (local, paper, axial)]
    assert verdicts == [("better", "worse"), ("reference", "reference"), ("within the spread", "within the spread")]
    assert local[5] == "1e+12"  # the same of all seeds: no interval
    assert "[" in local[1]
    assert "std" not in " ".join(local)


def test_a_verdict_of_few_or_equal_seeds() -> None:
    """By hand: no interval of one seed; equal values have one of no width."""
    assert compare_means([1.0], [2.0, 3.0], lower_is_better=True).verdict == "one seed"
    same = compare_means([1.0, 1.0], [1.5, 1.5], lower_is_better=True)
    assert (same.interval, same.verdict) == ((-0.5, -0.5), "better")
    assert compare_means([1.0, 1.0], [1.0, 1.0], lower_is_better=False).verdict == "within the spread"


def test_the_end_of_a_sweep_with_columns(folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: log, page and JSON have the columns and differences; the picture is drawn."""
    place = tmp_path / "sweep"
    place.mkdir()
    with caplog.at_level("INFO"):
        report_sweep(
            place, folders, metric="val/loss_gen", command="", columns=COLUMNS, reference={"variant": "paper"}
        )  # fmt: skip
    first = json.loads((place / ROWS).read_text())["rows"][0]
    assert first["numbers"]["probe/val/accuracy"]["value"] == pytest.approx(0.3)
    assert first["differences"]["pretrain/val/loss_gen"]["verdict"] == "better"
    page = (place / PAGE).read_text()
    for text in ("probe: validation accuracy, share", "better", "within the spread: the interval holds 0"):
        assert text in caplog.text
        assert text in page
    assert Image.open(place / PLANE).size[0] > 600
    *_, axial, _, key = (place / MARKDOWN).read_text().splitlines()
    assert axial.startswith("| variant=axial | 2.017 [")
    assert axial.endswith(" | 1e+12 | 3 |")
    assert key.startswith("[low, high]")
    with caplog.at_level("INFO"):
        report_sweep(place, folders, metric="val/loss_gen", command="", reference={"variant": "gone"})
    assert "hydra.launcher.reference: no row has variant=gone; there are variant=local" in caplog.text


def test_a_bad_table_is_refused_before_the_first_job() -> None:
    jobs = [["variant=paper", "seed=0"], ["variant=local", "+task.learning_rate=0.003", "seed=0"]]
    check_table(jobs, columns=["a"], reference={"variant": "local", "task.learning_rate": 3e-3}, cost="b")
    rows = [{"variant": "paper"}, {"variant": "local"}]
    assert find_reference({"variant": "local"}, rows) == 1
    assert find_reference({"variant": ["local", "paper"]}, rows) == 0
    for given, message in (
        (
            {"reference": {"variant": "papr"}},
            r"^hydra.launcher.reference: no row has variant=papr; there are variant=pa",
        ),
        (
            {"reference": "paper"},
            r"^hydra.launcher.reference must be settings of a row, as {variant: paper}, got paper",
        ),
        ({"columns": "val/accuracy"}, r"^hydra.launcher.columns must be a list of numbers, as \[probe/val/accuracy\]"),
        ({"cost": 3}, r"^hydra.launcher.cost must be a number's name, as train/operations, got 3"),
        ({"cost": "train/operations"}, r"^hydra.launcher.cost is compared with that of a reference"),
    ):
        with pytest.raises(ValueError, match=message):
            check_table(jobs, **given)


def test_a_variant_hides_what_it_sets_and_nothing_else() -> None:
    """By hand: settings of the network and of a recipe that its name determines; not those that vary within it."""
    rows = [
        {"variant": name, "model.radius": radius, "task.stages.pretrain.steps": steps, "data.shift": radius}
        for name, radius in (("paper", 0), ("local", 3))
        for steps in (300, 600)
    ]
    assert list(list_differing(rows)[0]) == ["variant", "task.stages.pretrain.steps", "data.shift"]
    assert list(list_differing(rows[::2])[0]) == ["variant", "data.shift"]


def test_a_crossing_is_where_a_curve_stays_below() -> None:
    """By hand: of a curve that rises again it is the last; a bound where all are below; none where the last is not."""
    assert find_crossing([3.0, 2.0, 1.0], 1.5) == (1, 0.5)
    assert find_crossing([3.0, 1.0, 2.0, 1.0], 1.5) == (2, 0.5)
    assert find_crossing([1.0, 0.5], 1.5) == (0, 0.0)
    assert find_crossing([3.0, 2.0], 1.5) is None
    assert find_crossing([0.1, 0.3], 0.2, lower_is_better=False) == (0, pytest.approx(0.5))


def test_the_share_of_the_cost_at_equal_loss(tmp_path: Path) -> None:
    """By hand: losses fall linearly in the logarithm of the cost, by a seed's offset, and muon's are those of half the
    cost; its probe at equal loss is lower by 0.02 and the other recipe never gets there.
    """  # fmt: skip
    runs = []
    for recipe, gain, probe in (("paper", 1.0, 0.0), ("muon", 2.0, -0.02), ("slow", 0.5, 0.0)):
        for length in (0.4, 0.6, 0.85, 1.0):
            for seed, offset in enumerate((0.0, 0.03, -0.01)):
                value = 2.0 - 0.3 * np.log(gain * length) + offset
                of = numbers(float(value), float(1 - value / 4 + probe + 0.001 * seed), 1e12 * length)
                settings: dict[str, Any] = {"task__optimizer": recipe, "task__steps": round(600 * length), "seed": seed}
                runs.append(record_variant(made(tmp_path / f"{recipe}-{length}-{seed}", of, **settings), recipe))
    cost = "train/operations"
    result = summarize(
        runs, "val/loss_gen", columns=["val/accuracy", cost], reference={"variant": "paper", "task.steps": 600}
    )  # fmt: skip
    muon, slow = compare_at_equal_loss(result, cost)
    assert (muon.name, muon.is_bound, slow.name, slow.share) == ("variant=muon", False, "variant=slow", None)
    assert muon.share is not None
    assert (muon.share.value, *(muon.share.interval or ())) == pytest.approx((0.5, 0.5, 0.5))
    assert muon.differences["val/accuracy"].value == pytest.approx(-0.02)
    assert muon.differences["val/accuracy"].verdict == "worse"
    assert [line[1] for line in list_answers(result, cost)[1:]] == ["0.5000 [0.5000, 0.5000]", "not reached"]
    with_cost = {"columns": ["val/accuracy"], "cost": cost, "reference": {"variant": "paper"}}
    report_sweep(tmp_path, runs, metric="val/loss_gen", command="", **with_cost)
    (answers,) = json.loads((tmp_path / ROWS).read_text())["equal_metric"]
    assert answers[1][:2] == ["variant=muon", "0.5000 [0.5000, 0.5000]"]
    assert "not reached" in (tmp_path / PAGE).read_text()
    assert Image.open(tmp_path / PLANE).size[1] > 900  # loss over cost, and probe over loss
