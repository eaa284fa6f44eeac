"""Arguments of Lightning's Trainer: each is passed on, part of the run's identity, or refused with what to take."""

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import PIL
import pytest

from igpt.data.limited import LimitedSource
from igpt.data.listed_images import list_images
from igpt.data.source import ArraySplit
from igpt.report.found_runs import find_runs
from igpt.report.identity import DEBUG, deciding, identity
from igpt.run.arguments import prepare_arguments
from igpt.run.launch import build_components, run
from igpt.settings.fields import parse_settings
from igpt.settings.lightning_arguments import DECIDING, REFUSED, LightningArguments
from tests.compositions import check_overrides
from tests.conftest import ROOT
from tests.task.conftest import Arrays

CONFIG = {"task": {"requires": []}, "trainer": {"precision": "32-true"}}
TINY = ("model.n_layer=1", "model.n_embd=8", "model.n_head=2", "logger=none", "callbacks=none", "task.log_every=2")
SHORT = ("task.steps=4", "task.batch_size=16", "task.warmup_steps=0", "task.val_every=2", "task.checkpoint_every=4")


def test_every_argument_of_the_trainer_is_sorted() -> None:
    """By enumeration of Lightning's signature: a new argument is in no table."""
    arguments = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert arguments == LightningArguments.model_fields.keys() | REFUSED.keys()
    assert not LightningArguments.model_fields.keys() & REFUSED.keys()
    assert DECIDING.keys() < LightningArguments.model_fields.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit_val_batch": 2}, r"has no argument 'limit_val_batch' .*, did you mean limit_val_batches\?"),
        ({"max_epoch": 2}, r"did you mean max_epochs\?"),
        ({"max_epochs": 2}, r"^trainer\.lightning\.max_epochs is set by igpt: .*task\.steps$"),
        ({"accumulate_grad_batches": 2}, r"take trainer\.micro_batch"),
        ({"gradient_clip_val": 1.0}, r"take task\.gradient_clip$"),
        ({"profiler": "fast"}, r"profiler must be one of simple, advanced, pytorch or null, got 'fast'"),
        ({"limit_val_batches": 0}, r"^trainer\.lightning\.limit_val_batches must be a number of batches, .*, got 0$"),
    ],
)
def test_another_argument_is_answered(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(LightningArguments, arguments, "trainer.lightning")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("trainer.max_epochs=3", r"^trainer\.max_epochs is an argument of Lightning's Trainer: .*: take task\.steps$"),
        ("+trainer.detect_anomaly=true", r"^trainer\.detect_anomaly is .*: take trainer\.lightning\.detect_anomaly$"),
    ],
)
def test_an_argument_beside_the_settings_of_the_trainer_is_answered(typed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_overrides([typed], [ROOT / "conf"])


def test_only_what_changes_a_result_is_part_of_the_identity() -> None:
    """Invariant, over all arguments: no argument, a watching one and Lightning's default give the same hash."""

    def hashed(**arguments: Any) -> str:
        trainer = {**CONFIG["trainer"], "lightning": arguments}
        return identity({**CONFIG, "trainer": trainer}, {})

    plain = identity(CONFIG, {})
    assert (
        hashed() == hashed(profiler="simple", detect_anomaly=True, limit_val_batches=1.0, fast_dev_run=False) == plain
    )
    assert hashed(limit_val_batches=1) != plain  # a batch, while 1.0 is all
    some = {"gradient_clip_algorithm": "value", "max_time": "00:00:01:00"}
    deciding_ones = [hashed(**{name: some.get(name, 2)}) for name in DECIDING]
    assert len({plain, *deciding_ones}) == 1 + len(DECIDING)
    assert "lightning" not in deciding(CONFIG)["trainer"]


def test_features_are_cached_by_the_images_that_are_left() -> None:
    """Two batches of 8 images and of 16 are other images, all else equal."""
    probe = ("task=probe_encoder", "task.encoder=lite0", "trainer.lightning.limit_train_batches=2")
    sizes = ("task.batch_size=8", "task.batch_size=16")
    one, other = (build_components(*probe, size, conf=ROOT / "conf").run.image_key for size in sizes)
    assert {key for key in one if one[key] != other[key]} == {"limits"}


def test_features_are_cached_by_the_pillow_that_drew_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Pillow may decode, resize and draw other pixels: its features are others, all else equal."""
    keys = []
    for release in ("11.0.0", "99.0.0"):
        monkeypatch.setattr(PIL, "__version__", release)
        keys.append(build_components("task=probe_encoder", "task.encoder=lite0", conf=ROOT / "conf").run.image_key)
    assert {key for key in keys[0] if keys[0][key] != keys[1][key]} == {"pillow"}


def test_limits_cut_splits_evenly() -> None:
    """By hand: 2 batches of 5 of 40 images are every fourth; a share is of the split; val is cut beside train."""
    labels = np.arange(40)
    pixels = np.zeros((40, 8, 8, 3), dtype=np.uint8) + labels[:, None, None, None].astype(np.uint8)
    every = Arrays({name: ArraySplit(pixels, labels) for name in ("train", "val", "test")})
    some = LimitedSource(every, {"train": 2, "val": 0.05}, batch_size=5)
    assert list(map(list_images(some, "train").name, (1, 2))) == ["train/4", "train/8"]
    assert some.training().labels.tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert some.split("val").labels.tolist() == [0, 20]
    assert len(some.split("test")) == 40
    both = some.training(with_val=True)
    assert both.labels.tolist() == [*range(0, 40, 4), 0, 20]
    read = both.read([1, 11], [0, 0])
    assert (read.pixels[:, 0, 0, 0].tolist(), read.labels.tolist()) == ([4, 20], [4, 20])


def test_a_dev_run_says_so_and_stands_in_for_nothing(tmp_path: Path) -> None:
    """A step and a batch, then the end, which the result names; apart from the runs that count."""
    where = (f"paths.runs={tmp_path}", f"paths.cache={tmp_path / 'cache'}")
    result, folder = run(*TINY, *SHORT, *where, "debug=fdr", "trainer.lightning.profiler=simple", conf=ROOT / "conf")
    assert folder is not None
    assert result.provenance["stopped_early"] == "stopped early by fast_dev_run at step 1 of 4"
    assert result.warnings == ["debug=fdr: a trial, its numbers count for nothing"]
    assert result.numbers["val/loss_gen"].n == 16
    assert result.numbers["train/images_seen"].value == 16
    assert "optimizer_step" in (folder / "profile" / "fit-simple.txt").read_text()
    assert folder.parent == tmp_path / DEBUG
    assert find_runs([str(tmp_path)]).runs == []
    assert [found.folder for found in find_runs([str(folder)]).runs] == [folder]


@pytest.mark.parametrize(
    ("option", "task"), [("fdr", "tokenizer"), ("limit", "probe"), ("overfit", "finetune"), ("profile", "pipeline")]
)
def test_debug_configs_compose_with_training_tasks(option: str, task: str) -> None:
    """With and without + an argument is added to those of the config."""
    profiler, anomaly = "+trainer.lightning.profiler=advanced", "trainer.lightning.detect_anomaly=true"
    arguments = [f"task={task}", f"debug={option}", profiler, anomaly]
    config = check_overrides(prepare_arguments(arguments, ROOT / "conf"), [ROOT / "conf"])
    assert config[DEBUG] == option
    lightning = {str(key): value for key, value in config.trainer.lightning.items()}
    parsed = parse_settings(LightningArguments, lightning, "trainer.lightning")
    assert (parsed.profiler, parsed.detect_anomaly) == ("advanced", True)
    assert len(parsed.model_fields_set) > 2 - (option == "profile")


def test_every_debug_config_is_tested() -> None:
    assert {path.stem for path in (ROOT / "conf" / "debug").glob("*.yaml")} == {"fdr", "limit", "overfit", "profile"}
