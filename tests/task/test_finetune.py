"""Fine-tuning: first losses, what is trained, resuming, and what is kept."""

import math
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.head_files import find_head, read_head
from igpt.checkpoint.igpt_format import Weights
from igpt.data.order import BatchPlan
from igpt.data.source import ArraySplit
from igpt.distributed.signals import StoppedError
from igpt.metric.result import Result
from igpt.model.head import ClassHead
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.run.targets import task_settings
from igpt.task.class_score import ClassScore, classes_hash
from igpt.task.evaluate import load_trained_head
from igpt.tokens.batches import Batch
from igpt.tokens.palette import Palette
from igpt.training.nan_guard import NonFiniteLossError
from igpt.utils import keyed
from tests.conftest import learned_numbers
from tests.task.conftest import (
    FINETUNE,
    Arrays,
    Lab,
    check_bad_settings,
    drawn,
    have_equal_weights,
    machine,
    read_finetuned,
)
from tests.task.test_stopping import Send

MASKED = BERT(mask_probability=0.15)
LN_10, LN_17 = 2.302585, 2.833213
OF_VAL = 1.01 / 60  # one image


@pytest.fixture
def lab(few: Arrays, palette: Palette) -> Lab:
    return Lab(few, palette)


@pytest.fixture(scope="module")
def bert(masked: Path) -> Weights:
    return find_weights(str(masked))


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, few: Arrays, palette: Palette, ar: Weights
) -> tuple[Path, Result]:
    """Six steps without a break, the reference of the tests below."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, Lab(few, palette).finetune(folder, ar)


@pytest.mark.parametrize("masks", [False, True])
def test_the_first_losses(tmp_path: Path, lab: Lab, ar: Weights, bert: Weights, masks: bool) -> None:
    """Independent source: ln 10 of a head of zeros, and what the given weights lose on the first batch."""
    weights, objective = (bert, MASKED) if masks else (ar, AR())
    result = lab.finetune(tmp_path, weights, objective=objective, test=False)
    data = lab.tokens(plan=BatchPlan(50, 50))
    batch = next(iter(data.train_dataloader()))
    tokens = data.encode(batch.tokens)
    visible = objective.visible_mask(tokens, batch.rng_keys)
    with torch.no_grad():
        loss = float(objective.loss(weights.net()(tokens, visible), tokens, visible))
    assert result.curves["train/loss_clf"].y[0] == pytest.approx(LN_10, abs=1e-6)
    assert result.curves["train/loss_gen"].y[0] == pytest.approx(loss, rel=1e-5)
    assert loss < LN_17 - 0.1  # pretrained, so not that of a head of zeros
    assert result.curves["train/accuracy"].y[0] == pytest.approx(float((batch.labels == 0).double().mean()))
    assert result.curves["train/loss_clf"].x == [1, 2, 3, 4, 5, 6]


def test_what_is_reported_is_what_was_kept(lab: Lab, few: Arrays, uninterrupted: tuple[Path, Result]) -> None:
    """Independent source: plain PyTorch with the files in `model/`: accuracy, both losses, confusion, of both splits.

    By hand: the best step's, and how many images that took.
    """
    folder, result = uninterrupted
    weights = find_weights(str(folder))
    net, wclf = weights.net(), load_file(folder / "model" / "head.safetensors")["wclf"]
    for split in ("val", "test"):
        y = torch.from_numpy(lab.digits.split(split).labels)
        tokens = lab.tokens().sample_tokens(split).long()
        with torch.no_grad():
            hidden = net.trunk(tokens)
            scores = hidden.mean(dim=1) @ wclf.T
            nats = F.cross_entropy((hidden @ net.wtet.T).flatten(0, 1), tokens.flatten())
        predictions = scores.argmax(dim=-1)
        numbers = {name: result.numbers[f"{split}/{name}"].value for name in ("accuracy", "loss_clf", "loss_gen")}
        assert numbers["accuracy"] == float((predictions == y).double().mean())
        in_five = (scores.topk(5).indices == y[:, None]).any(dim=1).double().mean()
        assert result.numbers[f"{split}/top_5"].value == float(in_five)
        confidence, right = scores.softmax(dim=1).amax(dim=1), (predictions == y).float()
        bins = (confidence * 15).long()
        gaps = [abs(float((confidence - right)[bins == i].sum())) for i in range(15)]
        assert result.numbers[f"{split}/calibration_error"].value == pytest.approx(sum(gaps) / len(y), abs=1e-5)
        assert numbers["loss_clf"] == pytest.approx(float(F.cross_entropy(scores, y)), rel=1e-5)
        assert numbers["loss_gen"] == pytest.approx(float(nats), rel=1e-5)
    expected = np.zeros((10, 10), dtype=np.int64)
    np.add.at(expected, (y.numpy(), predictions.numpy()), 1)
    assert np.array_equal(result.matrices["confusion"], expected)
    assert result.class_names == {"confusion": tuple("0123456789")}
    curve = result.curves["val/accuracy"]
    assert curve.x == [2, 4, 6]
    best = curve.x[curve.y.index(max(curve.y))]
    assert result.numbers["val/accuracy"].value == max(curve.y)
    assert (result.numbers["best_step"].value, weights.metadata.step) == (best, best)
    assert result.numbers["train/images_seen"].value == best * 50
    assert result.numbers["val/accuracy"].n == 60
    head = find_head(weights, n_class=10, classes=classes_hash(lab.digits), class_names=tuple("0123456789"))
    assert head is not None
    assert torch.equal(head.wclf, wclf)
    assert read_head(weights)[0].class_names == tuple("0123456789")
    with pytest.raises(ValueError, match=r"in another order: class 0 is '0' to the head, '9' to the data"):
        load_trained_head(weights, replace(few, class_names=tuple("9876543210")), requested=True)


def test_the_losses_are_those_of_a_plain_loop(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Independent source: gen · L_GEN + clf · L_CLF minimised by a loop of plain PyTorch: all weights, warm-up, decay.

    So the curves of training are its losses before each step, those of validation after it.
    """
    settings = {
        "loss_weights": {"gen": 0.5, "clf": 2.0},
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "learning_rate": 0.01,
    }
    result = lab.finetune(tmp_path, ar, steps=4, val_every=4, test=False, **settings)
    net, wclf = ar.net(), torch.zeros(10, 16, requires_grad=True)
    optimizer = torch.optim.Adam([*net.parameters(), wclf], betas=(0.9, 0.95), weight_decay=0.01)

    def losses(tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = net.trunk(tokens)
        nats = F.cross_entropy((hidden @ net.wtet.T).flatten(0, 1), tokens.flatten())
        return {"loss_gen": nats, "loss_clf": F.cross_entropy(hidden.mean(dim=1) @ wclf.T, labels)}

    data, steps = lab.tokens(plan=BatchPlan(50, 50)), []
    for rate, batch in zip((0.01 / 3, 0.02 / 3, 0.01, 0.01), data.train_dataloader(), strict=False):
        steps.append(losses(data.encode(batch.tokens), batch.labels))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (0.5 * steps[-1]["loss_gen"] + 2.0 * steps[-1]["loss_clf"]).backward()
        optimizer.step()
    labels = torch.from_numpy(lab.digits.split("val").labels)
    validated = losses(lab.tokens().sample_tokens("val").long(), labels)
    for name in ("loss_gen", "loss_clf"):
        assert result.curves[f"train/{name}"].y == pytest.approx([float(each[name]) for each in steps], rel=1e-5)
        assert result.curves[f"val/{name}"].y == pytest.approx([float(validated[name])], rel=1e-5)


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, lab: Lab, ar: Weights, uninterrupted: tuple[Path, Result], step: int
) -> None:
    """Invariant: 3 + 3 steps, or 4 + 2, are six, to the bit; done twice, nothing changes."""
    with pytest.raises(StoppedError, match=f"after step {step + 1}"):
        lab.finetune(tmp_path, ar, callbacks=(Send(signal.SIGTERM, step=step),))
    assert not (tmp_path / "model").exists()
    for _ in range(2):
        result = lab.finetune(tmp_path, ar)
        assert have_equal_weights(tmp_path, uninterrupted[0])
        assert result.curves == uninterrupted[1].curves
        assert learned_numbers(result) == learned_numbers(uninterrupted[1])


def test_accumulated_equals_one_batch(tmp_path: Path, lab: Lab, bert: Weights) -> None:
    """Invariant: passes of 10 images give the losses of one of 50, also where pixels are masked."""
    results = [
        lab.finetune(tmp_path / str(size), bert, objective=MASKED, on=machine(micro_batch=size), steps=4)
        for size in (50, 10)
    ]
    for name, curve in results[0].curves.items():
        assert results[1].curves[name].y == pytest.approx(curve.y, rel=1e-4, abs=OF_VAL if "accuracy" in name else 0)
    assert {"test/accuracy", "test/accuracy_one_mask"} <= set(results[0].numbers)


ALONE: Any = SimpleNamespace(
    strategy=SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda table, reduce_op: table)
)  # what a score asks of a Trainer, with one process


def test_the_vote_by_hand(tmp_path: Path, lab: Lab, palette: Palette) -> None:
    """Independent source: plain PyTorch under each of three masks; losses are the first one's, ties left to the draw.

    Invariant: neither the order of the images nor how many come at once matters.
    """
    net = drawn(tmp_path, palette, MASKED).net()
    tokens = lab.tokens().sample_tokens("test").long()
    rows = torch.arange(len(tokens))
    rng_keys = keyed.per_example_keys(keyed.key(0, "test", 0), rows)
    keeps = [
        MASKED.visible_mask(tokens, keyed.fold_in(rng_keys, 100 + mask) if mask else rng_keys) for mask in range(3)
    ]
    with torch.no_grad():
        hidden = [net.trunk(tokens, visible) for visible in keeps]
        middle = hidden[0].mean(dim=(0, 1))
        w = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
        w = w - torch.outer(w @ middle, middle) / middle.square().sum()  # or one class would be said of all images
        scores = [h.mean(dim=1) @ w.T for h in hidden]
        nats = MASKED.loss(net.logits(hidden[0]), tokens, keeps[0])
    one, y, _ = masked = torch.stack(scores).argmax(dim=-1)  # (3, N), of which the second are taken for labels
    counts = F.one_hot(masked, 10).sum(dim=0)  # (N, K)
    leads = counts == counts.amax(dim=1, keepdim=True)
    head = ClassHead(n_embd=16, n_class=10)
    head.load_state_dict({"wclf": w})
    scored = []
    for order, size in ((rows, 64), (rows.flip(0), 7)):
        score = ClassScore(MASKED, n_class=10, eval_masks=3, seed=0)
        with torch.no_grad():
            for some in (order[start : start + size] for start in range(0, len(order), size)):
                score.add(net, head, Batch(tokens[some], y[some], rng_keys[some], some))
        scored.append(score.numbers("test", ALONE, len(y)))
    numbers, predictions = scored[0]
    assert np.array_equal(predictions, scored[1][1])
    assert {n: number.value for n, number in scored[1][0].items()} == pytest.approx(
        {n: number.value for n, number in numbers.items()}, rel=1e-6
    )
    assert leads[rows, torch.from_numpy(predictions)].all()
    assert numbers["test/accuracy"].value == pytest.approx((predictions == y.numpy()).mean())
    assert numbers["test/accuracy_one_mask"].value == pytest.approx(float((one == y).double().mean()))
    assert numbers["test/accuracy"].value != numbers["test/accuracy_one_mask"].value  # or the vote would not be seen
    assert numbers["test/loss_clf"].value == pytest.approx(float(F.cross_entropy(scores[0], y)), rel=1e-5)
    assert numbers["test/loss_gen"].value == pytest.approx(float(nats), rel=1e-5)


def test_without_the_generative_loss(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Invariant: the token head, which nothing reads, stays to the bit; all else is trained; no such loss is shown."""
    result = lab.finetune(tmp_path, ar, loss_weights={"gen": 0.0, "clf": 1.0}, weight_decay=0.1, test=False)
    before, after = ar.net().state_dict(), read_finetuned(tmp_path)
    assert [name for name, weight in before.items() if torch.equal(weight, after[name])] == ["wtet"]
    assert "train/loss_gen" not in result.curves
    assert result.curves["train/loss_clf"].y[0] == pytest.approx(LN_10, abs=1e-6)
    assert result.numbers["val/loss_gen"].value > 0


def test_one_step_by_hand(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Independent source: PyTorch's plain Adam on gen · L_GEN + clf · L_CLF, written out, with the rate warmed up."""
    lab.finetune(
        tmp_path, ar, steps=2, warmup_steps=1, loss_weights={"gen": 0.5, "clf": 2.0}, learning_rate=0.01, test=False
    )
    net, wclf = ar.net(), torch.nn.Parameter(torch.zeros(10, 16))
    optimizer = torch.optim.Adam([*net.parameters(), wclf], betas=(0.9, 0.95))
    data = lab.tokens(plan=BatchPlan(50, 50))
    for rate, batch in zip((0.005, 0.01), data.train_dataloader(), strict=False):
        tokens = data.encode(batch.tokens)
        hidden = net.trunk(tokens)
        loss = 0.5 * F.cross_entropy((hidden @ net.wtet.T).flatten(0, 1), tokens.flatten())
        loss = loss + 2.0 * F.cross_entropy(hidden.mean(dim=1) @ wclf.T, batch.labels)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    trained = read_finetuned(tmp_path)
    for name, weight in [*net.state_dict().items(), ("wclf", wclf.detach())]:
        assert float((trained[name] - weight).abs().mean()) < 1e-5, name


def test_from_scratch(tmp_path: Path, lab: Lab) -> None:
    """Independent source: ln 17 and ln 10, of two heads of zeros."""
    result = lab.finetune(tmp_path, None, test=False)
    assert result.curves["train/loss_gen"].y[0] == pytest.approx(LN_17, abs=1e-6)
    assert result.curves["train/loss_clf"].y[0] == pytest.approx(LN_10, abs=1e-6)
    assert result.provenance["from"] == "scratch"


def test_test_is_not_read(
    tmp_path: Path, lab: Lab, few: Arrays, ar: Weights, uninterrupted: tuple[Path, Result]
) -> None:
    """Invariant: without `test`, a source that has no such split gives the same model and numbers but for test's."""
    lab.digits = replace(few, splits={name: few.splits[name] for name in ("train", "val")})
    result = lab.finetune(tmp_path, ar, test=False)
    full = learned_numbers(uninterrupted[1])
    assert learned_numbers(result) == {k: v for k, v in full.items() if not k.startswith("test/")}
    assert len(result.numbers) < len(uninterrupted[1].numbers)
    assert result.matrices == {}
    assert have_equal_weights(tmp_path, uninterrupted[0])
    with pytest.raises(KeyError, match="test"):
        lab.finetune(tmp_path / "asked", ar)


def test_what_cannot_be_learnt(tmp_path: Path, lab: Lab, few: Arrays, ar: Weights) -> None:
    """Without images to validate on, without labels, or with a class that only val knows: before a step is taken."""
    train, val = few.splits["train"], few.splits["val"]
    others = train.labels != 3
    cases = [
        (
            few.splits | {"val": ArraySplit(val.pixels[:0], val.labels[:0])},
            10,
            r"no images in its val split: .*data\.val_fraction above 0",
        ),
        (few.splits, None, r"has no labels \(data\.n_class=null\)"),
        (few.splits | {"train": ArraySplit(train.pixels[others], train.labels[others])}, 10, "class 3 is in val, but"),
    ]
    for splits, n_class, message in cases:
        lab.digits = replace(few, splits=splits, n_class=n_class)
        with pytest.raises(ValueError, match=message):
            lab.finetune(tmp_path, ar)
    assert not (tmp_path / "checkpoints").exists()


def test_a_rate_too_high_is_stopped(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """A real blow-up: no model is left."""
    with pytest.raises(NonFiniteLossError, match=r"lower task\.learning_rate"):
        lab.finetune(tmp_path, ar, learning_rate=1e18)
    assert not (tmp_path / "model").exists()


def test_which_classes_a_head_knows(few: Arrays) -> None:
    """Invariant: a head fits the same classes however many images are held out; not more classes, nor others."""
    val, train = few.splits["val"], few.splits["train"]
    small = ArraySplit(val.pixels[:5], val.labels[:5])
    assert classes_hash(replace(few, splits=few.splits | {"val": small})) == classes_hash(few)
    assert classes_hash(replace(few, n_class=11)) != classes_hash(few)
    low = {"train": ArraySplit(train.pixels, train.labels // 2), "val": ArraySplit(val.pixels, val.labels // 2)}
    assert classes_hash(replace(few, splits=few.splits | low)) != classes_hash(few)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, r"task\.steps must be at least 1, got 0"),
        ({"batch_size": 0}, r"task\.batch_size"),
        ({"val_every": 0}, r"task\.val_every"),
        ({"val_every": 9}, r"task\.val_every"),  # nothing would be kept
        ({"patience": 0}, r"task\.patience"),
        ({"log_every": 0}, r"task\.log_every"),
        ({"checkpoint_every": 0}, r"task\.checkpoint_every"),
        ({"checkpoint_keep": 0}, r"task\.checkpoint_keep"),
        ({"eval_masks": 0}, r"task\.eval_masks"),
        ({"loss_weights": {"gen": -0.1, "clf": 1}}, r"task\.loss_weights\.gen must be at least 0, got -0\.1"),
        ({"loss_weights": {"gen": 1, "clf": 0.0}}, r"task\.loss_weights\.clf must be at least 1e-100, got 0"),
        ({"loss_weights": {"gen": math.nan, "clf": 1}}, r"task\.loss_weights\.gen"),
        ({"loss_weights": {"gen": 1, "clf": math.nan}}, r"task\.loss_weights\.clf"),
        ({"loss_weights": {"gen": 1}}, r"task\.loss_weights\.clf is not given"),
        ({"learning_rate": 0.0}, r"task\.learning_rate must be at least 1e-100"),
        ({"warmup_steps": 8}, r"task\.warmup_steps 8 must be below task\.steps 8"),
    ],
)
def test_bad_settings(changed: dict[str, Any], message: str) -> None:
    for good in ({}, {"patience": None}, {"loss_weights": {"gen": 0.0, "clf": 2}}):
        assert task_settings("igpt.task.finetune.run", FINETUNE | good)
    check_bad_settings("finetune", FINETUNE | {"steps": 8}, changed, message)


def test_dropout_does_not_depend_on_the_batch(tmp_path: Path, lab: Lab) -> None:
    """Invariant: passes of 10 images give the losses of one of 50; validation drops nothing; a stop changes nothing.

    By hand: the first loss of a head of zeros is ln 10 with dropout, too; later losses are not those without.
    """
    how: dict[str, Any] = {"dropout": 0.3, "steps": 4, "learning_rate": 0.01}
    one = lab.finetune(tmp_path / "one", None, **how)
    ten = lab.finetune(tmp_path / "ten", None, on=machine(micro_batch=10), **how)
    without = lab.finetune(tmp_path / "without", None, **how | {"dropout": 0.0})
    for name, curve in one.curves.items():
        assert ten.curves[name].y == pytest.approx(curve.y, rel=1e-4, abs=OF_VAL if "accuracy" in name else 0)
    assert one.curves["train/loss_clf"].y[0] == pytest.approx(LN_10, abs=1e-6)
    assert abs(one.curves["train/loss_clf"].y[-1] - without.curves["train/loss_clf"].y[-1]) > 5e-4
    weights = find_weights(str(tmp_path / "one"))
    tokens = lab.tokens().sample_tokens("test").long()
    with torch.no_grad():
        loss = F.cross_entropy(weights.net()(tokens).flatten(0, 1), tokens.flatten())
    assert one.numbers["test/loss_gen"].value == pytest.approx(float(loss), rel=1e-5)
    with pytest.raises(StoppedError):
        lab.finetune(tmp_path / "stopped", None, callbacks=(Send(signal.SIGTERM, step=2),), **how)
    lab.finetune(tmp_path / "stopped", None, **how)
    assert have_equal_weights(tmp_path / "stopped", tmp_path / "one")


def test_a_kill_before_the_best_was_noted(
    tmp_path: Path, lab: Lab, ar: Weights, uninterrupted: tuple[Path, Result]
) -> None:
    """Round trip: the checkpoint of the only validation is there, its note is not; the end is as without the kill."""
    once = lab.finetune(tmp_path, ar, val_every=6)
    (tmp_path / "checkpoints" / "best.json").unlink()
    assert learned_numbers(lab.finetune(tmp_path, ar, val_every=6)) == learned_numbers(once)
    assert (tmp_path / "checkpoints" / "best.json").is_file()
