"""Pretraining: resumed, accumulated and sped-up runs are the plain run; broken ones stop."""

import csv
import math
import resource
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.resume import AtomicCheckpointIO, latest_checkpoint
from igpt.data.digits import Digits
from igpt.data.order import BatchPlan
from igpt.metric.result import Number, Result
from igpt.model import c_library, dispatch
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.objective.bert import BERT
from igpt.tokens.palette import Palette
from igpt.training.callbacks import SampleGrid
from igpt.training.checkpoint_callback import Checkpoints
from igpt.training.hardware import matmul_precision
from igpt.training.loggers import RunInfo
from igpt.training.loggers import csv as csv_logger
from igpt.training.nan_guard import NonFiniteLossError
from igpt.training.optimizers import warmup_cosine
from tests.conftest import attention_in_graph, learned_numbers, needs_compiler, small_net
from tests.task.conftest import PRETRAIN, SIZES, Lab, check_bad_settings, machine


class StopAfter(L.Callback):
    """Raises after a step; like a kill, it leaves no time to save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            next(each for each in trainer.callbacks if isinstance(each, Checkpoints))._finished = None
            raise KeyError("crash")


class PoisonWeights(L.Callback):
    """Makes the network's output NaN before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.net.wpe[3] = torch.nan


class Observed(L.Callback):
    """Notes how the training steps are computed.

    `attention`: its ways. `recomputed`: blocks computed once more in a backward pass. `dtypes`: of the results of the
    blocks' matrix products. `products`: the precision of those in float32.
    """

    def __init__(self) -> None:
        self.attention: set[str] = set()
        self.recomputed: set[int] = set()
        self.dtypes: set[torch.dtype] = set()
        self.products: set[str] = set()
        self._n_forward = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for block in pl_module.net.blocks:
            block.register_forward_pre_hook(self._count)
            block.mlp.c_fc.register_forward_hook(lambda layer, given, out: self.dtypes.add(out.dtype))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.attention |= attention_in_graph(loss)
        self.products.add(torch.get_float32_matmul_precision())
        self._n_forward = 0

    def on_after_backward(self, *_: Any) -> None:
        self.recomputed.add(self._n_forward)

    def _count(self, *_: Any) -> None:
        self._n_forward += 1


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, digits: Any, palette: Any) -> tuple[Path, Result]:
    """An uninterrupted run, the reference of the tests below. 270 training images: 8 steps of 100 cross epochs."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, Lab(digits, palette).pretrain(folder)


def test_resumed_equals_uninterrupted(tmp_path: Path, lab: Lab, unbroken: tuple[Path, Result]) -> None:
    """Invariant: 6 steps lost at a crash, resumed from step 4: weights and every curve equal to the bit."""
    with pytest.raises(KeyError):
        lab.pretrain(tmp_path, callbacks=(StopAfter(6),))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_0000004.ckpt"
    result = lab.pretrain(tmp_path)
    expected = weights(unbroken[0])
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path).items())
    assert result.curves == unbroken[1].curves
    assert learned_numbers(result) == learned_numbers(unbroken[1])
    before, after = (
        torch.load(tmp_path / "checkpoints" / f"step_000000{step}.ckpt", weights_only=True)["device_seconds"]
        for step in (4, 8)
    )
    assert 0 < before < after <= result.numbers["train/device_days"].value * 86_400
    assert len(result.curves["train/loss_gen"].x) == 8
    kept = [f"step_000000{step}.{kind}" for step in (4, 8) for kind in ("ckpt", "sha256")]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.json", "latest", *kept]


def test_the_cost_is_measured(unbroken: tuple[Path, Result]) -> None:
    """By hand: 800 images of 64 positions, of each 6 operations a weight of 2 layers of 12 · 16² and of 17 · 16, and
    12 · 16 · 32 of each layer's attention; 8 steps, three of which are not timed; no more memory than ever.
    """
    numbers = unbroken[1].numbers
    image = 64 * (6 * (2 * 12 * 16**2 + 17 * 16) + 2 * 12 * 16 * 32)
    assert numbers["train/operations"] == Number(800.0 * image, "FLOP", 800)
    assert numbers["train/step_seconds"].n == 5
    assert numbers["train/device_days"].value * 86_400 > 5 * numbers["train/step_seconds"].value / 2
    assert 0 < numbers["train/step_seconds"].value < 60
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2**20  # the kernel counts pages in batches
    assert 1e8 < numbers["train/peak_memory"].value * 1e9 <= most  # PyTorch alone takes more


def test_accumulated_equals_one_batch(tmp_path: Path, lab: Lab, unbroken: tuple[Path, Result]) -> None:
    """Invariant: four passes of 25 images give the losses of one of 100, to 1e-5 relative."""
    result = lab.pretrain(tmp_path, on=machine(micro_batch=25))
    for name, curve in unbroken[1].curves.items():
        assert result.curves[name].x == curve.x
        assert result.curves[name].y == pytest.approx(curve.y, rel=1e-5)


def test_accumulated_resumes_exactly(tmp_path: Path, lab: Lab, unbroken: tuple[Path, Result]) -> None:
    """Invariant: with accumulation too, a resumed run is the uninterrupted one, to the bit, from between log lines.

    A point is the mean of the steps since the point before, `grad_norm_max` their largest.
    """
    how: dict[str, Any] = {"on": machine(micro_batch=50), "log_every": 3}
    uninterrupted = lab.pretrain(tmp_path / "a", **how)
    with pytest.raises(KeyError):
        lab.pretrain(tmp_path / "b", **how, callbacks=(StopAfter(7),))
    assert lab.pretrain(tmp_path / "b", **how).curves == uninterrupted.curves
    for name, combine in (("loss_gen", np.mean), ("grad_norm", np.mean), ("grad_norm_max", np.max)):
        curve, each = uninterrupted.curves[f"train/{name}"], unbroken[1].curves[f"train/{name}"].y
        assert curve.x == [3, 6]
        assert curve.y == pytest.approx([combine(each[:3]), combine(each[3:6])], rel=1e-5)


def test_bert_trains_accumulates_and_resumes(tmp_path: Path, lab: Lab) -> None:
    """Invariants: its masks do not depend on the passes; a resumed run is the uninterrupted one, to the bit."""
    bert = BERT(mask_probability=0.15)
    full = lab.pretrain(tmp_path / "whole", objective=bert)
    parts = lab.pretrain(tmp_path / "parts", objective=bert, on=machine(micro_batch=25))
    with pytest.raises(KeyError):
        lab.pretrain(tmp_path / "resumed", objective=bert, callbacks=(StopAfter(6),))
    assert lab.pretrain(tmp_path / "resumed", objective=bert).curves == full.curves
    train = full.curves["train/loss_gen"].y
    assert train[0] == pytest.approx(2.833213, abs=1e-6)  # ln 17
    assert train[-1] < train[0] - 0.3
    assert parts.curves["train/loss_gen"].y == pytest.approx(train, rel=1e-5)


def test_muon_trains_and_resumes(tmp_path: Path, lab: Lab) -> None:
    """Invariant: a resumed run is the uninterrupted one, to the bit."""
    full = lab.pretrain(tmp_path / "whole", optimizer="muon")
    with pytest.raises(KeyError):
        lab.pretrain(tmp_path / "resumed", optimizer="muon", callbacks=(StopAfter(6),))
    assert lab.pretrain(tmp_path / "resumed", optimizer="muon").curves == full.curves
    train = full.curves["train/loss_gen"].y
    assert train[-1] < train[0] - 0.3


def test_the_losses_are_those_of_a_plain_loop(lab: Lab, unbroken: tuple[Path, Result]) -> None:
    """Independent source: ln 17 = 2.8332 of a head of zeros, then a loop of plain PyTorch over the same batches.

    With the paper's Adam, two steps of warm-up and a cosine to zero.
    """
    net = GPT(GPTConfig(**SIZES))
    net.init_weights(0)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.95))
    rates = [0.005, 0.01, *(0.005 * (1 + math.cos(math.pi * step / 6)) for step in range(6))]
    data, losses, norms = lab.tokens(plan=BatchPlan(100, 100)), [], []
    for rate, batch in zip(rates, data.train_dataloader(), strict=False):
        tokens = data.encode(batch.tokens)
        loss = F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())
        losses.append(float(loss))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), math.inf)))
        optimizer.step()
    curve = unbroken[1].curves["train/loss_gen"].y
    assert unbroken[1].curves["train/grad_norm"].y == pytest.approx(norms, rel=1e-4)
    assert curve[0] == pytest.approx(2.833213, abs=1e-6)
    assert curve == pytest.approx(losses, rel=1e-5)
    saved = weights(unbroken[0])
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-4)


def test_validation_does_not_depend_on_the_batch(tmp_path: Path, lab: Lab, unbroken: tuple[Path, Result]) -> None:
    """Invariant: 18 images in passes of 7 give what one pass gives, to 1e-6."""
    weights = find_weights(str(unbroken[0]))
    for batch_size in (7, 18, 100):
        result = lab.evaluate(tmp_path, weights, batch_size=batch_size)
        number, expected = result.numbers["val/loss_gen"], unbroken[1].numbers["val/loss_gen"]
        assert number.n == expected.n == 18
        assert number.value == pytest.approx(expected.value, rel=1e-6)


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, lab: Lab) -> None:
    """The step is named; the checkpoint of step 4 is whole and finite, and nothing newer was written."""
    with pytest.raises(NonFiniteLossError, match="loss of step 6 is not finite"):
        lab.pretrain(tmp_path, callbacks=(PoisonWeights(5),))
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step_0000004.ckpt"
    state = torch.load(latest, weights_only=True)["state_dict"]
    assert all(weight.isfinite().all() for weight in state.values())
    assert not (tmp_path / "model").exists()


def test_a_rate_too_high_is_stopped(tmp_path: Path, lab: Lab) -> None:
    """A real blow-up, not a planted one: float32 overflows at a rate of 1e18."""
    with pytest.raises(NonFiniteLossError, match=r"lower task\.learning_rate"):
        lab.pretrain(tmp_path, learning_rate=1e18, warmup_steps=0, val_every=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"activation_checkpointing": True},
        pytest.param({"attention_backend": "native"}, marks=needs_compiler),
        {"attention_backend": "sdpa"},
        {"attention_backend": "blocks"},
        {"attention_backend": "bmm"},
        {"matmul_precision": "highest"},
    ],
)
def test_the_machine_changes_no_loss(
    tmp_path: Path, lab: Lab, unbroken: tuple[Path, Result], changed: dict[str, Any]
) -> None:
    """Invariant: how it is computed moves no loss by more than rounding. By hand: it is computed as was asked for.

    Both blocks again for the backward pass, or none; attention as the graph of the loss has it.
    """
    seen = Observed()
    result = lab.pretrain(tmp_path, on=machine(**changed), callbacks=(seen,))
    for name, curve in unbroken[1].curves.items():
        assert result.curves[name].y == pytest.approx(curve.y, rel=1e-5)
    assert seen.recomputed == {2 if "activation_checkpointing" in changed else 0}
    assert seen.attention == {changed.get("attention_backend", "native" if c_library.is_available() else "bmm")}
    assert seen.dtypes == {torch.float32}


@pytest.mark.parametrize("setting", ["auto", "highest", "high", "medium"])
def test_matmul_precision_is_that_of_every_step(tmp_path: Path, lab: Lab, setting: str) -> None:
    """By hand: as it is set, whatever it was before; auto is what `dispatch` says of this CPU."""
    seen = Observed()
    lab.pretrain(tmp_path, on=machine(matmul_precision=setting), callbacks=(seen,), steps=3, val_every=0)
    expected = dispatch.matmul_precision(torch.device("cpu")) if setting == "auto" else setting
    assert seen.products == {expected}


@pytest.mark.parametrize("asked", [True, False, "auto"])
def test_blocks_are_compiled_where_asked(asked: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: all of them or none; auto asks `dispatch`, with the operations of the training that is to come."""
    monkeypatch.setattr(dispatch, "is_worth_compiling", lambda device, *, n_embd, flops, half: flops > 1e12)
    for flops in (1e11, 1e13):
        net = small_net()
        machine(compile=asked).prepare(net, flops=flops)
        expected = flops == 1e13 if asked == "auto" else asked
        assert [block._compiled_call_impl is not None for block in net.blocks] == [expected] * 3


@pytest.mark.parametrize(
    ("precision", "rel", "kept"), [("bf16-mixed", 0.01, torch.float32), ("bf16-true", 0.05, torch.bfloat16)]
)
def test_bf16_follows_float32(
    tmp_path: Path, lab: Lab, unbroken: tuple[Path, Result], precision: str, rel: float, kept: torch.dtype
) -> None:
    """Invariant: lower precision stays near the losses; mixed keeps its weights in float32.

    By hand: the blocks' products are bfloat16 in both.
    """
    seen = Observed()
    result = lab.pretrain(tmp_path, on=machine(precision=precision), callbacks=(seen,))
    assert result.curves["train/loss_gen"].y == pytest.approx(unbroken[1].curves["train/loss_gen"].y, rel=rel)
    assert seen.dtypes == {torch.bfloat16}
    assert {weight.dtype for weight in weights(tmp_path).values()} == {kept}
    assert find_weights(str(tmp_path)).net().wte.dtype == torch.float32  # whatever was saved is read as float32


def test_matmul_precision_is_put_back() -> None:
    """Invariant: also when the block fails."""
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), matmul_precision("medium", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_a_batch_that_does_not_divide(tmp_path: Path, lab: Lab) -> None:
    with pytest.raises(ValueError, match="100 is no multiple of 1 device"):
        lab.pretrain(tmp_path, on=machine(micro_batch=30))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, r"task\.steps must be at least 1"),
        ({"batch_size": -1}, r"task\.batch_size must be at least 1"),
        ({"warmup_steps": 8}, r"must be below task\.steps"),
        ({"log_every": 0}, "log_every"),
        ({"checkpoint_keep": 0}, "checkpoint_keep"),
        ({"val_every": -1}, "val_every"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, muon"),
    ],
)
def test_bad_settings(changed: dict[str, Any], message: str) -> None:
    check_bad_settings("pretrain", PRETRAIN, changed, message)


def test_another_palette_is_not_resumed(tmp_path: Path, lab: Lab) -> None:
    """The checkpoint holds the colours themselves: as many others, in another order, are another vocabulary."""
    lab.pretrain(tmp_path)
    lab.palette = Palette(lab.palette.centres[::-1].copy())
    with pytest.raises(ValueError, match="its tokenizer is not this run's"):
        lab.pretrain(tmp_path)


def test_without_a_validation_split(tmp_path: Path, lab: Lab) -> None:
    """Validating on nothing is refused at the start; without it the run trains on all and keeps its model."""
    lab.digits = Digits(
        name="digits", resolution=8, val_fraction=0.0, test_fraction=0.8, split_seed=0, shift=1, shift_share=0.5
    )
    with pytest.raises(ValueError, match="nothing to validate on"):
        lab.pretrain(tmp_path)
    result = lab.pretrain(tmp_path, val_every=0)
    assert "val/loss_gen" not in result.numbers
    assert len(weights(tmp_path)) > 0


def test_metrics_are_exact_and_under_their_steps(tmp_path: Path, lab: Lab) -> None:
    """By hand: a row of metrics.csv for every second step, with what was seen by then."""
    about = RunInfo("pretrain", "tiny", "digits8", "ar", run_id="x", first_step=0, trains=True, pipeline=None)
    lab.pretrain(tmp_path, log_every=2, loggers=[csv_logger(tmp_path, about)])
    with (tmp_path / "metrics" / "from_0000000" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["train/loss_gen"]]
    assert [(int(row["step"]), int(row["images_seen"]), int(row["tokens_seen"])) for row in train] == [
        (step, step * 100, step * 6400) for step in (2, 4, 6, 8)
    ]
    assert [float(row["lr"]) for row in train] == pytest.approx(
        [0.01 * warmup_cosine(step - 1, warmup_steps=2, steps=8) for step in (2, 4, 6, 8)]
    )
    assert [int(row["step"]) for row in rows if row["val/loss_gen"]] == [4, 8]


@pytest.mark.slow
def test_samples_are_drawn_while_training_compiled(tmp_path: Path, lab: Lab) -> None:
    """Invariant: at the validations that are due, without compiling anew for every position of the sequence."""
    grid = SampleGrid(count=3, every=2, temperature=1.0)
    torch._dynamo.utils.counters.clear()
    lab.pretrain(tmp_path, on=machine(compile=True), val_every=2, callbacks=(grid,))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_0000004.png", "step_0000008.png"]
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize(
    "changed", [{"precision": "fp8"}, {"attention_backend": "flash"}, {"devices": 2}, {"accelerator": "tpu"}]
)
def test_bad_machine(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"trainer\."):
        machine(**changed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, so asking for one is right")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="sees no GPU here"):
        machine(accelerator="gpu")


def test_another_format_is_not_resumed(tmp_path: Path, lab: Lab) -> None:
    lab.pretrain(tmp_path)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    changed = torch.load(latest, weights_only=True) | {"format": 99}
    AtomicCheckpointIO().save_checkpoint(changed, latest)
    with pytest.raises(ValueError, match=r"format 99, this version reads 1 and 2"):
        lab.pretrain(tmp_path)
