"""The model card of exported weights, read back by the Hub's own library."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from igpt.checkpoint import huggingface
from igpt.checkpoint.find import find_weights
from igpt.report.identity import identity
from igpt.report.runs import read_run
from igpt.run.model_card import _hide_paths, write_model_card
from tests.checkpoint.test_huggingface import native
from tests.conftest import small_net
from tests.report.records import loss, made

MACHINE = re.compile(r"(?<![\w.:/])(/|~/)(?=\w)")  # the start of a path of this machine


def test_the_card_of_a_pretrained_network(quickstart: Path, tmp_path: Path) -> None:
    """Round trip, through the Hub's reader: numbers are those of the stages, pictures are theirs; no path is in it."""
    write_model_card(
        tmp_path, find_weights(str(quickstart / "2_pretrain")), format="huggingface", name="somebody/digits"
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.license == "unknown"
    assert "ar" in card.data.tags
    results = {result.metric_name: result for result in card.data.eval_results}
    stages = {"2_pretrain": "val/loss_gen", "6_probe": "test/accuracy"}
    for stage, key in stages.items():
        number = json.loads((quickstart / stage / "result.json").read_text())["numbers"][key]
        assert results[key].metric_value == pytest.approx(number["value"])
    assert results["test/accuracy"].dataset_name == "digits"
    for picture, source in (("samples.png", "4_sample"), ("completions.png", "5_complete")):
        assert (tmp_path / picture).read_bytes() == (quickstart / source / picture).read_bytes()
        assert f"]({picture})" in card.text
    assert Image.open(tmp_path / "palette.png").size[0] > 100
    for part in ("CC BY 4.0", "steps | 6", 'igpt.load("somebody/digits")', "from_pretrained", "chen2020generative"):
        assert part in card.text
    assert MACHINE.findall(card.content) == []
    assert str(quickstart.parent) not in card.content


def test_cards_of_other_weights(quickstart: Path, tmp_path: Path) -> None:
    """By hand: a fine-tuned network classifies; of weights without a record what is not known is said."""
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    write_model_card(tuned, find_weights(str(quickstart / "7_finetune")), format="igpt", has_head=True)
    card = ModelCard.load(tuned / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("igpt", "image-classification")
    assert "Initial weights: of a pretraining on digits." in card.text
    assert any(result.metric_name == "test/accuracy" for result in card.data.eval_results)
    (step := tmp_path / "step").mkdir()
    write_model_card(
        step, find_weights(str(quickstart / "2_pretrain/checkpoints/step_0000003.ckpt")), format="huggingface"
    )
    card = ModelCard.load(step / "README.md")
    assert card.data.eval_results is None  # the run's numbers are of its last step
    assert "Step 3, seed 0." in card.text
    huggingface.write(tmp_path / "hf", native(tmp_path / "ours", small_net()))
    write_model_card(tmp_path / "hf", find_weights(str(tmp_path / "hf")), format="igpt")
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert card.data.eval_results is None
    for part in ("not recorded beside them", "None is recorded of", "Licence of the data: not known"):
        assert part in card.text


def test_a_command_without_the_machine(tmp_path: Path) -> None:
    """By hand: places are PATH, output folders are left out, all else stays."""
    folder = made(tmp_path / "run", loss(1.0))
    begun = json.loads((folder / "run.json").read_text())
    begun["overrides"] = ["data.path='/data/my photos'", "init=~/runs/a", "paths.runs=/x", "seed=1", "init=runs/b"]
    (folder / "run.json").write_text(json.dumps(begun))
    assert _hide_paths(read_run(folder)) == "python train.py data.path=PATH init=PATH seed=1 init=runs/b"


def test_an_upload_that_is_not_asked_for_leaves_the_name_of_a_run(tmp_path: Path) -> None:
    """Invariant: exports keep the identity that they had before there was `push`; one that is uploaded is another."""
    task = {"_target_": "igpt.task.export_weights.run", "name": "export", "requires": ["weights"], "format": "igpt"}
    config = {"task": task, "trainer": {"precision": "32-true"}, "seed": 0}
    of_now = {**config, "task": {**task, "push": None, "private": None}}
    pushed = {**config, "task": {**task, "push": "a/b", "private": None}}
    assert identity(config, {}) == identity(of_now, {}) != identity(pushed, {})
