"""Later recipes: cool-downs on the way, averaged weights, clipped gradients."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

import igpt
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.kept import list_weights
from igpt.checkpoint.resume import find_checkpoints, parse_step
from igpt.metric.result import Result
from igpt.run.targets import task_settings
from igpt.training.ema import warmed_up_decay
from igpt.utils import files
from tests.conftest import learned_numbers
from tests.task.conftest import PRETRAIN, Lab, check_bad_settings, machine
from tests.task.test_pretrain import StopAfter

# Steps 2 and 3 of 3 cool, then 6 to 8 of 8; two passes a step
RECIPE: dict[str, Any] = {
    "schedule": "wsd", "decay_share": 0.4, "cooled_at": [3], "warmup_steps": 1, "ema": 0.25, "gradient_clip": 0.2,
    "checkpoint_every": 2, "checkpoint_keep": 1, "keep_steps": [2, 5, 8], "on": machine(micro_batch=50),
}  # fmt: skip


KEPT, KEPT_AVERAGE = "model_step_0000002", "model_ema_step_0000002"


class Steps(L.Callback):
    """Notes of each optimiser step: weights and gradient norms (before and after clipping), rate."""

    is_observer = True

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []  # also the initial ones
        self.norms: list[tuple[float, float]] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._net = pl_module.net
        self.note_weights()
        # the gradients are there once it steps, and are left as they were
        trainer.optimizers[0].register_step_post_hook(lambda optimizer, *_: self.note_step(optimizer))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self._norm = self.norm(optimizer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == len(self.weights):
            self.note_weights()

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append((self._norm, self.norm(optimizer)))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def note_weights(self) -> None:
        self.weights.append({name: weight.detach().double() for name, weight in self._net.named_parameters()})

    @staticmethod
    def norm(optimizer: torch.optim.Optimizer) -> float:
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        return float(sum(gradient.double().square().sum() for gradient in gradients if gradient is not None) ** 0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Any, palette: Any) -> tuple[Path, Result, Steps]:
    folder, steps = tmp_path_factory.mktemp("recipe"), Steps()
    return folder, Lab(digits, palette).pretrain(folder, callbacks=(steps,), **RECIPE), steps


def test_rates_and_gradients_of_every_step(trained: tuple[Path, Result, Steps]) -> None:
    """By hand: up in a step, down to the third; up again and down in 3.2. Clipped are the gradients above the norm."""
    steps = trained[2]
    expected = [1, 1, 1 / 1.2, 1, 1, 3 / 3.2, 2 / 3.2, 1 / 3.2]
    assert steps.rates == pytest.approx([0.01 * share for share in expected])
    assert [after for _, after in steps.norms] == pytest.approx([min(0.2, before) for before, _ in steps.norms], 1e-5)
    assert max(before for before, _ in steps.norms) > 0.2


def test_the_average_by_hand(trained: tuple[Path, Result, Steps], tmp_path: Path, lab: Lab) -> None:
    """By hand, in float64, over optimiser steps: decays 0.1, 2/11, then 0.25. It is what `init=` and `igpt.load` take.

    Its loss is that of evaluation; the weights themselves are in `model/` and in the checkpoints.
    """
    folder, result, steps = trained
    average, *others = steps.weights
    for n, weights in enumerate(others):
        decay = (0.1, 2 / 11, 0.25, 0.25)[min(n, 3)]
        average = {name: decay * average[name] + (1 - decay) * weight for name, weight in weights.items()}
    saved = load_file(folder / "model_ema" / "model.safetensors")
    loaded = igpt.load(folder / "model_ema").net.state_dict()
    raw = load_file(folder / "model" / "model.safetensors")
    in_checkpoint = find_weights(str(find_checkpoints(folder)[-1])).net().state_dict()
    for name, weight in average.items():
        torch.testing.assert_close(saved[name], weight.float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(loaded[name], saved[name])
        assert torch.equal(raw[name], others[-1][name].float())
        assert torch.equal(in_checkpoint[name], raw[name])
    assert not torch.equal(saved["wte"], raw["wte"])
    for name, key in (("model_ema", "val/loss_gen_ema"), ("model", "val/loss_gen")):
        evaluated = lab.evaluate(tmp_path / name, find_weights(str(folder / name)))
        assert result.numbers[key].value == pytest.approx(evaluated.numbers["val/loss_gen"].value, rel=1e-6)
    assert result.curves["val/loss_gen_ema"].x == [4, 8]


def test_a_cool_down_and_the_average_are_resumed(tmp_path: Path, lab: Lab, trained: tuple[Path, Result, Steps]) -> None:
    """Invariant: crashed in a cool-down, resumed from the step before: all to the bit, and cooled checkpoints stay.

    So are the averaged weights where the run ended after its last checkpoint, and no step is left.
    """
    with pytest.raises(KeyError):
        lab.pretrain(tmp_path, callbacks=(StopAfter(3),), **RECIPE)
    kept = {path.name: files.sha256(path / "model.safetensors") for path in trained[0].glob("model*_step_*")}
    assert {
        name: files.sha256(tmp_path / name / "model.safetensors") for name in (KEPT, KEPT_AVERAGE)
    }.items() < kept.items()
    shutil.rmtree(tmp_path / KEPT)  # as by a kill after the checkpoint of that step, and before its weights were kept
    assert [parse_step(path) for path in find_checkpoints(tmp_path)] == [2]
    lab.pretrain(tmp_path, **RECIPE)
    shutil.rmtree(tmp_path / "model_ema")
    result = lab.pretrain(tmp_path, **RECIPE)
    assert "train/step_seconds" not in result.numbers
    assert result.curves == trained[1].curves
    assert learned_numbers(result) == learned_numbers(trained[1])
    for name in ("model", "model_ema"):
        own, expected = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, trained[0]))
        assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    assert {path.name: files.sha256(path / "model.safetensors") for path in tmp_path.glob("model*_step_*")} == kept
    for folder in (tmp_path, trained[0]):
        assert [parse_step(path) for path in find_checkpoints(folder)] == [3, 8]


def test_the_steps_that_are_kept_are_weights(trained: tuple[Path, Result, Steps], lab: Lab, tmp_path: Path) -> None:
    """Independent source: the weights noted at steps 2, 5 and 8. Each step is listed once, the cooled one as it is."""
    folder, _, steps = trained
    listed = list_weights(folder)
    assert [(of.metadata.step, of.folder.name) for of in listed] == [
        (2, KEPT), (3, "checkpoints"), (5, "model_step_0000005"), (8, "model"),
    ]  # fmt: skip
    for of in (*listed, find_weights(str(folder / "model_step_0000008"))):
        noted = steps.weights[of.metadata.step]
        assert all(torch.equal(weight, noted[name].float()) for name, weight in of.net().state_dict().items())
    assert sorted(path.name for path in (folder / KEPT).iterdir()) == ["config.json", "model.safetensors"]
    assert len(list(folder.glob("model*_step_*"))) == 6  # with those of the average
    with pytest.raises(ValueError, match=rf"nothing of that name; kept steps of that run: init=\S+/{KEPT}, init="):
        find_weights(str(folder / "model_step_0000004"))
    unfinished = Path(shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("model", "*_0000005")))
    assert [of.metadata.step for of in list_weights(unfinished)] == [2, 3, 8]
    with pytest.raises(ValueError, match=rf"not finished: .*take what it has so far, init=\S+ckpt, init=\S+/{KEPT}"):
        find_weights(str(unfinished))


def test_without_an_average_there_is_none(pretrained: Path) -> None:
    """Invariant: neither a folder nor anything in the checkpoints, which are as they were."""
    assert not (pretrained / "model_ema").exists()
    checkpoint = torch.load(find_checkpoints(pretrained)[-1], weights_only=True)
    assert "ema" not in checkpoint
    assert checkpoint["lr_schedulers"][0]["lr_lambdas"] == [None]


def test_gradients_are_clipped_for_all_trainings(tmp_path: Path, lab: Lab, few: Any, palette: Any) -> None:
    """Invariant: as for Adam in float32 pretraining."""
    lab.digits, muon, mixed, tuned = few, Steps(), Steps(), Steps()
    clipped: dict[str, Any] = {"steps": 2, "val_every": 2, "gradient_clip": 0.01}
    lab.pretrain(tmp_path / "pretrained", optimizer="muon", callbacks=(muon,), **clipped)
    narrow = machine(precision="bf16-mixed")  # under which Lightning refuses a fused Adam that scales losses
    lab.pretrain(tmp_path / "mixed", on=narrow, callbacks=(mixed,), **clipped)
    lab.finetune(tmp_path / "tuned", None, callbacks=(tuned,), test=False, **clipped)
    for steps in (muon, mixed, tuned):
        assert [after for _, after in steps.norms] == pytest.approx([0.01, 0.01])


def test_the_decay_is_warmed_up() -> None:
    """By hand: of 0, 10 and 10,000 steps."""
    assert [warmed_up_decay(n, 0.999) for n in (0, 10, 10_000)] == [0.1, 0.55, 0.999]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ema": 0.9}, r"^task\.ema averages whole weights, .* choose task\.ema=null, or trainer=fsdp"),
        ({"optimizer": "muon"}, r"^task\.optimizer=muon works on whole matrices, .* or trainer=fsdp"),
    ],
)
def test_what_deepspeed_does_not_do(changed: dict[str, Any], message: str) -> None:
    settings = task_settings("igpt.task.pretrain.run", {**PRETRAIN, **changed})
    settings.check_sharded("fsdp")
    with pytest.raises(ValueError, match=message):
        settings.check_sharded("deepspeed_3")


WSD: dict[str, Any] = {"schedule": "wsd", "decay_share": 0.2, "steps": 100, "warmup_steps": 10}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decay_share": 0.2}, r"are settings of task\.schedule=wsd, got task\.schedule=cosine"),
        ({"cooled_at": [4]}, r"are settings of task\.schedule=wsd, got task\.schedule=cosine"),
        ({"schedule": "wsd"}, r"needs task\.decay_share"),
        ({**WSD, "cooled_at": [20, 200]}, r"\[20, 200\] must rise, from above .* to below task\.steps 100"),
        ({**WSD, "cooled_at": [100]}, r"must rise, .* below task\.steps 100"),
        ({**WSD, "cooled_at": [40, 20]}, r"\[40, 20\] must rise"),
        ({**WSD, "cooled_at": [10]}, r"\[10\] must rise, from above task\.warmup_steps 10"),
        ({**WSD, "cooled_at": [12]}, r"cooled_at 12: .* begin before the warm-up \(task\.warmup_steps 10\) has ended"),
        ({**WSD, "cooled_at": [50, 60]}, r"cooled_at 60: .* begin before the one to task\.cooled_at 50 has ended"),
        ({**WSD, "cooled_at": [90]}, r"task\.steps 100: its cool-down, the last 0\.2 of the steps, would begin before"),
        ({"schedule": "linear"}, r"schedule must be one of cosine, wsd"),
        ({"keep_steps": [2, 9]}, r"task\.keep_steps \[2, 9\] must rise, within 1 … task\.steps 8: leave out"),
        ({"keep_steps": [4, 2]}, r"task\.keep_steps \[4, 2\] must rise"),
        ({"keep_steps": [2, 2]}, r"task\.keep_steps \[2, 2\] must rise"),
        ({"keep_steps": [0]}, r"task\.keep_steps\.0 must be at least 1, got 0"),
        ({"ema": 1.0}, r"task\.ema must be below 1 or null"),
        ({"gradient_clip": 0}, r"task\.gradient_clip must be at least 1e-100 or null"),
    ],
)
def test_bad_settings(changed: dict[str, Any], message: str) -> None:
    check_bad_settings("pretrain", PRETRAIN, changed, message)
