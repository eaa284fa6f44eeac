"""Loss against features over checkpoints: each point is what evaluation and probe say of that checkpoint alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.resume import find_checkpoints
from igpt.metric.result import Result
from igpt.objective.bert import BERT
from igpt.probe.lbfgs import TOLERANCE
from igpt.task import scaling
from igpt.tokens.palette import Palette
from tests.task.conftest import Arrays, Lab


def scaled(lab: Lab, folder: Path, runs: list[Path], **changed: Any) -> Result:
    settings: dict[str, Any] = {
        "runs": [str(run) for run in runs],
        "norm": "ln_1",
        "dtype": "float32",
        "batch_size": 64,
        "C_grid": [1.0, 0.01],
    }
    return lab.execute("scaling", folder, **{**settings, **changed})


def started(run: Path, **task: Any) -> Path:
    """Adds what launch writes before a run begins, as far as it is read."""
    (run / "run.json").write_text(json.dumps({"config": {"task": {"batch_size": 100, **task}}}))
    return run


def test_every_point_is_what_evaluation_and_probe_say(
    tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path
) -> None:
    """Round trip: loss and best-layer accuracy of the checkpoint at step 4 are those of a run that went no further."""
    lab = Lab(few, palette)
    lab.pretrain(tmp_path / "run", val_every=4, steps=8)
    losses = lab.pretrain(tmp_path / "again", val_every=4, steps=8).curves["val/loss_gen"].y
    result = scaled(lab, tmp_path / "scaling", [started(tmp_path / "run")])
    checkpoint = find_weights(str(tmp_path / "run" / "checkpoints" / "step_0000004.ckpt"))
    assert checkpoint.metadata.step == 4
    for seen, loss in ((400, losses[0]), (800, losses[1])):
        assert result.numbers[f"tiny/{seen}_images/loss_gen"].value == pytest.approx(loss, rel=1e-6)
    probe = lab.probe(tmp_path / "probe", checkpoint, test=False, C_grid=[1.0, 0.01])
    assert result.numbers["tiny/400_images/accuracy"].value == probe.numbers["val/accuracy"].value
    assert result.numbers["tiny/400_images/layer"].value == probe.numbers["probe/layer"].value
    curve = result.curves["tiny"]
    assert curve.x == [result.numbers[f"tiny/{seen}_images/loss_gen"].value for seen in (400, 800)]
    assert result.curves["tiny: loss"].x == [400.0, 800.0]
    assert 0 < result.provenance["suboptimality"] <= TOLERANCE


def test_of_a_run_that_cools_down_the_cooled_ones_count(tmp_path: Path, few: Arrays, palette: Palette) -> None:
    """By hand: checkpoints of steps 3, 4, 6 and 8, of which 4 and 6 have a rate that was high."""
    lab = Lab(few, palette)
    recipe: dict[str, Any] = {"schedule": "wsd", "decay_share": 0.4, "cooled_at": [3], "warmup_steps": 1}
    lab.pretrain(tmp_path / "run", checkpoint_every=2, checkpoint_keep=3, **recipe)
    assert len(find_checkpoints(tmp_path / "run")) == 4
    result = scaled(lab, tmp_path / "scaling", [started(tmp_path / "run", steps=8, **recipe)])
    assert result.curves["tiny: loss"].x == [300.0, 800.0]


def test_runs_that_do_not_compare(
    tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path, masked: Path
) -> None:
    """Invariant: another objective, no run, no checkpoints: clear errors."""
    lab = Lab(few, palette)
    with pytest.raises(ValueError, match="another tokenizer or objective"):
        scaled(lab, tmp_path, [started(pretrained), started(masked)])
    (tmp_path / "other").mkdir()
    other = Path(shutil.copytree(pretrained, tmp_path / "other" / "run"))
    (other / "run.json").write_text(json.dumps({"config": {"data": {"split_seed": 1}, "task": {"batch_size": 100}}}))
    with pytest.raises(ValueError, match=r"held out other images \(data\.split_seed\)"):
        scaled(lab, tmp_path, [pretrained, other])
    with pytest.raises(ValueError, match="has no checkpoints"):
        scaled(lab, tmp_path, [tmp_path])


def test_a_damaged_checkpoint_is_no_start(tmp_path: Path, lab: Lab) -> None:
    """Invariant: a checkpoint that is not what its checksum says is not read."""
    lab.pretrain(tmp_path, val_every=0, steps=4, objective=BERT(mask_probability=0.15))
    path = tmp_path / "checkpoints" / "step_0000004.ckpt"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="its SHA-256 is not that beside it"):
        find_weights(str(path))


def test_rank_correlation_is_spearmans() -> None:
    """Independent source: scipy, with equal values among them."""
    x, y = [3.0, 1.0, 2.0, 2.0, 5.0], [0.3, 0.3, 0.1, 0.4, 0.9]
    assert scaling.rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
