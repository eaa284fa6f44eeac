"""Our own format: exact, complete, and nothing in it is run."""

import json
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import CheckpointMetadata, save_model
from igpt.checkpoint.resume import (
    AtomicCheckpointIO,
    checkpoint_path,
    checksum_path,
    latest_checkpoint,
    mark_best,
    mark_latest,
    parse_step,
    read_best,
)
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer_registry import tokenizer_to_dict
from igpt.utils import files
from tests.conftest import Planted, small_net
from tests.oracle import gpt as plain


def make_metadata(net: GPT) -> CheckpointMetadata:
    centres = np.random.default_rng(0).uniform(-1, 1, (net.n_vocab, 3)).astype(np.float32)
    return CheckpointMetadata(
        network=net.config,
        tokenizer=PaletteTokenizer(Palette(centres), PixelOrder.from_name(round(net.n_ctx**0.5), "raster")),
        objective={"name": "ar"},
        model="small",
        data="toy4",
        step=12,
        seed=3,
    )


@pytest.fixture
def saved(tmp_path: Path, net: GPT) -> Path:
    save_model(tmp_path / "model", net.state_dict(), make_metadata(net))
    return tmp_path


def test_round_trip_is_bit_exact(saved: Path, net: GPT) -> None:
    """Round trip: weights, colours and all else; from the run folder, its model/ and either file."""
    for place in (saved, saved / "model", saved / "model" / "config.json", saved / "model" / "model.safetensors"):
        weights = find_weights(str(place))
        again = weights.net()
        assert all(torch.equal(w, net.state_dict()[name]) for name, w in again.state_dict().items())
        assert weights.metadata == make_metadata(net)
        assert weights.metadata == make_metadata(net)
        assert weights.sha256 == files.sha256(saved / "model" / "model.safetensors")


def test_a_checkpoint_of_an_earlier_release(tmp_path: Path) -> None:
    """Independent source: the logits of two images that were computed when format 1 was new, and a rewrite in numpy.

    Who changes the network or the format finds out here that weights which people have no longer mean the same.
    """
    weights = find_weights(str(Path(__file__).parent / "format_1"))
    tokens = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 1]])
    then = [[0.312840, -0.120220, 0.149330, -0.517536, 2.264876], [1.250521, -0.138385, -0.541394, -1.348086, 1.897740]]
    net = weights.net()
    with torch.no_grad():
        logits = net(tokens)
    assert (logits[:, -1] - torch.tensor(then)).abs().max() < 1e-5
    plain_weights = {name: weight.double().numpy() for name, weight in net.state_dict().items()}
    for image, own in zip(tokens, logits, strict=True):
        reference = plain.logits(plain_weights, image.numpy(), None, n_head=2, causal=True)
        assert np.abs(own.numpy() - reference).max() < 1e-5
    assert (weights.metadata.model, weights.metadata.step, weights.tokenizer.n_vocab) == ("tiny", 7, 5)


def test_a_network_of_another_size(saved: Path) -> None:
    with pytest.raises(ValueError, match="n_layer 3 ≠ 2"):
        find_weights(str(saved)).load_into(small_net(n_layer=2))


def edit(saved: Path, **changed: object) -> None:
    path = saved / "model" / "config.json"
    config = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


SIZES = {"n_layer": 3, "n_embd": 24, "n_head": 3, "n_ctx": 16, "n_vocab": 11, "causal": True}
BLACK_AND_WHITE = Palette(np.array([[-1] * 3, [1] * 3], dtype=np.float32))
TWO = tokenizer_to_dict(PaletteTokenizer(BLACK_AND_WHITE, PixelOrder.from_name(2, "raster")))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 3}, "format 3, this version reads 1 and 2"),
        ({"tokenizer": None}, "not complete .tokenizer is missing"),
        ({"palette": []}, "not complete .palette is no field of it"),
        ({"tokenizer": {"kind": "sounds"}}, "its tokenizer is of the kind 'sounds', known are palette, patches"),
        ({"tokenizer": {"kind": "palette", "centres": [[0, 0, 0]] * 2}}, "not described whole"),
        ({"tokenizer": {**TWO, "hash": "0" * 12}}, "the palette's hash is .*, not the '000000000000'"),
        ({"tokenizer": TWO}, "its network reads 16 tokens of 11, its tokenizer .2 colours. makes 4 of 2"),
        ({"network": {**SIZES, "rings": 2}}, "the setting 'rings', which this version does not know"),
        ({"network": {**SIZES, "positions": "rings"}}, "model.positions must be one of learned"),
        ({"network": {**SIZES, "n_head": True}}, "n_head must be a whole number"),
        ({"network": {**SIZES, "n_ctx": 1 << 40}}, "n_ctx must be a whole number"),
        ({"network": {"n_layer": 3}}, "its network is not described whole"),
        ({"weights_sha256": "0" * 64}, "damaged or half replaced"),
    ],
)
def test_a_bad_config(saved: Path, changed: dict[str, object], message: str) -> None:
    edit(saved, **changed)
    with pytest.raises(ValueError, match=message):
        find_weights(str(saved))


def test_a_truncated_file(saved: Path) -> None:
    path = saved / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        find_weights(str(saved))
    edit(saved, weights_sha256=files.sha256(path))  # even when the hash is right
    with pytest.raises(ValueError, match="is damaged"):
        find_weights(str(saved)).net()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan"])
def test_weights_that_do_not_fit(saved: Path, fault: str) -> None:
    path = saved / "model" / "model.safetensors"
    state = load_file(path)
    if fault == "missing":
        del state["h.1.ln_2.g"]
    elif fault == "unexpected":
        state["h.9.ln_2.g"] = torch.ones(24)
    elif fault == "shape":
        state["wpe"] = state["wpe"][:-1].clone()
    else:
        state["wpe"][0, 0] = torch.nan
    save_file(state, path)
    edit(saved, weights_sha256=files.sha256(path))
    named = {"missing": "h.1.ln_2.g", "unexpected": "h.9.ln_2.g", "shape": r"wpe: \(15, 24\)", "nan": "NaN .* in wpe"}
    with pytest.raises(ValueError, match=named[fault]):
        find_weights(str(saved)).net()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a finished run folder"):
        find_weights(str(tmp_path / "no"))


def test_code_in_a_checkpoint_is_not_run(saved: Path, tmp_path: Path) -> None:
    """A pickle in the place of the weights, and in a checkpoint to resume from."""
    mark = tmp_path / "ran"
    (saved / "model" / "model.safetensors").write_bytes(pickle.dumps(Planted(mark)))
    edit(saved, weights_sha256=files.sha256(saved / "model" / "model.safetensors"))
    with pytest.raises(ValueError, match="damaged"):
        find_weights(str(saved)).net()
    torch.save({"state_dict": Planted(mark)}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt")
    assert not mark.exists()


@contextmanager
def small_disk() -> Iterator[None]:
    """No file of this process may grow past 20 kB: a write fails half way, as on a full disk."""
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old_limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)


def test_a_full_disk_leaves_the_old_model_and_checkpoint(tmp_path: Path, net: GPT) -> None:
    """Invariant: what was good is still read; no temporary file stays."""
    small = GPT(GPTConfig(n_layer=1, n_embd=8, n_head=2, n_ctx=16, n_vocab=11, causal=True))
    small.init_weights(0)
    save_model(tmp_path / "model", small.state_dict(), make_metadata(small))
    path = checkpoint_path(tmp_path, 5)
    AtomicCheckpointIO().save_checkpoint({"step": 5}, path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(OSError, match="is the disk full"), small_disk():
        save_model(tmp_path / "model", net.state_dict(), make_metadata(net))
    with pytest.raises(OSError, match="is the disk full"), small_disk():
        AtomicCheckpointIO().write({"state_dict": net.state_dict()}, path)
    assert find_weights(str(tmp_path)).metadata == make_metadata(small)
    assert find_weights(str(tmp_path)).net().config == small.config
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 5}
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    """By hand: three saved, two kept, the last one named; the best stays, however old."""
    for step in (5, 10, 15):
        path = checkpoint_path(tmp_path, step)
        AtomicCheckpointIO().save_checkpoint({"step": step}, path)
        mark_latest(path, keep=2)
    kept = [f"step_00000{step}.{kind}" for step in (10, 15) for kind in ("ckpt", "sha256")]
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", *kept]
    assert latest_checkpoint(tmp_path) == path
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 15}
    mark_best(checkpoint_path(tmp_path, 10), name="val/loss_gen", value=1.5)
    for step in (20, 25):
        AtomicCheckpointIO().save_checkpoint({"step": step}, checkpoint_path(tmp_path, step))
        mark_latest(checkpoint_path(tmp_path, step), keep=1)
    assert sorted(p.stem for p in path.parent.glob("*.ckpt")) == ["step_0000010", "step_0000025"]
    assert read_best(tmp_path) == {"checkpoint": "step_0000010.ckpt", "step": 10, "name": "val/loss_gen", "value": 1.5}
    assert latest_checkpoint(tmp_path / "elsewhere") is None


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One byte turned over, cut short, without its checksum, or gone: the one before is taken, and that is said."""
    paths = [checkpoint_path(tmp_path, step) for step in (1, 2, 3, 4, 5)]
    for path in paths:
        AtomicCheckpointIO().save_checkpoint({"step": parse_step(path)}, path)
        mark_latest(path, keep=9)
    paths[4].unlink()
    body = paths[3].read_bytes()
    paths[3].write_bytes(body[:200] + bytes([body[200] ^ 1]) + body[201:])
    paths[2].write_bytes(paths[2].read_bytes()[:-50])
    checksum_path(paths[1]).unlink()
    assert latest_checkpoint(tmp_path) == paths[0]
    for path in paths[1:]:
        assert path.name in caplog.text
    paths[0].write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint that is whole \(4 are damaged\): .*rerun=true"):
        latest_checkpoint(tmp_path)
