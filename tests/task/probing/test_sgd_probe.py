"""task.solver=sgd: heads by stochastic gradient descent, all rates together."""

import math
import signal
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from igpt.checkpoint.igpt_format import Weights
from igpt.data.order import BatchPlan
from igpt.distributed.signals import StoppedError
from igpt.metric.result import Result
from igpt.model.features import layer_features
from igpt.objective.ar import AR
from igpt.training.nan_guard import NonFiniteLossError
from tests.task.conftest import Lab, machine
from tests.task.probing.conftest import MASKED, features, heads, labels, perturbed, save_state
from tests.task.test_stopping import Send

LN_10 = 2.302585


class LossesOfHeads(L.Callback):
    """Notes the loss of every head before the first step, (L + 1, R)."""

    losses: torch.Tensor

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            scores = pl_module.scores(pl_module.pool_features(batch, 0))
            nats = scores.logsumexp(dim=-1) - scores[..., torch.arange(len(batch.labels)), batch.labels]
            self.losses = nats.mean(dim=-1)


@pytest.mark.parametrize("masks", [False, True])
def test_sgd_begins_at_ln_10(tmp_path: Path, lab: Lab, ar: Weights, bert: Weights, masks: bool) -> None:
    """Independent source: ln 10 = 2.302585, of every head; at the end some head is below it."""
    noted = LossesOfHeads()
    weights, objective = (bert, MASKED) if masks else (ar, AR())
    result = lab.probe(tmp_path, weights, solver="sgd", callbacks=(noted,), objective=objective, test=False)
    assert noted.losses.shape == (3, 2)
    assert noted.losses.flatten().tolist() == pytest.approx([LN_10] * 6, abs=1e-6)
    curve = train_losses(tmp_path)
    assert curve[0] == pytest.approx(LN_10, abs=1e-6)
    assert curve[-1] < LN_10 - 0.01
    assert ("val/accuracy_one_mask" in result.numbers) == masks


def train_losses(folder: Path) -> list[float]:
    newest = sorted((folder / "checkpoints").glob("step_*.ckpt"))[-1]
    return [y for _, y in torch.load(newest, weights_only=True)["history"]["train/loss_clf"]]


def test_sgd_is_plain_momentum_with_a_cosine(lab: Lab, ar: Weights, sgd: tuple[Path, Result]) -> None:
    """Independent source: six steps in numpy, v ← 0.9 v + g, w ← w - η ½ (1 + cos(π s / 6)) v, for every head."""
    folder, result = sgd
    data = lab.tokens(plan=BatchPlan(50, 50))
    batches = [batch for _, batch in zip(range(6), data.train_dataloader(), strict=False)]
    trained = heads(folder)
    net, right = ar.net(), np.zeros((3, 2))
    x_val, y_val = features(lab, net, "val"), labels(lab, "val")
    for r, rate in enumerate((0.1, 1.0)):
        for layer in range(3):
            w, v = np.zeros((17, 10)), np.zeros((17, 10))  # the last row: the bias
            for step, batch in enumerate(batches):
                with torch.no_grad():
                    x = layer_features(net, data.encode(batch.tokens))[layer].double().numpy()
                x = np.concatenate([x, np.ones((50, 1))], axis=1)
                p = np.exp(x @ w)
                p = p / p.sum(axis=1, keepdims=True) - np.eye(10)[batch.labels.numpy()]
                v = 0.9 * v + x.T @ p / 50
                w = w - rate * 0.5 * (1 + math.cos(math.pi * step / 6)) * v
            assert np.abs(trained[f"weights.{r}"][layer].numpy().T - w[:16]).max() < 1e-4
            assert np.abs(trained[f"biases.{r}"][layer].numpy() - w[16]).max() < 1e-4
            predictions = (x_val[layer] @ w[:16] + w[16]).argmax(axis=1)
            right[layer, r] = (predictions == y_val).mean()
    assert result.curves["probe, val"].y == pytest.approx(right.max(axis=1))
    assert result.numbers["val/accuracy"].value == pytest.approx(right.max())
    layer, r = (int(i) for i in np.unravel_index(right.argmax(), right.shape))
    assert (result.numbers["probe/layer"].value, result.numbers["probe/rate"].value) == (layer, (0.1, 1.0)[r])
    head, y = load_file(folder / "probe.safetensors"), labels(lab, "test")
    assert torch.equal(head["weight"], trained[f"weights.{r}"][layer])
    assert torch.equal(head["bias"], trained[f"biases.{r}"][layer])
    scores = features(lab, net, "test")[layer] @ head["weight"].numpy().T + head["bias"].numpy()
    assert result.numbers["test/accuracy"].value == pytest.approx((scores.argmax(axis=1) == y).mean())
    assert result.class_names == {"confusion": tuple("0123456789")}
    top = np.argsort(scores, axis=1)[:, -5:]
    assert result.numbers["test/top_5"].value == pytest.approx((top == y[:, None]).any(axis=1).mean())


@pytest.mark.parametrize("step", [2, 3])
def test_sgd_resumes(tmp_path: Path, lab: Lab, ar: Weights, sgd: tuple[Path, Result], step: int) -> None:
    """Invariant: 3 + 3 steps, or 4 + 2, are six: heads and curves to the bit; the network is not in a checkpoint."""
    with pytest.raises(StoppedError, match=f"after step {step + 1}"):
        lab.probe(tmp_path, ar, solver="sgd", callbacks=(Send(signal.SIGTERM, step=step),))
    for _ in range(2):  # the second time nothing is left to train
        assert lab.probe(tmp_path, ar, solver="sgd").numbers == sgd[1].numbers
        assert train_losses(tmp_path) == train_losses(sgd[0])
        expected = heads(sgd[0])
        assert sorted(expected) == ["biases.0", "biases.1", "weights.0", "weights.1"]
        assert all(torch.equal(value, expected[name]) for name, value in heads(tmp_path).items())


def test_sgd_accumulates(tmp_path: Path, lab: Lab, ar: Weights, sgd: tuple[Path, Result]) -> None:
    """Invariant: passes of 10 images give the heads of one of 50, but for rounding."""
    lab.probe(tmp_path, ar, solver="sgd", test=False, on=machine(micro_batch=10))
    expected = heads(sgd[0])
    for name, value in heads(tmp_path).items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5)


def test_sgd_on_a_window(tmp_path: Path, lab: Lab, ar: Weights, sgd: tuple[Path, Result]) -> None:
    """Independent source: the heads of all three layers side by side, after one step in numpy; one layer is itself."""
    settings: dict[str, Any] = {"solver": "sgd", "layer": 1, "test": False}
    result = lab.probe(tmp_path / "three", ar, **settings, concat_layers=3, sgd={"steps": 1})
    batch = next(iter((data := lab.tokens(plan=BatchPlan(50, 50))).train_dataloader()))
    with torch.no_grad():
        x = np.concatenate(list(layer_features(ar.net(), data.encode(batch.tokens)).numpy()), axis=1)
    gradient = (0.1 - np.eye(10)[batch.labels.numpy()]).T @ x / 50
    assert np.abs(heads(tmp_path / "three")["weights.1"][0].numpy() + 1.0 * gradient).max() < 1e-5
    assert (result.provenance["layers"], result.numbers["probe/layer"].value) == ([0, 1, 2], 1)
    lab.probe(tmp_path / "one", ar, **settings)
    alone, together = heads(tmp_path / "one"), heads(sgd[0])
    assert all(torch.allclose(value, together[name][1:2], atol=1e-6) for name, value in alone.items())


@pytest.fixture
def large(tmp_path: Path, lab: Lab, ar: Weights) -> Weights:
    """A network with features of about 1,000: heads overflow in the first step at a rate of 1e38."""
    return save_state(tmp_path / "large", lab, perturbed(ar, times=1e4))


def test_a_rate_too_high_breaks_its_own_heads_only(tmp_path: Path, lab: Lab, large: Weights) -> None:
    """Invariant: next to heads that overflow, the others are what they are alone; the run ends well and takes one."""
    results = {
        name: lab.probe(tmp_path / name, large, norm="raw", solver="sgd", sgd={"rates": rates}, test=False)
        for name, rates in (("alone", [1e-7, 1e-6]), ("beside", [1e38, 1e-7, 1e-6]))
    }
    trained, expected = heads(tmp_path / "beside"), heads(tmp_path / "alone")
    assert not trained["weights.0"].isfinite().any()
    for r in (0, 1):
        for kind in ("weights", "biases"):
            assert torch.allclose(trained[f"{kind}.{r + 1}"], expected[f"{kind}.{r}"], rtol=1e-4, atol=1e-9)
    assert train_losses(tmp_path / "beside") == pytest.approx(train_losses(tmp_path / "alone"), rel=1e-5)
    for name in ("probe/rate", "probe/layer", "val/accuracy"):
        assert results["beside"].numbers[name] == results["alone"].numbers[name]


def test_all_rates_too_high(tmp_path: Path, lab: Lab, large: Weights) -> None:
    """Then nothing can be told, and that is said, with the setting that can be changed."""
    with pytest.raises(NonFiniteLossError, match=r"task\.sgd\.rates"):
        lab.probe(tmp_path / "run", large, norm="raw", solver="sgd", sgd={"rates": [1e38, 1e38]})


def test_in_turn_a_rate_too_high_is_passed_over(tmp_path: Path, lab: Lab, large: Weights) -> None:
    """Where no head of a rate is finite, the next one is tried; where none of any is, that is an error."""

    def search(name: str, rates: list[float]) -> Result:
        sgd = {"rates": rates, "search": "in_turn"}
        found: Result = lab.probe(tmp_path / name, large, norm="raw", solver="sgd", sgd=sgd, test=False)
        return found

    results = [search(f"{len(rates)}", rates) for rates in ([1e38, 1e-7], [1e-7])]
    assert results[0].provenance["rates"] == [1e38, 1e-7]
    for name in ("probe/rate", "probe/layer", "val/accuracy"):
        assert results[0].numbers[name] == results[1].numbers[name]
    with pytest.raises(NonFiniteLossError, match=r"task\.sgd\.rates"):
        search("none", [1e38, 1e37])


def test_the_loss_of_a_batch_is_the_mean(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Independent source: after one step, the loss that is shown is the least cross-entropy of all heads."""
    lab.probe(tmp_path, ar, solver="sgd", sgd={"steps": 2, "checkpoint_every": 1, "val_every": 2}, test=False)
    data = lab.tokens(plan=BatchPlan(50, 50))
    batches = [batch for _, batch in zip(range(2), data.train_dataloader(), strict=False)]
    net, losses = ar.net(), []
    with torch.no_grad():
        for layer in range(3):
            first, second = (layer_features(net, data.encode(batch.tokens))[layer] for batch in batches)
            error = torch.full((50, 10), 0.1) - F.one_hot(batches[0].labels, 10)
            for rate in (0.1, 1.0):
                w, b = -rate * error.T @ first / 50, -rate * error.mean(dim=0)
                losses.append(float(F.cross_entropy(second @ w.T + b, batches[1].labels)))
    assert train_losses(tmp_path)[1] == pytest.approx(min(losses), abs=1e-5)
