"""What docs/extending.md shows is run: a tokenizer and a positional encoding, from training to samples."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.loggers import Logger
from torch import Tensor

from igpt.checkpoint import huggingface
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import save_model
from igpt.hub import ImageGPT
from igpt.model import c_attention, decode, positions
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.run.launch import run
from igpt.settings.fields import Count
from igpt.tokens import tokenizer_registry
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer import TokenGrid
from igpt.training.lightning_callbacks import INSTEAD
from igpt.training.loggers import RunInfo
from igpt.utils import keyed
from tests.checkpoint.test_igpt_format import make_metadata
from tests.configs import built
from tests.conftest import ROOT, perturbed
from tests.data.conftest import photo
from tests.task.conftest import SIZES, Lab


def read_section(heading: str) -> str:
    """The text of one section of the page."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    return section[1]


def shown_under(heading: str) -> str:
    """The Python code of one section."""
    (code,) = re.findall(r"```python\n(.*?)```", read_section(heading), re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) < 15
    return str(code)


@pytest.fixture
def rope(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(positions, "POSITIONS", positions.POSITIONS)
    known = dict(positions.POSITIONS)
    names = {"torch": torch, "Tensor": Tensor, "Positions": positions.Positions, "POSITIONS": positions.POSITIONS}
    exec(shown_under("A positional encoding"), names)
    yield
    positions.POSITIONS.clear()
    positions.POSITIONS.update(known)


@pytest.mark.usefixtures("rope")
def test_rotary_positions_are_relative() -> None:
    """Invariant: scores of turned queries and keys depend on how far apart they are alone; lengths stay."""
    config = GPTConfig(n_layer=1, n_embd=16, n_head=2, n_ctx=16, n_vocab=5, causal=True, positions="rope")
    encoding = positions.POSITIONS["rope"](config)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    scores = [[float((encoding.rotate(q, i) * encoding.rotate(k, j)).sum()) for j in range(6)] for i in range(6)]
    for i in range(5):
        for j in range(5):
            assert scores[i][j] == pytest.approx(scores[i + 1][j + 1], abs=1e-5)
    assert scores[0][0] != pytest.approx(scores[0][1], abs=1e-3)
    assert encoding.rotate(q, 3).norm() == pytest.approx(float(q.norm()))


@pytest.mark.usefixtures("rope")
def test_a_positional_encoding(tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, is saved and resumed to the bit, and draws: every way agrees with the network to 1e-5 or refuses."""
    network = GPTConfig(**SIZES, positions="rope")
    metadata = lab.metadata
    monkeypatch.setattr(Lab, "metadata", lambda self, objective=None: _with(metadata(objective), network))
    result = lab.pretrain(tmp_path / "run", checkpoint_every=4)
    assert result.curves["train/loss_gen"].y[-1] < result.curves["train/loss_gen"].y[0]
    weights = find_weights(str(tmp_path / "run"))
    assert weights.metadata.network == network
    net = weights.net().eval()
    assert not any(name == "wpe" for name in net.state_dict())
    resumed = go_back(tmp_path / "run", tmp_path / "resumed", step=4)
    lab.pretrain(resumed, checkpoint_every=4)
    after = find_weights(str(resumed)).net().state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in net.state_dict().items())

    net = perturbed(GPT(network))
    tokens = torch.randint(net.n_vocab, (2, net.n_ctx), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        full, cache = net(tokens), net.new_cache(2)
        net.step(tokens[:, :3], cache)
        step = decode.make_decode_step(net, cache)
        for i in range(3, net.n_ctx - 1):
            torch.testing.assert_close(step(tokens[:, i : i + 1]), full[:, i + 1], rtol=0, atol=1e-5)
    for way in ("native", "columns", "graphs"):
        with pytest.raises(ValueError, match=f"trainer.decoding={way} does not compute positions=rope: choose auto"):
            decode.make_decode_step(net, net.new_cache(2), way)
    uniforms = keyed.uniform(torch.arange(2), net.n_ctx)
    sampling = Sampling(1.0, None, None)
    assert torch.equal(generate(net, uniforms, sampling), generate(net, uniforms, sampling, cached=False))
    with pytest.raises(ValueError, match=r"has positions=rope, which Hugging Face's ImageGPT does not know"):
        huggingface.check_exportable(weights)


def test_a_table_that_no_file_holds_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trip: sines as a buffer that is not saved are the same in a network that is loaded."""

    class Sines(positions.Positions):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__(config)
            angles = torch.arange(config.n_ctx)[:, None] / 10 ** torch.arange(config.n_embd)
            self.register_buffer("table", angles.sin(), persistent=False)

        def add(self, content: Tensor, start: int) -> Tensor:
            return content + self.get_buffer("table")[start : start + content.shape[1]]

    monkeypatch.setitem(positions.POSITIONS, "sines", Sines)
    net = perturbed(GPT(GPTConfig(**SIZES, positions="sines")))
    assert not net.blocks[0].attn.not_in_c  # nothing is turned
    save_model(tmp_path / "model", net.state_dict(), make_metadata(net))
    loaded = find_weights(str(tmp_path)).net()
    tokens = torch.randint(net.n_vocab, (2, net.n_ctx), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), net(tokens))


def test_attention_in_c_leaves_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that this project gets one day: attention in C is not used where it is not the paper's."""

    @dataclass(frozen=True)
    class Config(GPTConfig):
        window: int | None = None

    assert not GPT(Config(**SIZES)).blocks[0].attn.not_in_c
    net = perturbed(GPT(Config(**SIZES, window=4)))
    assert net.blocks[0].attn.not_in_c == "window=4"
    monkeypatch.setattr(c_attention, "attend", None)
    with torch.no_grad():
        assert net(torch.zeros(1, net.n_ctx, dtype=torch.int64)).isfinite().all()


def go_back(run: Path, to: Path, *, step: int) -> Path:
    """A copy of a run's folder as it was when a checkpoint had just been written."""
    shutil.copytree(run, to)
    for path in to.glob("checkpoints/step_*"):
        if int(path.name.partition(".")[0].removeprefix("step_")) > step:
            path.unlink()
    (to / "checkpoints" / "latest").write_text(f"step_{step:07}.ckpt\n")
    shutil.rmtree(to / "model")
    return to


def _with(metadata: Any, network: GPTConfig) -> Any:
    metadata.keywords["network"] = replace(network, causal=metadata.keywords["network"].causal)
    return metadata


def test_weights_of_an_encoding_that_is_not_here(tmp_path: Path, rope: None) -> None:
    """Another version's encoding: refused by its name, not read as something else."""
    net = perturbed(GPT(GPTConfig(**SIZES, positions="rope")))
    save_model(tmp_path / "model", net.state_dict(), make_metadata(net))
    positions.POSITIONS.clear()
    with pytest.raises(ValueError, match=r"model\.positions must be one of learned"):
        find_weights(str(tmp_path))


def test_it_is_chosen_by_its_name(rope: None) -> None:
    assert built("model.positions=rope").planned_network.positions == "rope"
    with pytest.raises(
        ValueError, match=r"model\.positions must be one of learned, factorised, rope_2d, rope: got 'ropes'"
    ):
        assert built("model.positions=ropes").planned_network


def test_a_tokenizer(tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, travels inside the weights, and every task reads it there. By hand: levels of brightness."""
    monkeypatch.setattr(tokenizer_registry, "TOKENIZERS", dict(tokenizer_registry.TOKENIZERS))
    names: dict[str, Any] = {
        "torch": torch, "np": np, "Tensor": Tensor, "NamedTuple": NamedTuple, "Palette": Palette,
        "PaletteTokenizer": PaletteTokenizer, "PixelOrder": PixelOrder, "TokenGrid": TokenGrid,
        "TOKENIZERS": tokenizer_registry.TOKENIZERS,
        "__name__": "luma",
    }  # fmt: skip
    exec(shown_under("A tokenizer"), names)
    tokenizer = names["LumaSettings"](k=17).build(lab.digits, tmp_path)
    pixels = torch.from_numpy(np.asarray(photo(0, 8, 8))[None].copy())
    level = np.asarray(photo(0, 8, 8)) @ np.array([0.299, 0.587, 0.114])
    assert tokenizer.encode(pixels)[0].tolist() == np.floor(level / 256 * 17).astype(int).flatten().tolist()
    assert tokenizer != PaletteTokenizer(tokenizer.palette, tokenizer.order)

    monkeypatch.setattr(Lab, "tokenizer", tokenizer)
    lab.pretrain(tmp_path / "run")
    weights = find_weights(str(tmp_path / "run"))
    assert weights.tokenizer == tokenizer
    assert type(weights.tokenizer).__name__ == "Luma"
    model = ImageGPT.from_weights(weights)
    completed = model.complete(pixels.numpy(), rows=4)
    assert np.array_equal(completed[:, :4], tokenizer.decode(tokenizer.encode(pixels))[:, :4])
    assert model.sample(2).shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match=r"reads .*, Hugging Face's ImageGPT a palette of colours only"):
        huggingface.check_exportable(weights)
    with pytest.raises(ValueError, match="of the kind 'luma', known are palette, patches"):
        tokenizer_registry.TOKENIZERS.pop("luma")
        find_weights(str(tmp_path / "run"))


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with the callback and the logger of the page, where a config can name them."""
    module = ModuleType("extensions")
    vars(module).update(L=L, torch=torch, Count=Count, Logger=Logger, Path=Path, json=json, RunInfo=RunInfo)
    for heading in ("A callback", "A logger"):
        exec(shown_under(heading), vars(module))
    monkeypatch.setitem(sys.modules, "extensions", module)
    return module


TINY = (
    "trainer=cpu", "model.n_layer=1", "model.n_embd=8", "model.n_head=2", "task.steps=4", "task.batch_size=8",
    "task.warmup_steps=1", "task.val_every=0", "task.log_every=2", "task.checkpoint_every=4",
)  # fmt: skip


@pytest.mark.usefixtures("extensions")
def test_a_callback_and_a_logger(tmp_path: Path) -> None:
    """Invariant: what the logger is told is what the run's own curve says; the callback sees every second step."""
    settings = [*TINY, f"paths.runs={tmp_path}", f"paths.cache={tmp_path / 'cache'}", "callbacks=none", "logger=none"]
    added = ["+callbacks.norm={_target_: extensions.GradientNorm, every: 2}",
             "+logger.json={_target_: extensions.json_lines, file: metrics.jsonl}"]  # fmt: skip
    _, folder = run(*settings, *added, conf=ROOT / "conf")
    assert folder is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    norms = {line["step"]: line["gradient_norm"] for line in lines if "gradient_norm" in line}
    assert list(norms) == [0, 2]
    assert all(0 < norm < 100 for norm in norms.values())
    losses = {line["step"]: line["train/loss_gen"] for line in lines if "train/loss_gen" in line}
    _, again = run(*settings, "rerun=true", conf=ROOT / "conf")
    assert again is not None
    curve = json.loads((again / "result.json").read_text())["curves"]["train/loss_gen"]
    assert losses == dict(zip(map(int, curve["x"]), curve["y"], strict=True))
    with pytest.raises(ValueError, match=r"callbacks\.norm\.every must be at least 1, got 0"):
        run(*settings, "+callbacks.norm={_target_: extensions.GradientNorm, every: 0}", conf=ROOT / "conf")


def test_lightnings_own_by_command_and_file(tmp_path: Path) -> None:
    """Round trip: every command of the page in one, and its file: all that they name is in the run, and works."""
    typed = [
        word
        for heading in ("A callback", "A logger")
        for command in re.findall(r"^python train\.py (.*)", read_section(heading), re.MULTILINE)
        for word in command.split()
        if not word.startswith("+callbacks.stop")  # which the file says
    ]
    name, content = re.findall(
        r"`conf/callbacks/(\w+)\.yaml`, it is .*?```yaml\n(.*?)```", read_section("A callback"), re.DOTALL
    )[0]
    (tmp_path / "own" / "callbacks").mkdir(parents=True)
    (tmp_path / "own" / "callbacks" / f"{name}.yaml").write_text(content)
    _, folder = run(
        *TINY, "task.val_every=2", f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", *typed,
        "--config-dir", str(tmp_path / "own"), f"callbacks={name}", conf=ROOT / "conf",
    )  # fmt: skip
    assert folder is not None
    config = json.loads((folder / "run.json").read_text())["config"]
    assert {key: entry["_target_"].rpartition(".")[2] for key, entry in config["callbacks"].items()} == {
        "bar": "RichProgressBar", "samples": "SampleGrid", "stop": "EarlyStopping", "rate": "LearningRateMonitor",
    }  # fmt: skip
    (table,) = (folder / "lightning_logs").rglob("metrics.csv")
    assert "lr-Adam" in table.read_text()
    checkpoint = torch.load(folder / "checkpoints" / "step_0000004.ckpt", weights_only=True)
    assert [key for key in checkpoint["callbacks"] if key.startswith("EarlyStopping")]
    assert list((folder / "tensorboard").glob("events.*"))


def test_the_refusals_of_the_page_are_those_of_the_code() -> None:
    """Round trip: each class that the table names is refused, and none that is not there."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", read_section("A callback"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    refused = {name for name in of_lightning.__all__ if issubclass(getattr(of_lightning, name), tuple(INSTEAD))}
    assert named == refused - {"Checkpoint"}  # a base class
