"""Import and export as tasks: what they leave, and what they refuse before they begin."""

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from igpt.checkpoint import tensors
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.head_files import find_head
from igpt.checkpoint.igpt_format import save_model
from igpt.checkpoint.tensors import LazyTensor, write
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.utils import files
from tests.checkpoint.test_igpt_format import make_metadata
from tests.checkpoint.test_sharded import save_sharded
from tests.conftest import small_net
from tests.test_photographs import run


def test_a_step_of_a_run_becomes_a_model(quickstart: Path, tmp_path: Path) -> None:
    """Round trip: the last step's checkpoint holds what the finished run exported."""
    pretrained = quickstart / "2_pretrain"
    result, folder = run(tmp_path, "task=import", f"init={pretrained / 'checkpoints' / 'step_0000006.ckpt'}")
    own, reference = (
        load_file(folder / "model" / "model.safetensors"),
        load_file(pretrained / "model/model.safetensors"),
    )
    assert all(torch.equal(own[name], reference[name]) for name in reference)
    assert result.numbers["weights"].value == sum(weight.numel() for weight in reference.values())
    assert find_weights(str(folder)).metadata == find_weights(str(pretrained)).metadata


def test_a_sharded_checkpoint_is_consolidated(tmp_path: Path) -> None:
    """Round trip, through the command; any part of it may be named."""
    net = small_net()
    save_sharded(tmp_path / "sharded", net)
    # the palette of its metadata has a made-up hash: tokens are not looked at here
    _, folder = run(tmp_path, "task=import", f"init={tmp_path / 'sharded' / '__0_0.distcp'}")
    again = find_weights(str(folder)).net().state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in net.state_dict().items())


def test_our_own_format_is_plain(quickstart: Path, tmp_path: Path) -> None:
    """Round trip without this project's configs: safetensors and json alone, as `docs/weights.md` has it."""
    _, folder = run(tmp_path, "task=export", "task.format=igpt", f"init={quickstart / '2_pretrain'}")
    names = sorted(path.name for path in (folder / "igpt").iterdir())
    assert names == ["README.md", "completions.png", "config.json", "model.safetensors", "palette.png", "samples.png"]
    net = GPT(GPTConfig(**json.loads((folder / "igpt" / "config.json").read_text())["network"]))
    net.load_state_dict(load_file(folder / "igpt" / "model.safetensors"))
    assert find_weights(str(folder / "igpt")).sha256 == find_weights(str(quickstart / "2_pretrain")).sha256


def test_what_hugging_face_cannot_hold_is_refused_first(quickstart: Path, tmp_path: Path) -> None:
    """A fine-tuned network has a class head: left out when that is said, taken along by our own format."""
    tuned = quickstart / "7_finetune"
    with pytest.raises(ValueError, match=r"has a class head.*task\.class_head=false"):
        run(tmp_path, "task=export", f"init={tuned}")
    _, folder = run(tmp_path, "task=export", "task.format=igpt", f"init={tuned}")
    about = files.read_json(tuned / "model" / "head.json")
    head = find_head(
        find_weights(str(folder / "igpt")), n_class=10, classes=about["classes"], class_names=about["class_names"]
    )
    assert head is not None
    assert torch.equal(head.wclf, load_file(tuned / "model" / "head.safetensors")["wclf"])


def test_an_export_that_was_stopped(quickstart: Path, tmp_path: Path) -> None:
    """A kill before the end leaves a folder under another name, which the next one removes; a whole one is kept."""
    init = f"init={quickstart / '2_pretrain'}"
    _, folder = run(tmp_path, "task=export", init)
    before = {path.name: path.read_bytes() for path in (folder / "huggingface").iterdir()}
    (folder / "result.json").unlink()
    (folder / ".huggingface.abc.part").mkdir()
    (folder / ".huggingface.abc.part" / "model.safetensors").touch()
    run(tmp_path, "task=export", init)
    assert {path.name: path.read_bytes() for path in (folder / "huggingface").iterdir()} == before
    assert not list(folder.glob(".huggingface*"))


class Hub:
    """Stands for `HfApi`: keeps what is uploaded; `broken` methods raise."""

    def __init__(self, *broken: str) -> None:
        self.broken, self.made, self.uploaded = set(broken), {}, {}

    def _check(self, name: str) -> None:
        if name in self.broken:
            raise OSError("403 Forbidden: you may not\nRequest ID: 1")

    def whoami(self) -> None:
        self._check("whoami")

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> str:
        self._check("create_repo")
        assert exist_ok
        self.made[name] = private
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._check("upload_folder")
        self.uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    return monkeypatch


def test_an_export_is_uploaded(quickstart: Path, tmp_path: Path, online: pytest.MonkeyPatch) -> None:
    """Invariant: a failed upload leaves the folder, and the same command tries again; what is sent is the folder."""
    push = ("task=export", f"init={quickstart / '2_pretrain'}", "task.push=me/digits", "task.private=true")
    hub = Hub("upload_folder")
    online.setattr("huggingface_hub.HfApi", lambda: hub)
    with pytest.raises(ValueError, match=r"^task\.push=me/digits: the upload failed \(OSError: 403 .* tries again$"):
        run(tmp_path, *push)
    (kept,) = (tmp_path / "runs").glob("*/huggingface/README.md")
    hub.broken.clear()
    result, folder = run(tmp_path, *push)
    assert kept.parent.parent.resolve() == folder.resolve()
    assert hub.made == {"me/digits": True}
    assert hub.uploaded == {"me/digits": sorted(path.name for path in (folder / "huggingface").iterdir())}
    assert result.provenance["pushed_to"] == "https://hub/me/digits"
    assert "me/digits" in kept.read_text()


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("me/digits", "token", r"^task\.push=me/digits needs a token of the Hub that may write: HF_TOKEN"),
        ("me/digits", "offline", r"^task\.push=me/digits: HF_HUB_OFFLINE is set"),
        ("me/digits", "whoami", r"^task\.push=me/digits: the Hub refuses .*: OSError: 403 Forbidden: you may not$"),
        ("digits", "", r"^task\.push must be owner/name of a model on the Hub"),
        ("me/two words", "", r"^task\.push must be owner/name .* got 'me/two words'$"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_first(
    quickstart: Path, tmp_path: Path, online: pytest.MonkeyPatch, name: str, how: str, message: str
) -> None:
    """Before anything is exported: no run folder is left."""
    online.setattr("huggingface_hub.HfApi", lambda: Hub(how))
    online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", how == "offline")
    if how == "token":
        online.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "task=export", f"init={quickstart / '2_pretrain'}", f"task.push='{name}'")
    assert not list((tmp_path / "runs").glob("*"))


def no_config(place: Path) -> Path:
    (place / "model").mkdir(parents=True)
    (place / "model" / "model.safetensors").touch()
    return place / "model" / "model.safetensors"


def some_file(place: Path) -> Path:
    place.mkdir()
    (place / "notes.txt").write_text("weights")
    return place / "notes.txt"


def unfinished(place: Path) -> Path:
    (place / "checkpoints").mkdir(parents=True)
    (place / "checkpoints" / "latest").write_text("step_0000003.ckpt\n")
    return place


def finished(place: Path) -> Path:
    unfinished(place)
    (place / "model").mkdir()
    (place / "model" / "config.json").touch()
    return place / "checkpoints"


def cached(place: Path) -> Path:
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "snapshots" / "abc" / "config.json").touch()
    return place


def no_tensors(place: Path) -> Path:
    place.mkdir()
    (place / "config.json").write_text("{}")
    return place


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_config, "weights without their config.json"),
        (some_file, "this file is no checkpoint"),
        (unfinished, r"this run is not finished: resume=.*init=.*step_0000003\.ckpt"),
        (lambda place: unfinished(place) / "checkpoints", r"init=.*step_0000003\.ckpt"),
        (finished, "checkpoints of a finished run: init=.*place, or one of them"),
        (cached, "a cache of the Hub's: did you mean .*snapshots/abc"),
        (no_tensors, "a config.json without its model.safetensors"),
        (lambda place: place, "give a finished run folder"),
    ],
)
def test_a_path_that_holds_no_weights(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    place = make(tmp_path / "place")
    with pytest.raises(ValueError, match=message):
        find_weights(str(place))


def test_only_one_tensor_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: while weights are read, converted and written, in parts too, never two of them at once."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def make() -> torch.Tensor:
        nonlocal most
        tensor = torch.ones(10, 10)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in alive))
        return tensor

    monkeypatch.setattr(tensors, "SHARD_BYTES", 1000)
    write(tmp_path, {f"w{i}": LazyTensor((10, 10), torch.float32, make) for i in range(9)}, label="")
    assert len(alive) == 9
    assert most <= 2  # the one that is being made, and the one that was written last
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def test_held_out_images_are_those_of_the_run_that_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another split than the weights' own run had is warned of, also when they were imported; their own is not."""
    small = ("model.n_layer=1", "model.n_embd=8", "task.steps=2", "task.warmup_steps=0", "task.batch_size=8")
    quiet = ("logger=none", "callbacks=none", "task.val_every=0")
    _, trained = run(tmp_path, "task=pretrain", *small, *quiet, "data.split_seed=5")
    _, imported = run(tmp_path, "task=import", f"init={trained / 'checkpoints' / 'step_0000002.ckpt'}")
    for seed, warned in ((0, True), (5, False)):
        caplog.clear()
        run(tmp_path, "task=evaluate", f"init={imported}", f"data.split_seed={seed}", "task.baseline_images=0")
        assert ("held out other images" in caplog.text) is warned


ORIGIN = {"network": {"n_layer": 1}, "permutation": None, "palette": {}, "objective": {}, "model": "../x", "data": ""}


@pytest.mark.parametrize("field", sorted(ORIGIN))
def test_a_config_that_cannot_be(tmp_path: Path, field: str) -> None:
    """What a file says of its weights is looked at before it is used: sizes, colours, names that become folders."""
    net = small_net()
    save_model(tmp_path / "model", net.state_dict(), make_metadata(net))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: ORIGIN[field]}))
    with pytest.raises(ValueError, match=r"config\.json is not complete"):
        find_weights(str(tmp_path))


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    """Invariant: an error inside leaves nothing; what is there is refused; half of one is removed later."""
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").touch()
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with files.atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").touch()
        assert not (tmp_path / "a").exists()
    assert os.listdir(tmp_path / "a") == ["x"]
    with pytest.raises(ValueError, match="is there already"), files.atomic_folder(tmp_path / "a"):
        pass
    (tmp_path / "a" / ".b.zz.part").mkdir()
    (tmp_path / "a" / ".b.zz.part" / "y").touch()
    (tmp_path / "a" / ".c.zz.part").touch()
    files.remove_parts(tmp_path)
    assert os.listdir(tmp_path / "a") == ["x"]
