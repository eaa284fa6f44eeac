"""Plans of runs, and strategies that need several processes or GPUs."""

import os
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from hydra import initialize_config_dir

from igpt.run.launch import launch
from igpt.run.pipeline_stages import stage_configs
from igpt.training import hardware as machines
from igpt.training.deepspeed import ZeRO
from tests.configs import CONF, built


def planned(caplog: pytest.LogCaptureFixture, *overrides: str) -> str:
    build = built("trainer.plan=true", "logger=none", *overrides)
    caplog.clear()
    with caplog.at_level("INFO"):
        launch(build.run.cfg, choices=build.run.choices, overrides=[])
    return caplog.text


def test_the_plan_of_a_run(caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: iGPT-L on eight machines of eight; no image, palette, folder or process is needed for it."""
    monkeypatch.chdir(tmp_path)
    eight = ("trainer=fsdp", "trainer.accelerator=gpu", "trainer.devices=8", "trainer.nodes=8", "task.batch_size=128")
    message = planned(
        caplog, "model=igpt_l", "data=imagenet32", *eight, "trainer.memory_gb=80", "trainer.peak_tflops=100",
        "task.steps=1000",
    )  # fmt: skip
    assert re.search(r"weights +1,362,250,752", message)
    assert re.search(r"device: weights +0\.09 GB", message)  # 4 bytes each, of 64 devices one
    assert re.search(r"optimiser +0\.17 GB", message)
    assert re.search(r"images in all +128,000", message)
    assert re.search(r"a step .* at 40% of 100 TFLOP/s \(assumed\) on 64 device", message)
    assert re.search(r"fits +yes: .* of 80\.00 GB", message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", [96, 192])
def test_the_plan_of_the_first_version(side: int, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: iGPT-L with 48×48 positions and 4,096 codes; and as many vectors in a step of either tokenizer."""
    n, d, positions, codes = 48, 1536, 48**2, 4096
    weights = n * (12 * d**2 + 2 * d) + d + 2 * codes * d + positions * d + d
    assert f"{weights:,}" in planned(caplog, f"experiment=paper/pretrain_l_vq{side}")
    for name in (f"vqvae_{side}", f"vqvae_{side}_l1"):
        assert f"{128 * positions:,}, enough for {codes:,} codes" in planned(caplog, f"experiment=paper/{name}")


@pytest.mark.parametrize("name", ["vqvae_photographs", "vqvae_cifar10"])
def test_a_pipeline_through_a_vqvae_starts(name: str, tmp_path: Path) -> None:
    """Invariant: every stage has valid settings, the tokens of later ones are those of the first."""
    build = built(f"experiment={name}", f"data.path={tmp_path}", "task.stages.probe={}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        stages = stage_configs(build.run)
    assert [stage.trains_tokenizer for stage in stages.values()] == [True] + [False] * 5
    assert stages["pretrain"].cfg.tokens._target_.endswith("VQVAESettings")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task.batch_size=100", "trainer.devices=8"), "cannot be shared by 8 devices"),
        (("trainer.micro_batch=48",), "does not divide the 128 images"),
        (("trainer.utilisation=0",), "utilisation must be above 0 or null, got 0"),
        (("task=palette",), "is for tasks that train a network"),
        (("experiment=quickstart",), "not task=pipeline: plan its pretraining, task=pretrain with the same model"),
    ],
)
def test_a_plan_that_cannot_be(caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(caplog, "trainer.accelerator=cpu", *overrides)


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices=auto, or more than 1"):
        _ = built("trainer=fsdp", "trainer.devices=1", "trainer.accelerator=cpu").hardware


@pytest.mark.parametrize("trainer", ["deepspeed_2", "deepspeed_2_offload", "deepspeed_3", "deepspeed_3_offload"])
def test_deepspeed(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is composed and made. Without CUDA, with what it cannot, or without its package, it says so at once.

    But for what it cannot, only where it trains: what is read needs no DeepSpeed.
    """
    with pytest.raises(ValueError, match=f"trainer={trainer}, but PyTorch sees no GPU here.*: choose trainer=fsdp"):
        _ = built(f"trainer={trainer}", "trainer.devices=1").hardware
    settings = ("trainer.accelerator=cpu", "trainer.devices=1", f"trainer={trainer}")
    with pytest.raises(ValueError, match="trains on CUDA GPUs, this would run on a CPU"):
        built(*settings).hardware.check_training()
    monkeypatch.setattr(machines, "DEEPSPEED_RUNS_ON", ("cpu",))
    if trainer.endswith("offload"):  # one process will do
        built(*settings).hardware.check_training()
    else:
        with pytest.raises(ValueError, match=r"more than 1; on one GPU trainer=deepspeed_2_offload"):
            built(*settings).hardware.check_training()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    settings = ("trainer.accelerator=cpu", "trainer.devices=2", f"trainer={trainer}")
    machine = built(*settings).hardware
    stage = int(trainer.split("_")[1])
    result = ZeRO(zero_stage=machine.zero_stage, offload=machine.is_offloaded, n_weight=1000)
    assert result.config["zero_optimization"]["stage"] == machine.zero_stage == stage
    assert ("offload_param" in result.config["zero_optimization"]) == (trainer == "deepspeed_3_offload")
    assert ("offload_optimizer" in result.config["zero_optimization"]) == trainer.endswith("offload")
    with pytest.raises(ValueError, match=r"native reads float32 weights on a CPU, .*=bf16-mixed under"):
        _ = built(*settings, "trainer.decoding=native").hardware  # a whole copy's are bfloat16, ...
    assert built(*settings, "trainer.decoding=native", "trainer.precision=32-true").hardware.decoding == "native"
    for wrong in ("trainer.compile=true", "trainer.precision=bf16-true"):
        with pytest.raises(ValueError, match=f"does not go with {wrong}"):
            _ = built(*settings, wrong).hardware
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"DeepSpeed, which is not installed here: pip install deepspeed"):
        machine.check_training()


def test_deepspeed_is_told_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: DeepSpeed takes LOCAL_RANK for the index of the GPU, which is 0 where a rank sees one GPU only."""
    monkeypatch.setitem(sys.modules, "deepspeed", MagicMock())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(ZeRO, "set_world_ranks", lambda self: None)
    for device, there, told in (("cuda:0", "3", "0"), ("cuda:3", "3", "3"), ("cuda:2", None, "2"), ("cpu:0", "1", "1")):
        monkeypatch.setattr(ZeRO, "root_device", torch.device(device))
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if there is not None:
            monkeypatch.setenv("LOCAL_RANK", there)
        ZeRO.setup_distributed(object.__new__(ZeRO))
        assert os.environ["LOCAL_RANK"] == told
