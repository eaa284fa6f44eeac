"""Run folders that an older release left (`tests/older_runs/make.py` made them): they go on to the bit, and count."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from igpt.metric.result import find_key
from igpt.run.launch import run
from igpt.settings.older_configs import VERSION, read_record
from igpt.utils import files
from tests.conftest import ROOT
from tests.older_runs.make import arithmetic

KEPT = ROOT / "tests" / "older_runs" / "2dc1449"
CONF = ROOT / "conf"
KINDS = ("pretrain", "finetune", "pipeline")
SAME_BITS = files.read_json(KEPT / "made_on.json") == arithmetic()


def copy_run(kind: str, how: str, place: Path) -> tuple[Path, list[str]]:
    """A copy of a run as the older release left it, and what its command needs where it is now."""
    (kept,) = (KEPT / how).glob(f"{kind}-*")
    (before,) = (KEPT / "finished").glob("pretrain-*")
    shutil.copytree(before, place / "pretrained")
    copy = shutil.copytree(kept, place / "runs" / kept.name)
    return copy, [f"init={place / 'pretrained'}"] if kind == "finetune" else []


def read_command(folder: Path) -> list[str]:
    """What is typed today to have that run."""
    return [override for override in read_record(folder / "run.json")["overrides"] if not override.startswith("init=")]


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run left, also those in stages of it, and those of its last checkpoint."""
    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= {f"{path.relative_to(folder)} {name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted((folder / "checkpoints").glob("*_0000012.ckpt")):
        checkpoint = torch.load(path, weights_only=True)
        tensors |= checkpoint["state_dict"]
        for position, state in checkpoint["optimizer_states"][0]["state"].items():
            tensors |= {f"Adam's {name} of weight {position}": state[name] for name in ("exp_avg", "exp_avg_sq")}
    return tensors


def assert_same(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], kind: str) -> None:
    """To the bit; where floats round otherwise, nearly: probes and fine-tuning, in steps of 0.05, only roughly."""
    assert len(reference) > 5
    assert reference.keys() <= ours.keys()
    for name, tensor in reference.items():
        if SAME_BITS:
            assert torch.equal(ours[name], tensor), name
        else:
            difference = (ours[name].float() - tensor.float()).abs()
            if kind == "pretrain" or name.startswith("2_pretrain"):
                assert difference.max() < 1e-5, name
            else:  # Adam's steps of 0.05 turn a gradient near 0 into a whole step
                assert difference.mean() < 0.02, name


@pytest.mark.parametrize("kind", [*KINDS[:2], pytest.param(KINDS[2], marks=pytest.mark.slow)])
def test_it_goes_on_to_the_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: resumed here, it ends as the older release ended it, and as this one does without a stop.

    Where floats round otherwise than where it was made, nearly so.
    """
    monkeypatch.chdir(tmp_path)
    folder, init = copy_run(kind, "stopped", tmp_path)
    (reference,) = (KEPT / "finished").glob(f"{kind}-*")
    before = {path.name for path in folder.rglob("*.ckpt")}
    result, resumed = run(f"resume={folder}", *init, conf=CONF)
    assert before == {"step_0000004.ckpt"}
    assert resumed == folder
    assert_same(load_tensors(folder), load_tensors(reference), kind)
    numbers = read_record(reference / "result.json")["numbers"]
    near = 0 if SAME_BITS else 0.1
    # a pipeline's are always named `stage/name` now
    found = {key: result.numbers[find_key(result.numbers, key) or key].value for key in numbers}
    assert found == pytest.approx({key: number["value"] for key, number in numbers.items()}, rel=near, abs=near)
    assert read_record(folder / "result.json")["version"] == VERSION
    _, full_path = run(*read_command(folder), *init, f"paths.runs={tmp_path / 'whole'}", conf=CONF)
    assert full_path is not None
    assert full_path.parent.name == "whole"
    assert_same(load_tensors(folder), load_tensors(full_path), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_one_is_recognised(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: by its command, by `resume=auto` and by `resume=`, a finished run is not repeated: no file changes.

    It only gets the page that it lacks, as after a kill between result and page; so do its stages.
    """
    monkeypatch.chdir(tmp_path)
    folder, init = copy_run(kind, "finished", tmp_path)
    before = hash_files(folder)
    command = [*read_command(folder), *init]
    for requested in (command, [*command, "resume=auto"], [f"resume={folder}", *init]):
        result, found = run(*requested, conf=CONF)
        assert found is not None
        assert found.resolve() == folder
        numbers = files.read_json(folder / "result.json")["numbers"]
        assert {key: number.value for key, number in result.numbers.items()} == {
            key: number["value"] for key, number in numbers.items()
        }
    assert hash_files(folder) == before
    assert all(path.with_name("report.html").is_file() for path in folder.rglob("result.json"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]


def hash_files(folder: Path) -> dict[str, Any]:
    files_in = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "report.html")
    return {str(path.relative_to(folder)): (files.sha256(path), path.stat().st_mtime_ns) for path in files_in}


def test_an_unfinished_one_is_not_begun_anew_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: as with a run of this release, its command alone neither repeats it nor goes on by itself."""
    monkeypatch.chdir(tmp_path)
    folder, _ = copy_run("pretrain", "stopped", tmp_path)
    with pytest.raises(ValueError, match=rf"{folder.name} was begun and is not finished: .*resume="):
        run(*read_command(folder), conf=CONF)
    _, repeated = run(*read_command(folder), "rerun=true", conf=CONF)
    assert repeated is not None
    assert repeated.resolve() != folder
    assert not (folder / "result.json").exists()
