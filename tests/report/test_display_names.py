"""Names of numbers and curves for people, and the rows that a run ends with."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from igpt.metric.result import Curve, Number, Result
from igpt.report import display_names
from igpt.report.class_table import describe_classes, rank_classes
from igpt.report.closing_table import MOST_ROWS, choose_rows, closing_table, format_interval, format_readable
from igpt.report.display_names import axis_name, display_name, find_name, name_figure, name_lines, rank_key
from tests.conftest import ROOT

EXAMPLES = {
    "what": "pixels",
    "split": "val",
    "judged": "val",
    "kind": "samples",
    "n": "10",
    "self.name": "patches",
    "fit.name": "loss",
}
OWN = ("Number", "share_number", "number_layer", "accuracy_number")  # calls that make a number


def test_names_by_hand() -> None:
    """By hand; a key that no table knows is readable."""
    assert [display_name(key) for key in ("val/loss_gen", "finetune/test/top_5", "probe/layer", "a_b/new_one")] == [
        "validation loss", "finetune: test top-5 accuracy", "layer of the probe", "a b: new one",
    ]  # fmt: skip
    assert display_name("igpt_s: loss") == "igpt_s: loss"
    assert display_name("igpt_s/76800_images/accuracy") == "igpt_s: 76,800 images: accuracy"
    assert display_name("val/my_palette_mse") == "squared error of validation images in the colours of my_palette"
    assert name_figure("train/loss_gen") == name_figure("val/loss_gen") == "loss"
    assert axis_name("nats/token", ["a/train/loss_gen", "val/loss_gen"]) == "loss, nats per token"
    assert [axis_name(unit) for unit in ("nats/token", "layer", "val/loss")] == ["nats per token", "layer", "val/loss"]
    assert name_lines(["p/probe, val", "p/chance"]) == {
        "p/probe, val": "linear probe, validation",
        "p/chance": "chance",
    }
    assert rank_key("test/accuracy") < rank_key("val/accuracy") < rank_key("train/operations") < rank_key("unknown")


def list_keys() -> dict[str, str]:
    """The keys of numbers that the source writes, with examples for what is filled in → the place of each."""
    keys = {}
    for path in (ROOT / "src" / "igpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                subscripts = [target for target in node.targets if isinstance(target, ast.Subscript)]
                found = [
                    each.slice for each in subscripts
                    if getattr(each.value, "id", getattr(each.value, "attr", "")) == "numbers"
                ]  # fmt: skip
            elif isinstance(node, ast.Dict):
                calls = [value for value in node.values if isinstance(value, ast.Call)]
                if any(getattr(call.func, "id", "") in OWN for call in calls):
                    found = [key for key in node.keys if key is not None]
            for each in found:
                if isinstance(each, ast.Constant) and isinstance(each.value, str):
                    keys[each.value] = path.name
                elif isinstance(each, ast.JoinedStr):
                    parts = [
                        str(part.value) if isinstance(part, ast.Constant)
                        else EXAMPLES.get(ast.unparse(part.value), "x")  # type: ignore[attr-defined]
                        for part in each.values
                    ]  # fmt: skip
                    keys["".join(parts)] = path.name
    return {key: place for key, place in keys.items() if key.rpartition("/")[2] != "x"}


def test_every_number_has_a_name(quickstart: Path) -> None:
    """By enumeration: the keys in the source, and those that runs of all kinds have left here."""
    written = list_keys()
    assert {"val/x_psnr", "test/accuracy", "probe/C", "complete/pixels_as_original"} <= {*written, "test/accuracy"}
    assert len(written) > 35
    records = [*quickstart.rglob("result.json"), *(ROOT / "tests" / "older_runs").rglob("result.json")]
    left = {key: str(path) for path in records for key in json.loads(path.read_text())["numbers"]}
    unknown = {key: place for key, place in {**written, **left}.items() if find_name(key) is None}
    assert unknown == {}


def test_a_pipeline_ends_with_fifteen_rows(tmp_path: Path) -> None:
    """By hand: one of each stage at least, in the stages' order; the baselines before what few ask for."""
    numbers = {
        f"{stage}/{key}": Number(0.5, "share", 10)
        for stage in ("pretrain", "probe", "finetune")
        for key in ("train/operations", "val/loss_gen", "val/bits_per_token", *(
            () if stage == "pretrain" else ("test/top_5", "val/raw_pixels", "val/accuracy", "test/accuracy", "probe/C"))
        )
    }  # fmt: skip
    assert len(numbers) == 19
    rows = choose_rows(numbers)
    assert len(rows) == MOST_ROWS
    assert rows[0] == "pretrain/val/loss_gen"
    of_probe = [row.removeprefix("probe/") for row in rows if row.startswith("probe/")]
    assert of_probe[:3] == ["test/accuracy", "val/accuracy", "val/raw_pixels"]
    assert [*dict.fromkeys(row.partition("/")[0] for row in rows)] == ["pretrain", "probe", "finetune"]
    text = closing_table(Result(numbers=numbers), tmp_path, 1.0)
    assert "4 more in report.html" in text
    assert "finetune: test accuracy" in text
    many = {f"stage_{i}/val/loss_gen": Number(1.0, "nats/token", 1) for i in range(20)}
    assert len(choose_rows(many)) == MOST_ROWS
    assert "more in" not in closing_table(Result(numbers={"val/loss_gen": Number(1.0, "nats/token", 1)}), tmp_path, 1.0)


@pytest.mark.parametrize(
    ("number", "text", "ends"),
    [
        (Number(0.96, "share", 150, interval=(0.91551, 0.98153)), "96.0 % [91.6, 98.2]", "91.6 to 98.2"),
        (Number(1.0, "share", 35, interval=(0.9011, 1.0)), "100.0 % [90.1, 100]", "90.1 to 100"),
        (Number(2.0895, "nats/token", 9, interval=(2.0871, 2.0919)), "2.0895 [2.087, 2.092] nats per token",
         "2.087 to 2.092"),  # three digits would be one number
        (Number(6154.2664, "pixels/s", 64), "6,154.3 pixels/s", ""),
        (Number(4.0, "of 0 … 8", 150, interval=(3, 7)), "4 [3, 7]", "3 to 7"),
    ],
)  # fmt: skip
def test_intervals_have_three_digits(number: Number, text: str, ends: str) -> None:
    assert format_readable(number) == text
    assert format_interval(number) == ends


def test_the_worst_and_the_best_class(tmp_path: Path) -> None:
    """By hand; a class without images is in no row; a file that holds no counts says nothing."""
    counts = np.array([[8, 2, 0, 0], [1, 1, 2, 0], [0, 0, 5, 0], [0, 0, 0, 0]])
    rows = rank_classes(counts, ("cat", "dog", "owl", "none"))
    assert [(row.name, row.accuracy.value, row.mistaken_for) for row in rows] == [
        ("dog", 0.25, "owl"), ("cat", 0.8, "dog"), ("owl", 1.0, ""),
    ]  # fmt: skip
    assert rank_classes(counts, None)[0].name == "class 1"
    np.save(tmp_path / "c.npy", counts)
    result = Result(files={"probe/confusion_counts": Path("c.npy")})
    line = "probe: worst class: class 1 (25.0 %, mostly taken for class 2), best: class 2 (100.0 %)"
    assert describe_classes(result, tmp_path) == [line]
    (tmp_path / "c.npy").write_text("")
    assert describe_classes(result, tmp_path) == []


def test_curves_of_one_stage_are_named_without_it() -> None:
    assert name_lines({"a/val/loss_gen": Curve([0], [0], "", ""), "b/val/loss_gen": Curve([0], [0], "", "")}) == {
        "a/val/loss_gen": "a: validation loss", "b/val/loss_gen": "b: validation loss",
    }  # fmt: skip


def test_titles_of_columns_and_axes() -> None:
    """By hand: shares stand in percent along axes, as shares in tables; text that is no key stays as it is."""
    assert display_names.name_with_unit("val/loss_gen", "nats/token") == "validation loss, nats per token"
    assert display_names.name_with_unit("probe/val/accuracy", "share") == "probe: validation accuracy, share"
    assert display_names.name_with_unit("probe/val/accuracy", "share", of_axis=True) == "probe: validation accuracy"
    assert display_names.display_name("all/accuracy") == "accuracy"
    assert display_names.display_name("</b> = 1/2") == "</b> = 1/2"
