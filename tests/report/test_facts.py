"""What the page of a run says of it in words, and the commands it proposes."""

import json
from pathlib import Path
from typing import Any

import pytest

from igpt.metric.result import Number, Result
from igpt.report.facts import data_overrides, describe_images, next_commands, repeat_command, train_command
from igpt.report.page import render_page
from igpt.report.runs import read_run
from igpt.utils import files
from tests.compositions import check_overrides
from tests.configs import CONF
from tests.report.records import Page, finished


def test_what_to_type_next_is_understood(pipeline: Path) -> None:
    """Round trip: every command of the pages composes, and reads the run's own data."""
    seen, requested = set[str](), set[tuple[str, ...]]()
    for folder in (pipeline, *pipeline.glob("[1-8]_*")):
        run = read_run(folder)
        for _, text in next_commands(run):
            overrides = text.removeprefix("python train.py ").split()
            seen.add(overrides[0])
            requested.add(tuple(override for override in overrides if not override.startswith(("init=", "resume="))))
        assert repeat_command(run).startswith("python train.py experiment=quickstart data=digits model.n_layer=2")
    for overrides in map(list, requested):
        check_overrides(overrides, [CONF])
    assert {"task=sample", "task=complete", "task=probe", "task=finetune", "task=evaluate"} < seen
    (pipeline_resumes,) = (text for text in seen if text.startswith("resume="))
    assert pipeline_resumes == f"resume={pipeline}"
    assert train_command("a=b c", "d=[1]") == "python train.py 'a=b c' 'd=[1]'"


def test_a_network_of_masked_pixels_is_asked_for_no_images(tmp_path: Path) -> None:
    """Invariant: it draws none; other data come with the run's own settings."""
    folder = finished(tmp_path / "r-igpt_micro-cifar1016-bert-s0-12345678", Result(), task="pretrain")
    begun = json.loads((folder.path / "run.json").read_text())
    begun["overrides"] = ["data=cifar10", "data.path='/my data'", "data.labels_per_class=25"]
    begun["of"] = {"model": "igpt_micro", "data": "cifar1016", "objective": "bert", "data_option": "cifar10"}
    files.write_json(folder.path / "run.json", begun)
    record = folder.read_result()
    record["config"]["data"] = {"name": "cifar10", "resolution": 16, "path": "/my data"}
    files.write_json(folder.path / "result.json", record)
    files.write_json(folder.path / "model" / "config.json", {})
    run = read_run(folder.path)
    assert not any("task=sample" in text or "task=complete" in text for _, text in next_commands(run))
    assert data_overrides(run) == [
        "data=cifar10",
        "data.resolution=16",
        "data.path='/my data'",
        "data.labels_per_class=25",
    ]
    assert "cifar10 at 16×16" in describe_images(run)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (
            {"name": "pretrain", "steps": 12_345, "batch_size": 128},
            "igpt_nano learns to predict the next pixel of digits at 8×8, in 12,345 steps of 128 images.",
        ),
        (
            {"name": "finetune", "steps": 200, "batch_size": 64},
            "igpt_nano learns the classes of digits at 8×8, in at most 200 steps of 64 images.",
        ),
        ({"name": "sample", "count": 2000}, "2,000 images drawn from igpt_nano, which was trained on digits."),
        ({"name": "pretrain"}, "A run of task=pretrain."),  # settings of another release
        ({"name": "later"}, "A run of task=later."),
    ],
)  # fmt: skip
def test_a_run_in_a_sentence(tmp_path: Path, task: dict[str, Any], sentence: str) -> None:
    """By hand."""
    folder = finished(tmp_path / "run", Result(), {"task": {"requires": [], **task}}, task["name"])
    assert sentence in Page(render_page(folder.path)).text


def test_what_is_predicted(tmp_path: Path) -> None:
    """By hand: of a palette's tokens pixels, of others what they stand for."""
    task = {"name": "pretrain", "requires": [], "steps": 2, "batch_size": 8}
    for target, objective, predicted in (
        ("igpt.tokens.vqvae_tokenizer.VQVAESettings", "ar", "the next code of a VQ-VAE of digits"),
        ("igpt.tokens.patches.PatchSettings", "bert", "masked patches of digits"),
        ("igpt.tokens.palette_tokenizer.PaletteSettings", "bert", "masked pixels of digits"),
    ):
        config = {"task": task, "tokens": {"_target_": target}, "objective": {"name": objective}}
        folder = finished(tmp_path / f"{target}-{objective}", Result(), config, "pretrain").path
        assert f"learns to predict {predicted}" in Page(render_page(folder)).text


def test_numbers_to_be_seen_first(tmp_path: Path) -> None:
    """By hand: shares as percent, with their interval or deviation; what it was measured on."""
    for number, text in (
        (Number(0.917, "share", 1300, 0.01, (0.9, 0.95)), "91.7%test accuracy95 %: 90.0 to 95.0, n = 1,300"),
        (Number(0.5, "share", 3, deviation=0.02), "50.0%test accuracy± 2.0 (std), n = 3"),
        (
            Number(0.5, "nats", 9, 0.01, features="layer 3"),
            "0.5000natstest accuracy95 %: 0.480 to 0.520, n = 9layer 3",
        ),
        (Number(400_640, "weights", 1), "400,640weightstest accuracy\n"),
    ):
        page = render_page(finished(tmp_path / number.unit / text[:3], Result(numbers={"test/accuracy": number})).path)
        assert text in Page(page).text


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    result = Result(numbers={"test/accuracy": Number(0.471, "share", 10_000, 0.005, (0.4612, 0.4808))})
    config = {"published": ["test/accuracy 0.963: iGPT-L (Chen et al. 2020)", "BERT: below AR"]}
    page = Page(render_page(finished(tmp_path / "run", result, config).path))
    assert "test/accuracy 0.963: iGPT-L (Chen et al. 2020)47.1 % [46.1, 48.1]" in page.text
    assert "BERT: below AR–" in page.text
