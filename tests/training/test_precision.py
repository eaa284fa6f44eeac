"""What `trainer.precision=auto` is on which device, in records and identities, and what the log says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from igpt.report.folder import RunFolder
from igpt.report.identity import changes, identity
from igpt.run.recipes import keep_recorded
from igpt.settings.older_configs import read_record
from igpt.training.hardware import HardwareConfig, matmul_precision
from igpt.training.precision import describe_device, describe_small_steps, list_precision_notes, resolve_precision
from igpt.utils import files
from tests.configs import built
from tests.task.conftest import machine


def give_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Has PyTorch report GPUs of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")


@pytest.mark.parametrize(
    ("gpus", "trainer", "expected"),
    [
        ((), {}, "32-true"),
        ((), {"precision": "bf16-mixed"}, "bf16-mixed"),
        (((9, 0),), {}, "bf16-mixed"),
        (((8, 0), (8, 6)), {}, "bf16-mixed"),
        (((7, 5),), {}, "32-true"),  # Turing
        (((9, 0), (7, 5)), {}, "32-true"),
        (((9, 0),), {"accelerator": "cpu"}, "32-true"),
        (((9, 0),), {"precision": "32-true"}, "32-true"),
        ((), {"plan": True}, "32-true"),
        ((), {"plan": True, "accelerator": "gpu"}, "bf16-mixed"),
        ((), {"plan": True, "memory_gb": 80.0}, "bf16-mixed"),
        ((), {"plan": True, "memory_gb": 80.0, "accelerator": "cpu"}, "32-true"),
        ((), {"memory_gb": 80.0}, "32-true"),
        (((7, 5),), {"plan": True, "memory_gb": 80.0}, "bf16-mixed"),
    ],
)
def test_auto_is_bfloat16_where_the_gpu_has_it(
    gpus: tuple[tuple[int, int], ...], trainer: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: bfloat16 units came with compute capability 8.0; a plan may be of GPUs that are not here."""
    give_gpus(monkeypatch, *gpus)
    assert resolve_precision({"accelerator": "auto", "precision": "auto", **trainer}) == expected


def test_auto_in_identities_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: the identity of what `auto` is here; a record keeps `auto`, and a run goes on in what it was."""
    on_cpu = built().run
    assert on_cpu.name == built("trainer.precision=32-true").run.name
    give_gpus(monkeypatch, (9, 0))
    run, typed = built("trainer=ddp").run, built("trainer=ddp", "trainer.precision=bf16-mixed").run
    assert run.name == typed.name != on_cpu.name
    assert built("trainer.accelerator=cpu").run.name == on_cpu.name
    RunFolder(tmp_path).start(run.recorded_config, [], {}, precision=run.config["trainer"]["precision"])
    assert files.read_json(tmp_path / "run.json")["config"]["trainer"]["precision"] == "auto"
    give_gpus(monkeypatch)
    saved = read_record(tmp_path / "run.json")["config"]
    assert saved["trainer"]["precision"] == "bf16-mixed"
    assert identity(saved, run.input_hashes) == run.name[-8:]
    assert "trainer.precision bf16-mixed ≠ 32-true" in changes(saved, on_cpu.config)[0]
    for typed_precision, expected in (("auto", "bf16-mixed"), ("32-true", "32-true")):
        cfg = OmegaConf.create({"trainer": {"precision": typed_precision}})
        keep_recorded(cfg, tmp_path)
        assert cfg.trainer.precision == expected


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), **changed: Any) -> HardwareConfig:
    give_gpus(monkeypatch, capability)
    return machine(accelerator="auto", **changed)


def test_the_start_line_says_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand; of a CPU in float32 nothing."""
    assert describe_device(machine()) == ""
    assert describe_device(machine(precision="bf16-mixed")) == "on the CPU in bfloat16 (weights float32)"
    assert list_precision_notes(machine(), trains=True) == []
    assert describe_device(on_gpu(monkeypatch, precision="auto")) == "on 1 × NVIDIA H100 in bfloat16 (weights float32)"
    assert list_precision_notes(on_gpu(monkeypatch, precision="auto"), trains=True) == []
    plain, rounded = on_gpu(monkeypatch), on_gpu(monkeypatch, matmul_precision="high")
    zero = on_gpu(monkeypatch, precision="bf16-mixed", strategy="deepspeed_2_offload")
    in_optimiser = "(weights, too; float32 ones in the optimiser)"
    assert describe_device(zero) == f"on 1 × NVIDIA H100 in bfloat16 {in_optimiser}"
    assert describe_device(zero, trains=False) == "on 1 × NVIDIA H100 in bfloat16 (weights float32)"
    assert describe_device(plain) == "on 1 × NVIDIA H100 in float32"
    assert describe_device(rounded) == "on 1 × NVIDIA H100 in float32, products in TF32"
    (note,), (of_rounded,) = (list_precision_notes(each, trains=False) for each in (plain, rounded))
    assert "trainer.precision=bf16-mixed is about 8 times as fast" in note
    assert "an estimate" in note
    assert "trainer.matmul_precision=high allows TF32" in note
    assert "TF32" not in of_rounded
    (of_older,) = list_precision_notes(on_gpu(monkeypatch, (7, 5), precision="auto"), trains=True)
    assert of_older.startswith("this GPU has no bfloat16 units")
    narrow = on_gpu(monkeypatch, precision="bf16-true")
    assert "is lost" in list_precision_notes(narrow, trains=True)[0]
    assert list_precision_notes(narrow, trains=False) == []


def test_small_steps_are_lost_as_the_note_says() -> None:
    """By enumeration: of all bfloat16 numbers of one power of two, none changes below 1/512 of itself, some above."""
    weights = (1 + torch.arange(128) / 128).to(torch.bfloat16)
    for sign in (-1, 1):
        assert torch.equal(weights + sign * weights.float().mul(0.99 / 512).to(torch.bfloat16), weights)
        assert not torch.equal(weights + sign * weights.float().mul(1.01 / 512).to(torch.bfloat16), weights)
    assert "less than 1/512" in describe_small_steps()


@pytest.mark.parametrize(("setting", "allowed"), [("auto", False), ("highest", False), ("high", True)])
def test_convolutions_round_if_products_may(setting: str, allowed: bool) -> None:
    """Invariant: TF32 in both or in neither; put back afterwards. On a CPU nothing of a GPU is changed."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with matmul_precision(setting, torch.device("cuda")):
        assert torch.backends.cudnn.allow_tf32 is allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before
    with matmul_precision("highest", torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32 is before[0]
