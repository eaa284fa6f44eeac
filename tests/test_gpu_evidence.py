"""Part `evidence` of `benchmarks/gpu.py`: its commands, runs side by side that end in time, the rows that they give."""

import sys
from pathlib import Path

import pytest

from igpt.run.arguments import complete_overrides
from tests.conftest import ROOT
from tests.test_benchmarks import BENCHMARKS
from tests.test_gpu_benchmark import STUB


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_findings_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: every command is one that train.py takes, is stopped in time, goes on, and one that fails is told."""
    import gpu_evidence
    import gpu_runs
    import gpu_units

    assert len(gpu_evidence.describe_readers("RUN")) == 5 + 3 * 3
    monkeypatch.setattr(gpu_evidence, "SEEDS", (0,))
    commands = [gpu_evidence.describe_pretraining(), *gpu_evidence.describe_readers("RUN").values()]
    for overrides in commands:
        taken = gpu_evidence.make_command(overrides, ["trainer=gpu", "data.path=CIFAR"])
        images = ["data=cifar10"] * (overrides[0] in ("task=probe", "task=evaluate", "task=complete"))  # RUN's
        cfg = complete_overrides([*images, *(each for each in taken[2:] if each != "init=RUN")], [ROOT / "conf"])[1]
        assert cfg.trainer.precision == "bf16-mixed"
        assert (cfg.get("data") or cfg).get("path", "CIFAR") == "CIFAR"

    monkeypatch.setattr(gpu_runs, "GRACE", 5.0)
    mark = str(tmp_path / "mark")
    stubs = {"long": [sys.executable, "-c", STUB, mark], "short": [sys.executable, "-c", "print('done')"]}
    assert gpu_evidence.run_side_by_side(stubs, 7, tmp_path) == {"long": None, "short": 0}
    codes = gpu_evidence.run_side_by_side(stubs, 60, tmp_path)
    assert codes == {"long": 0, "short": 0}
    assert gpu_evidence.check_codes(codes, tmp_path)
    assert not gpu_evidence.check_codes({"long": gpu_evidence.STOPPED, "short": 0}, tmp_path)
    with pytest.raises(RuntimeError, match="short ended with exit code 1: done"):
        gpu_evidence.check_codes({"short": 1}, tmp_path)

    few = (tmp_path, ["data.path=CIFAR"], True)
    assert "has not ended" in gpu_units.measure(gpu_evidence.read, 60, few)["error"]
    monkeypatch.setattr(gpu_evidence, "run_side_by_side", lambda commands, *_: dict.fromkeys(commands))
    assert gpu_evidence.pretrain(60, *few) == {"unfinished": True}
    (tmp_path / "runs").mkdir()
    kept = ("network/*-ar-s0-*", "depth/*-ar-s0-*", "finetuning/*-ar-*")
    runs = [path for pattern in kept for path in (ROOT / "docs" / "evidence").glob(pattern)]
    for path in runs:
        (tmp_path / "runs" / path.name).symlink_to(path)
    monkeypatch.setattr(gpu_evidence, "run_side_by_side", lambda commands, *_: dict.fromkeys(commands, 0))
    (network,) = [path.name for path in runs if path.name.startswith("pretrain")]
    assert gpu_evidence.pretrain(60, *few) == {"run": network}
    found = gpu_evidence.read(60, *few)
    assert found["runs"] == sorted(path.name for path in runs)
    page = (ROOT / "README.md").read_text()
    told = gpu_evidence.make_table({"read": {"result": found}})
    rows = [row.removeprefix("| ").partition(", at 32×32 | ") for row in told[2:]]
    assert len(rows) == 5
    assert all(finding in page and ours.removesuffix(" |") in page for finding, _, ours in rows)
