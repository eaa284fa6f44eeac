"""OpenAI's checkpoints: their own code's outputs again, in any number of shards, and what is refused."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ImageGPTForCausalImageModeling

from igpt.checkpoint import huggingface
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import save_model
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.run.launch import run as run_command
from igpt.task.scaling import collect_lines
from tests.conftest import ROOT, perturbed, small_net
from tests.oracle import released
from tests.oracle.names import from_openai
from tests.test_photographs import run
from tests.tokens.test_palette import random_palette

pytest.importorskip("tensorflow", reason="TensorFlow, which reads OpenAI's checkpoints, is not installed")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A palette's file, as many colours as are asked for."""
    folder = tmp_path_factory.mktemp("colours")

    def path(k: int) -> Path:
        random_palette(k).save(folder / f"{k}.npy")
        return folder / f"{k}.npy"

    return path


@pytest.fixture
def checkpoint(tmp_path: Path, colours: Callable[[int], Path]) -> Path:
    """The prefix of a small network in the released layout, 32 shards, its palette beside it."""
    net = small_net(n_layer=4)
    prefix = released.save(tmp_path / "igpt" / "model.ckpt-131000", released.variables(net.state_dict(), 3), 32)
    random_palette(11).save(prefix.parent / "kmeans_centers.npy")
    return prefix


def oracle(shared: Path, kind: str) -> tuple[Path, dict[str, np.ndarray]]:
    folder = shared / "oracles" / f"openai-{kind}"
    return folder, dict(np.load(folder / "reference.npz"))


@pytest.mark.parametrize("kind", ["ar", pytest.param("bert", marks=pytest.mark.ci)])
def test_the_outputs_of_openais_code(
    shared: Path, kind: str, colours: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent source: logits, block outputs and losses of OpenAI's model.py to 1e-5, by the commands alone."""
    folder, reference = oracle(shared, kind)
    n, k = len(reference["tokens"]), reference["gen_logits"].shape[-1]
    place = tmp_path / "work"
    place.mkdir()
    np.save(place / "tokens.npy", reference["tokens"])
    more = []
    if kind == "bert":
        np.save(place / "visible.npy", reference["visible"])
        more = ["--visible", str(place / "visible.npy")]
    _, model = run(tmp_path, "task=import", f"init={folder}", f"task.palette={colours(k)}")
    out = tmp_path / "trace.npz"
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import trace_network

    trace_network.main([str(model), str(place / "tokens.npy"), "--out", str(out), *more])
    trace = np.load(out)
    assert np.abs(trace["logits"] - reference["gen_logits"]).max() < 1e-5
    assert np.abs(trace["block_outputs"] - reference["block_outputs"]).max() < 1e-5
    assert abs(trace["image_nats"].mean(dtype=np.float64) - reference["gen_loss"]) < 1e-5
    labels = torch.from_numpy(reference["labels"])
    scores = torch.from_numpy(trace["class_scores"])
    assert abs(torch.nn.functional.cross_entropy(scores, labels).item() - reference["clf_loss"]) < 1e-5
    right = (scores.argmax(-1) == labels).double().mean().item()
    assert right * 100 == pytest.approx(float(reference["accuracy"]))
    n_class = len(np.load(folder / "weights.npz")["model/clf/wclf"])
    for split in ("tr", "va"):
        np.save(place / f"toy_{split}X.npy", reference["tokens"])
        np.save(place / f"toy_{split}Y.npy", np.eye(n_class, dtype=np.float32)[reference["labels"]])
    side = round(reference["tokens"].shape[1] ** 0.5)
    data = ("data=openai_npy", "data.name=toy", f"data.path={place}", f"data.clusters={colours(k)}")
    result, _ = run(
        tmp_path, "task=evaluate", f"init={model}", *data, f"data.resolution={side}", "task.baseline_images=0"
    )
    assert result.numbers["val/accuracy"].n == n
    if kind == "ar":  # masks of our own drawing are not those of the oracle
        assert abs(result.numbers["val/loss_gen"].value - reference["gen_loss"]) < 1e-5
        assert abs(result.numbers["val/loss_clf"].value - reference["clf_loss"]) < 1e-5
        assert result.numbers["val/accuracy"].value * 100 == pytest.approx(float(reference["accuracy"]))


def test_there_and_back_is_bit_exact(shared: Path, colours: Callable[[int], Path], tmp_path: Path) -> None:
    """Round trip: OpenAI's AR → ours → Hugging Face's → ours, and its BERT → ours → ours, against `weights.npz`."""
    for kind in ("ar", "bert"):
        folder, reference = oracle(shared, kind)
        first = find_weights(str(folder), palette=str(colours(reference["gen_logits"].shape[-1])))
        expected = from_openai(dict(np.load(folder / "weights.npz")))
        save_model(tmp_path / kind, first.state(), first.metadata)
        own = find_weights(str(tmp_path / kind))
        if kind == "ar":
            huggingface.write(tmp_path / "hf", own)
        else:
            save_model(tmp_path / "hf", own.state(), own.metadata)
        save_model(tmp_path / f"{kind} again", find_weights(str(tmp_path / "hf")).state(), own.metadata)
        last = find_weights(str(tmp_path / f"{kind} again"))
        assert last.metadata == first.metadata
        assert last.net().state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in last.net().state_dict().items())
        assert last.sha256 == own.sha256
        (tmp_path / "hf").rename(tmp_path / f"hf {kind}")


def test_hugging_faces_model_with_openais_weights(shared: Path, colours: Callable[[int], Path], tmp_path: Path) -> None:
    """Independent source: OpenAI's logits out of Hugging Face's code, and the same greedy samples as ours."""
    folder, reference = oracle(shared, "ar")
    k, n_ctx = reference["gen_logits"].shape[-1], reference["tokens"].shape[1]
    _, model = run(tmp_path, "task=import", f"init={folder}", f"task.palette={colours(k)}")
    _, export = run(tmp_path, "task=export", f"init={model}", "task.class_head=false")
    weights = find_weights(str(model))
    other = ImageGPTForCausalImageModeling.from_pretrained(export / "huggingface").eval()
    tokens = torch.from_numpy(reference["tokens"]).long()
    start = torch.full((len(tokens), 1), k)
    with torch.no_grad():
        logits = other(input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits
    assert np.abs(logits.numpy() - reference["gen_logits"]).max() < 1e-5
    drawn = other.generate(start[:1], max_new_tokens=n_ctx, do_sample=False, pad_token_id=0)
    assert torch.equal(drawn[:, 1:], generate(weights.net(), torch.zeros(1, n_ctx), Sampling(1.0, 1, None)))


def test_every_name_that_is_meant(checkpoint: Path) -> None:
    """The prefix, any one of its 33 files, or their folder: all give the weights that were saved."""
    expected = small_net(n_layer=4).state_dict()
    (checkpoint.parent / "checkpoint").write_text(f'model_checkpoint_path: "{checkpoint.name}"\n')
    folder = checkpoint.parent
    names = ["model.ckpt-131000.index", "model.ckpt-131000.data-00007-of-00032", "checkpoint"]
    for place in (checkpoint, folder, *(folder / name for name in names)):
        weights = find_weights(str(place))
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.net().state_dict().items())
    assert len(list(folder.glob("*.data-*"))) == 32
    assert (weights.metadata.step, weights.metadata.objective, weights.metadata.data) == (
        131000,
        {"name": "ar"},
        "imagenet4",
    )
    assert weights.wclf is None  # zeros: it was never trained


def test_what_training_left_is_skipped(tmp_path: Path, colours: Callable[[int], Path], caplog: Any) -> None:
    """The step and Adam's slots are named, not read."""
    values = released.variables(small_net().state_dict(), 3)
    more = {f"{name}/Adam": value for name, value in values.items()} | {"global_step": np.int64(7), "beta1_power": 0.5}
    prefix = released.save(tmp_path / "model.ckpt-7", values | more)
    with caplog.at_level("INFO"):
        net = find_weights(str(prefix), palette=str(colours(11))).net()
    assert f"skipped {len(values) + 2} variables that the network does not have" in caplog.text
    assert all(torch.equal(weight, small_net().state_dict()[name]) for name, weight in net.state_dict().items())


def test_heads_that_are_not_told(tmp_path: Path, colours: Callable[[int], Path]) -> None:
    """Attention matrices with their heads put together: the count is asked for, and taken."""
    values = released.variables(small_net().state_dict(), 3)
    flat = {name: value.reshape(24, 24) if "/attn/" in name else value for name, value in values.items()}
    prefix = released.save(tmp_path / "model.ckpt-1", flat)
    with pytest.raises(ValueError, match=r"import it with task=import task\.n_head"):
        find_weights(str(prefix), palette=str(colours(11)))
    net = find_weights(str(prefix), palette=str(colours(11)), n_head=3).net()
    assert all(torch.equal(weight, small_net().state_dict()[name]) for name, weight in net.state_dict().items())


def gone(name: str) -> Callable[[Path], object]:
    return lambda prefix: [path.unlink() for path in prefix.parent.glob(name)]


def halved(name: str) -> Callable[[Path], object]:
    def cut(prefix: Path) -> None:
        path = prefix.parent / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def with_variables(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def rewrite(prefix: Path) -> None:
        gone("model.ckpt*")(prefix)
        values = released.variables(small_net().state_dict(), 3)
        change(values)
        released.save(prefix, values)

    return rewrite


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (gone("*.data-00005-of-00032"), r"data-00005-of-00032 missing, of 32 shards"),
        (gone("*.data-0000[0-5]-*"), r"and 3 more missing, of 32 shards"),
        (gone("*.data-*"), "has no shards beside it"),
        (gone("*.index"), r"\.index is missing, its 32 shards"),
        (halved("model.ckpt-131000.index"), "is damaged or not downloaded to its end"),
        (lambda p: (p.parent / f"{p.name}.data-00000-of-00002").touch(), "two downloads are mixed up"),
        (lambda p: (p.parent / "other.index").touch(), "several checkpoints, give one of"),
        (gone("kmeans_centers.npy"), r"task\.palette=PATH/kmeans_centers\.npy"),
        (lambda p: random_palette(12).save(p.parent / "kmeans_centers.npy"), "has 12 colours, and the network 11"),
        (with_variables(lambda v: v.pop("model/h1/mlp/c_fc/w")), "has no model/h1/mlp/c_fc/w"),
        (with_variables(lambda v: v.pop("model/wtet")), "has no model/wtet"),
        (
            with_variables(lambda v: v.update({"model/clf/wclf": np.ones((24, 10), "f4")})),
            r"clf/wclf: \(24, 10\) in the f",
        ),
        (with_variables(lambda v: v.update({"model/clf/wclf": np.float32(1)})), r"clf/wclf: \(\) in the file"),
        (with_variables(lambda v: v.update({"model/wte": np.ones(24, "f4")})), "expected two dimensions"),
        (with_variables(lambda v: v.update({"model/wpe": np.float32(1)})), "expected two dimensions"),
        (with_variables(lambda v: v.update({"model/ln_f/g": np.ones(23, "f4")})), r"ln_f/g: \(23,\) in the file, exp"),
        (with_variables(lambda v: [v.pop(name) for name in list(v) if "/h" in name]), "a checkpoint of something else"),
        (with_variables(lambda v: v.update({"model/wpe": np.ones((15, 24), "f4")})), "15 positions are no square"),
        (with_variables(lambda v: v.update({"model/wpe": np.ones((16, 24), "i4")})), "no.* floating-point numbers"),
        (
            with_variables(lambda v: v.update({"model/h99999999/ln_1/g": np.ones(24, "f4")})),
            "names the block h99999999 and has 31 variables",
        ),
        (lambda p: [os.truncate(path, 100) for path in p.parent.glob("*.data-*")], r"its shards have 3,200 bytes, its"),
        (lambda p: os.truncate(f"{p}.index", 1 << 40), r"\.index has more than 16,777,216 bytes"),
    ],
)
def test_what_is_refused(checkpoint: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(checkpoint)
    with pytest.raises(ValueError, match=message):
        find_weights(str(checkpoint.parent))


def test_a_shard_cut_short_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """It is met in the middle of the import, which is whole or not there."""
    shards = sorted(checkpoint.parent.glob("*.data-*"), key=lambda path: path.stat().st_size)
    halved(shards[-1].name)(checkpoint)
    weights = find_weights(str(checkpoint))
    with pytest.raises(ValueError, match="is damaged or not downloaded to its end"):
        save_model(tmp_path / "model", weights.state(), weights.metadata)
    assert list((tmp_path / "model").iterdir()) == []


def test_not_a_number(checkpoint: Path, tmp_path: Path) -> None:
    with_variables(lambda v: v["model/wpe"].__setitem__((0, 0), np.nan))(checkpoint)
    weights = find_weights(str(checkpoint))
    with pytest.raises(ValueError, match="wpe holds NaN"):
        save_model(tmp_path / "model", weights.state(), weights.metadata)


def test_without_tensorflow(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ValueError, match="pip install tensorflow-cpu"):
        find_weights(str(checkpoint))


def test_a_head_that_is_not_a_number(checkpoint: Path, tmp_path: Path) -> None:
    with_variables(lambda v: v.update({"model/clf/wclf": np.full((5, 24), np.nan, "f4")}))(checkpoint)
    with pytest.raises(ValueError, match="class head holds NaN"):
        run(tmp_path, "task=import", f"init={checkpoint}")


def test_another_palette_is_another_import(checkpoint: Path, tmp_path: Path) -> None:
    """Invariant: with a wrong palette replaced, the import is not taken as done."""
    _, first = run(tmp_path, "task=import", f"init={checkpoint}")
    random_palette(11, seed=1).save(checkpoint.parent / "kmeans_centers.npy")
    _, second = run(tmp_path, "task=import", f"init={checkpoint}")
    assert first != second
    assert find_weights(str(second)).tokenizer.hash == random_palette(11, seed=1).hash


def test_paths_as_people_write_them(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative ones, the palette in a folder beside; a folder of folders, which says which; what no reader takes."""
    folder = checkpoint.parent
    (folder / "color-clusters").mkdir()
    (folder / "kmeans_centers.npy").rename(folder / "color-clusters" / "kmeans_centers.npy")
    (folder / "131000").mkdir()
    for path in folder.glob("model.ckpt-131000.*"):
        path.rename(folder / "131000" / path.name)
    monkeypatch.chdir(folder / "131000")
    assert find_weights("model.ckpt-131000").metadata.step == 131000
    monkeypatch.chdir(folder)
    assert find_weights("131000").metadata.step == 131000
    with pytest.raises(ValueError, match=r"of OpenAI's, choose one: .*131000"):
        find_weights(str(folder))
    (folder / "131000").rename(folder / "13[1]")
    with pytest.raises(ValueError, match=r"TensorFlow takes \[ in a name for a pattern"):
        find_weights("13[1]")
    with pytest.raises(ValueError, match="init=~nobody"):
        find_weights("~nobody-of-that-name/x")


@pytest.mark.parametrize("kind", ["ar", "bert"])
def test_imported_weights_do_what_others_do(
    shared: Path, kind: str, colours: Callable[[int], Path], tmp_path: Path
) -> None:
    """Invariant: every task takes them; 8×8 images in 16 colours, as the oracles are."""
    folder, reference = oracle(shared, kind)
    k = reference["gen_logits"].shape[-1]
    _, model = run(tmp_path, "task=import", f"init={folder}", f"task.palette={colours(k)}")
    init = f"init={model}"
    few = ("data.labels_per_class=4", "task.baselines=[]", "task.eval_masks=1", "task.test=false")
    probed, _ = run(tmp_path, "task=probe", init, *few, "task.C_grid=[1.0]")
    assert all(0 <= number.value <= 1 for name, number in probed.numbers.items() if name.endswith("accuracy"))
    assert "probe/layer" in probed.numbers
    groups = ("model=checkpoint", "tokens=checkpoint", "objective=checkpoint", "logger=none", "callbacks=none")
    short = ("task.steps=2", "task.val_every=2", "task.checkpoint_every=2", "task.batch_size=8", "task.eval_masks=1")
    tuned, _ = run(tmp_path, "task=finetune", init, *groups, *short, "task.test=false")
    assert tuned.numbers["val/loss_clf"].value > 0
    if kind == "ar":
        run(tmp_path, "task=sample", init, "task.count=2")
        run(tmp_path, "task=complete", init, "task.count=2", "task.completions=1")
    else:
        with pytest.raises(ValueError, match="bidirectional"):
            run(tmp_path, "task=sample", init, "task.count=2")


def test_a_wrong_number_of_heads(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"has 3 heads, task\.n_head=4 says otherwise"):
        find_weights(str(checkpoint), n_head=4)


def test_openais_evaluation_as_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The path of the released weights, with random ones: 32 shards, import, then the loss of each split.

    Independent source: the loss that Hugging Face's model gives the same tokens.
    """
    k, n_ctx = 512, 1024
    net = GPT(GPTConfig(n_layer=4, n_embd=16, n_head=2, n_ctx=n_ctx, n_vocab=k, causal=True))
    net.init_weights(0)
    torch.nn.init.normal_(net.wtet, std=0.3, generator=torch.Generator().manual_seed(3))
    wclf = np.ones((10, 16), np.float32)  # a trained head, which asks for no training images all the same
    released.save(tmp_path / "igpt-s" / "model.ckpt-131000", released.variables(net.state_dict(), 2, wclf), 32)
    palette = tmp_path / "elsewhere" / "colours.npy"
    random_palette(k).save(palette)
    draw = np.random.default_rng(0)
    tokens = {split: draw.integers(0, k, (3, n_ctx)) for split in ("va", "te")}
    for split, ids in tokens.items():
        np.save(tmp_path / f"imagenet_{split}X.npy", ids)
        np.save(tmp_path / f"imagenet_{split}Y.npy", np.eye(1000, dtype=np.float32)[draw.integers(0, 1000, 3)])
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    _, folder = run_command(
        "experiment=openai_eval", f"init={tmp_path / 'igpt-s'}", f"data.path={tmp_path}", f"data.clusters={palette}",
        "trainer=cpu", conf=ROOT / "conf",
    )  # fmt: skip
    assert folder is not None
    assert "2.0895" in caplog.text  # what others report for the same
    numbers = json.loads((folder / "result.json").read_text())["numbers"]
    huggingface.write(tmp_path / "hf", find_weights(str(folder / "1_import")))
    reference = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "hf").eval()
    for stage, split, ids in (("evaluate", "val", tokens["va"]), ("test", "test", tokens["te"])):
        given = torch.from_numpy(ids)
        with torch.no_grad():
            logits = reference(input_ids=torch.cat([torch.full((3, 1), k), given[:, :-1]], 1)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given.flatten()).item()
        assert numbers[f"{stage}/{split}/loss_gen"]["value"] == pytest.approx(loss, abs=1e-5)


def test_a_release_is_a_line_for_each_size(tmp_path: Path) -> None:
    """Round trip: two sizes of two steps, in folders as released: points by step, each the loss of task=evaluate.

    Given step by step or by the size's folder, they are the same lines; a warning says what nobody knows of them.
    """
    for n_layer in (1, 2):
        for step in (131000, 262000):
            net = perturbed(GPT(small_net(n_layer=n_layer, n_ctx=64, n_vocab=17).config), seed=step)
            place = tmp_path / "release" / f"igpt-{n_layer}" / str(step)
            released.save(place / f"model.ckpt-{step}", released.variables(net.state_dict(), 3))
    random_palette(17).save(tmp_path / "release" / "kmeans_centers.npy")
    sizes = [tmp_path / "release" / f"igpt-{n_layer}" for n_layer in (1, 2)]
    digits = ("data=digits", "data.labels_per_class=4", "trainer=cpu", "logger=none")
    result, _ = run(tmp_path, "task=scaling", f"task.runs=[{sizes[0]},{sizes[1]}]", *digits, "task.C_grid=[1.0]")
    named = {
        line.name: line for line in collect_lines([str(size / step) for size in sizes for step in ("262000", "131000")])
    }
    for n_layer, size in zip((1, 2), sizes, strict=True):
        name = f"igpt_{n_layer}x24"
        steps = named[name].weights
        assert [weights.metadata.step for weights in steps] == [131000, 262000]
        assert [weights.sha256 for weights in steps] == result.provenance["weights"][name]
        assert result.curves[f"{name}: loss"].x == [131000 * 128, 262000 * 128]
        loss, _ = run(tmp_path, "task=evaluate", f"init={size / '262000'}", *digits)
        assert result.numbers[f"{name}/{262000 * 128}_images/loss_gen"] == loss.numbers["val/loss_gen"]
    (warning,) = result.warnings
    assert "igpt-1 (imagenet8) does not say which images it held out" in warning
    assert result.numbers["all/rank_correlation"].n == 4
