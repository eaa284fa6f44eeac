"""Photographs, end to end in this process: what the paper's commands do, with a network of two small blocks."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir

from igpt.data.classes import imagenet_classes
from igpt.metric.result import Result
from igpt.report.folder import RunFolder
from igpt.run.launch import launch
from igpt.run.run_dir import find_run_dir
from igpt.tokens.colour_remainder import ColourRemainder
from igpt.tokens.palette import Palette
from tests.configs import CONF, built
from tests.conftest import TINY
from tests.data.conftest import class_folders, encoded, parquet_shards, photo, tar_shards
from tests.tokens.test_palette import random_palette

SMALL = (
    "data.resolution=8",
    "data.crop.short_side=[40,56]",
    "data.crop.eval_short_side=36",
    "data.crop.size=32",
    "tokens.palette.k=24",
    "tokens.palette.iterations=5",
    "model=igpt_nano",
    "callbacks=none",
    "logger=none",
)
PIPELINE = (
    "experiment=quickstart",
    "data=imagenet48",
    "+task.stages.palette.count=4",
    "task.stages.pretrain.batch_size=8",
    *TINY,
    *(f"task.stages.{stage}=null" for stage in ("probe", "finetune", "scratch")),
)


@pytest.fixture(scope="module")
def ilsvrc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photographs in ILSVRC's layout: train/<wnid> and val/<wnid>."""
    root = tmp_path_factory.mktemp("ilsvrc")
    wnids = list(imagenet_classes())[10:14]
    class_folders(root, wnids, 13)
    return class_folders(root, wnids[1:3], 3, split="val", seed=900)


def run(tmp_path: Path, *overrides: str) -> tuple[Result, Path]:
    """The result and the folder of a run with runs and cache below `tmp_path`."""
    build = built(*overrides, f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        result = launch(build.run.cfg, choices=build.run.choices, overrides=list(overrides))
    return result, next(path for path in (tmp_path / "runs").iterdir() if path.name == build.run.name)


def test_the_papers_command_builds_igpt_l_at_48(ilsvrc: Path, tmp_path: Path) -> None:
    """Independent source: iGPT-L's weights with its own table of 2,304 positions, counted from the architecture."""
    random_palette(512).save(tmp_path / "colours.npy")
    build = built(
        "model=igpt_l", "data=imagenet48", f"data.path={ilsvrc}", "tokens=openai",
        f"tokens.path={tmp_path / 'colours.npy'}", f"paths.cache={tmp_path}",
    )  # fmt: skip
    with torch.device("meta"):
        net = build.build_network()
    n_weight = sum(weight.numel() for weight in net.parameters())
    assert n_weight == 48 * (12 * 1536**2 + 2 * 1536) + 1536 + 2 * 512 * 1536 + 2304 * 1536 + 1536 == 1_364_216_832
    assert build.source.n_class == 1000


@pytest.mark.parametrize("more", [("tokens.order=random",), ("data.streaming=true", "data.val_fraction=0.2")])
def test_next_pixel(ilsvrc: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Invariant: random crops are trained on, any order of the pixels is completed, a stream does as a folder."""
    result, folder = run(tmp_path, *PIPELINE, *SMALL, *more, f"data.path={ilsvrc}")
    assert 0 < result.numbers["pretrain/val/loss_gen"].value < 2 * np.log(24)
    assert (folder / "5_complete" / "completions.png").is_file()
    completed = np.load(folder / "5_complete" / "completions_tokens.npy")
    record = RunFolder(folder / "5_complete").read_result()
    data_as_before = [s for s in (*SMALL, *more) if s.startswith("data.")]
    again = built("task=complete", f"init={folder / '2_pretrain'}", "data=imagenet48", f"data.path={ilsvrc}",
                  *data_as_before, f"paths.cache={tmp_path / 'cache'}")  # fmt: skip
    data = again.build_datamodule()
    given = data.sample_tokens("val")[record["provenance"]["images"]].repeat_interleave(4, 0)
    known = data.tokenizer.known_tokens(4)
    assert known.sum() == 32
    assert torch.equal(torch.from_numpy(completed)[:, known], given[:, known])


def test_masked_pixels(ilsvrc: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: BERT trains, and its weights score the same when they are read back; test is ILSVRC's val.

    Scoring with another draw of what is held out is warned of.
    """
    pretrain = [s.replace("task.stages.pretrain.", "task.") for s in PIPELINE if "pretrain" in s or "model" in s]
    same = [*SMALL, "data=imagenet48", f"data.path={ilsvrc}"]
    trained, folder = run(tmp_path, "task=pretrain", "objective=bert", *pretrain, *same)
    assert "-bert-" in folder.name
    data = [s for s in same if s.startswith("data")]
    for split, n in (("val", 2), ("test", 6)):
        scored, _ = run(tmp_path, "task=evaluate", f"task.split={split}", f"init={folder}", *data, "logger=none")
        assert scored.numbers[f"{split}/loss_gen"].n == n
    scored, _ = run(tmp_path, "task=evaluate", f"init={folder}", "task.batch_size=1", *data, "logger=none")
    assert scored.numbers["val/loss_gen"].value == pytest.approx(trained.numbers["val/loss_gen"].value, rel=1e-6)
    assert "held out other images" not in caplog.text
    run(tmp_path, "task=evaluate", f"init={folder}", "data.split_seed=1", *data, "logger=none")
    assert "held out other images than this run does (data.split_seed 0 ≠ 1)" in caplog.text
    with pytest.raises(ValueError, match="only causal"):
        run(tmp_path, "task=sample", f"init={folder}")


def test_a_palette_beside_others(ilsvrc: Path, tmp_path: Path) -> None:
    """Independent source: the error by hand in numpy; more colours err less; every palette has its picture."""
    for k in (2, 512):
        random_palette(k).save(tmp_path / str(k) / "colours.npy")
    beside = f"task.compare_with=[{tmp_path / '2' / 'colours.npy'},{tmp_path / '512' / 'colours.npy'}]"
    result, folder = run(tmp_path, "task=palette", beside, "task.split=test", "data=imagenet48", *SMALL,
                         f"data.path={ilsvrc}")  # fmt: skip
    errors = [result.numbers[f"test/{name}_mse"].value for name in ("colours", "512_colours", "palette")]
    assert errors[0] > errors[2] > errors[1]
    for name in ("palette", "colours", "512_colours"):
        assert (folder / f"{name}_colours.png").is_file()
        assert result.curves[name].y[-1] <= 1
    build = built("data=imagenet48", *SMALL, f"data.path={ilsvrc}", f"paths.cache={tmp_path / 'cache'}")
    pixels = build.source.split("test").read(range(6), [0] * 6).pixels.reshape(-1, 1, 3)
    square = (pixels.astype(float) - build.tokenizer.palette.colours) ** 2
    assert errors[2] == pytest.approx(square.sum(-1).min(1).mean() / 3, rel=1e-3)  # by eye or by centre: all but equal


def test_bits_left_out_are_not_fitted_to_the_images_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of train, the images after those that are measured; without further images, or a file of them, no number."""
    data, fitted_on, fit = tmp_path / "data", [], ColourRemainder.fit
    random_palette(512).save(data / "colours.npy")
    for short, n in (("va", 3), ("tr", 5)):
        np.save(data / f"cifar10_{short}X.npy", np.arange(n * 64).reshape(n, 64) % 512)
        np.save(data / f"cifar10_{short}Y.npy", np.eye(10)[:n])

    def noted(palette: Palette, pixels: np.ndarray) -> ColourRemainder:
        fitted_on.append(len(pixels))
        return fit(palette, pixels)

    monkeypatch.setattr(ColourRemainder, "fit", noted)
    settings = (
        "task=palette", "data=openai_npy", "data.name=cifar10", "data.resolution=8", f"data.path={data}",
        f"data.clusters={data / 'colours.npy'}", "tokens=openai", f"tokens.path={data / 'colours.npy'}", "logger=none",
    )  # fmt: skip
    for overrides, others in (
        (("task.split=val",), [5]), (("task.split=train", "task.count=3"), [2]), (("task.split=train",), [])
    ):  # fmt: skip
        result, _ = run(tmp_path, *settings, *overrides)
        assert fitted_on == others
        assert any(key.endswith("/palette_remainder") for key in result.numbers) == bool(others)
        fitted_on.clear()
    (data / "cifar10_trX.npy").unlink()
    result, _ = run(tmp_path, *settings)
    assert result.numbers["val/palette_mse"].value == 0
    assert "val/palette_remainder" not in result.numbers


def test_other_images_are_another_run(tmp_path: Path) -> None:
    """Invariant: an image more, or one of another size, at the same path: neither the same run nor one to resume."""
    root = class_folders(tmp_path / "photos", ["a", "b"], 4)
    settings = ("task=palette", "data=folder", f"data.path={root}", *SMALL, f"paths.runs={tmp_path / 'runs'}")
    names = [built(*settings).run.name]
    folder = find_run_dir(built(*settings).run)
    folder.start(built(*settings).run.config, [], built(*settings).run.input_hashes)
    (root / "train" / "a" / "0.jpg").write_bytes(encoded(photo(50)))
    names.append(built(*settings).run.name)
    with pytest.raises(ValueError, match=r"the file of data\.path has changed"):
        find_run_dir(built(*settings, f"resume={folder.path}").run)
    (root / "train" / "a" / "9.jpg").write_bytes(encoded(photo(51)))
    names.append(built(*settings).run.name)
    assert len(set(names)) == 3


def test_a_corrupt_photograph_ends_a_run_in_one_line(
    ilsvrc: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The row or file is named before or while training; with skip the run goes on, and says how many it left out."""
    root = class_folders(tmp_path / "photos", list(imagenet_classes())[:2], 12)
    bad = root / "train" / next(iter(imagenet_classes())) / "3.jpg"
    body = encoded(photo(0))
    bad.write_bytes(body[: len(body) // 2])
    settings = ["task=pretrain", "data=imagenet48", *SMALL, f"data.path={root}", "data.val_fraction=0.1"]
    settings += ["task.steps=3", "task.batch_size=8", "task.warmup_steps=1", "task.val_every=0", "task.log_every=1"]
    with pytest.raises(ValueError, match=r"3.jpg: it is damaged or cut short"):
        run(tmp_path, *settings)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, *settings, "data.on_corrupt=skip")
    assert "1 of 24 images" in caplog.text


def test_a_mixture_of_streams(tmp_path: Path) -> None:
    """The command for XL's data, on shards made here: it trains on both, and a setting that is none is named."""
    tar_shards(tmp_path / "tar", [12, 20])
    parquet_shards(tmp_path / "parquet", [16, 14], first=32)
    streams = (
        "data=imagenet64_web", "data.resolution=8", f"data.streams.imagenet.path={tmp_path}/parquet",
        f"data.streams.web.path='{tmp_path}/tar/web-{{000..001}}.tar'", "data.streams.imagenet.val_fraction=0.3",
        "data.stream.buffer=8", "model=igpt_nano", "data.palette_size=8", "task.steps=4", "task.batch_size=8",
        "task.warmup_steps=1", "task.val_every=0", "trainer=cpu", "logger=none", "callbacks=none",
    )  # fmt: skip
    result, _ = run(tmp_path, *streams)
    assert result.numbers["train/images_seen"].value == 32
    with pytest.raises(ValueError, match=r"data\.streams\.web has no setting 'buffer'"):
        run(tmp_path, *streams, "+data.streams.web.buffer=3")
