"""Probing while pretraining: the same numbers as a probe of the network at that step, and no change to training."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from igpt.checkpoint.find import find_weights
from igpt.model.features import layer_features
from igpt.probe.lbfgs import logistic_regression
from igpt.settings.fields import parse_arguments
from igpt.tokens.palette import Palette
from igpt.training import online_probe
from igpt.training.online_probe import OnlineLinearProbe
from tests.task.conftest import Arrays, Lab, train_tokenizer

SETTINGS: dict[str, Any] = {
    "every": 1,
    "depths": [0.0, 0.5, 1.0],
    "train_images": 150,
    "val_images": 40,
    "strength": 0.5,
    "batch_size": 64,
    "norm": "ln_1",
}


def test_it_notes_what_scikit_learn_finds_at_that_step(
    tmp_path: Path,
    few: Arrays,
    palette: Palette,
) -> None:
    """Independent source: scikit-learn on the features of the checkpoint; the weights are those of a run without it."""
    lab = Lab(few, palette)
    curves = lab.pretrain(tmp_path / "watched", callbacks=(OnlineLinearProbe(**SETTINGS),)).curves
    lab.pretrain(tmp_path / "plain")
    own, plain = (find_weights(str(tmp_path / name)).net().state_dict() for name in ("watched", "plain"))
    assert all(torch.equal(own[name], plain[name]) for name in plain)

    net = find_weights(str(tmp_path / "watched" / "checkpoints" / "step_0000004.ckpt")).net()
    data, x, y = lab.tokens(), {}, {}
    for split, count in (("train", 150), ("val", 40)):
        rows = data.sample_rows(split, at_most=count)
        assert len(np.unique(rows)) == count
        x[split] = layer_features(net, data.encode(torch.from_numpy(few.split(split).pixels[rows]))).detach().numpy()
        y[split] = few.split(split).labels[rows]
    for layer in (0, 1, 2):
        curve = curves[f"probe/layer_{layer}/accuracy"]
        assert curve.x == [4.0, 8.0]
        head = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8).fit(x["train"][layer], y["train"])
        assert curve.y[0] == pytest.approx(head.score(x["val"][layer], y["val"]), abs=1e-9)


def test_a_fit_that_does_not_converge_is_logged(
    tmp_path: Path,
    few: Arrays,
    palette: Palette,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Invariant: each layer whose fit is above the tolerance is named, with C."""
    monkeypatch.setattr(online_probe, "logistic_regression", partial(logistic_regression, max_iterations=0))
    Lab(few, palette).pretrain(tmp_path, steps=4, callbacks=(OnlineLinearProbe(**SETTINGS),))
    for layer in (0, 1, 2):
        assert re.search(rf"probe of layer {layer}: may be \S+ nats above its minimum, C = 0\.5", caplog.text)


def test_it_survives_a_stop(tmp_path: Path, few: Arrays, palette: Palette) -> None:
    """Round trip: curves of a run that was cut after 4 steps and went on are those of one that was not."""
    lab = Lab(few, palette)
    full = lab.pretrain(tmp_path / "whole", callbacks=(OnlineLinearProbe(**SETTINGS),)).curves
    cut = tmp_path / "cut"
    lab.pretrain(cut, callbacks=(OnlineLinearProbe(**SETTINGS),), checkpoint_keep=9)
    for name in ("step_0000008.ckpt", "step_0000008.sha256"):
        (cut / "checkpoints" / name).unlink()
    again = lab.pretrain(cut, callbacks=(OnlineLinearProbe(**SETTINGS),)).curves
    names = [name for name in full if name.startswith("probe/")]
    assert len(names) == 3
    assert {name: again[name] for name in names} == {name: full[name] for name in names}


@pytest.mark.parametrize(
    "changed", [{"every": 0}, {"depths": []}, {"depths": [1.5]}, {"strength": 0.0}, {"val_images": 0}]
)
def test_bad_settings(changed: dict[str, Any]) -> None:
    """Invariant: refused before anything starts, by name."""
    (name,) = changed
    with pytest.raises(ValueError, match=rf"callbacks\.probe\.{name}"):
        parse_arguments(OnlineLinearProbe, {**SETTINGS, **changed}, "callbacks.probe")


def test_images_without_labels(tmp_path: Path, few: Arrays, palette: Palette) -> None:
    """Invariant: a clear error before the first step."""
    unlabelled = Arrays(few.splits, n_class=None)
    with pytest.raises(ValueError, match="needs labels"):
        Lab(unlabelled, palette).pretrain(tmp_path, callbacks=(OnlineLinearProbe(**SETTINGS),))


def test_a_tokenizer_has_no_layers_to_read(tmp_path: Path) -> None:
    """By hand: one line, before the first step."""
    with pytest.raises(ValueError, match=r"^callbacks=probe reads the layers of a network, this run trains none"):
        train_tokenizer(tmp_path, callbacks=[OnlineLinearProbe(**SETTINGS)])
