"""Runs that are refused before their work starts leave no folder, which compare would list."""

from pathlib import Path

import pytest
from PIL import Image

from igpt.run.launch import run
from tests.conftest import ROOT

SMALL = ("trainer=cpu", "model.n_layer=1", "model.n_embd=16", "callbacks=none")
STEPS = ("steps=2", "batch_size=16", "warmup_steps=1", "val_every=1", "log_every=1", "checkpoint_every=1")
PRETRAIN = tuple(f"task.{setting}" for setting in STEPS)
PIPELINE = f"+task.stages={{pretrain: {{{', '.join(STEPS).replace('=', ': ')}}}, probe: {{layer: 99}}}}"
FINETUNE = ("task=finetune", "init=null", "task.steps=2", "task.val_every=1", "task.warmup_steps=0")
PHOTOS = ("data=folder", "data.path=photos", "data.resolution=8", "data.val_fraction=0.5", "data.test_fraction=0.25")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder of images without classes in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*PRETRAIN, *PHOTOS, "data.val_fraction=0"), "nothing to validate on"),
        ((*PRETRAIN, *PHOTOS, "data.path=nowhere/x"), "data.path=nowhere/x"),
        ((*PRETRAIN, *PHOTOS, "callbacks=probe"), "callbacks=probe needs labels"),
        ((*FINETUNE, *PHOTOS), "has no labels"),
        (("task=pipeline", PIPELINE, *PHOTOS, "data.val_fraction=0"), "nothing to validate on"),
    ],
)
def test_nothing_is_left(photos: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*SMALL, *overrides, conf=ROOT / "conf")
    assert not list(photos.glob("runs/*"))


def test_what_was_done_before_stays(photos: Path) -> None:
    """Invariant: of a pipeline only the refused stage is gone; an unfinished run that is refused is left as it was."""
    for _ in range(2):
        with pytest.raises(ValueError, match=r"task\.layer"):
            run(*SMALL, "task=pipeline", PIPELINE, "resume=auto", conf=ROOT / "conf")
        (folder,) = photos.glob("runs/pipeline-*")
        assert (folder / "run.json").is_file()
        assert (folder / "1_pretrain" / "result.json").is_file()
        assert not (folder / "2_probe").exists()
