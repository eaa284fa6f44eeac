"""Which process of a run this one is, as whoever started it says."""

import pytest

from igpt.distributed.launcher import RANK_VARIABLES, count_devices, is_rank
from igpt.distributed.ranks import Rank, this_rank

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
BATCH_SCRIPT = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # sbatch itself, before any srun


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, Rank(0, 0, 1, 1)), (TORCHRUN, Rank(5, 1, 8, 4)), (SRUN, Rank(5, 1, 8, 4)), (BATCH_SCRIPT, Rank(0, 0, 1, 1))],
    ids=["alone", "torchrun", "srun", "batch script"],
)
def test_this_rank(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: Rank) -> None:
    """By hand, from the variables that torchrun and srun document; a batch script is no rank."""
    for name in (*RANK_VARIABLES, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert this_rank() == rank
    assert is_rank() == (rank.count > 1)


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_devices({"devices": 3, "accelerator": "auto"}) == 3
    assert count_devices({"devices": "auto", "accelerator": "cpu"}) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert count_devices({"devices": "auto", "accelerator": "auto"}) == 8
    assert count_devices({"devices": "auto", "accelerator": "cpu"}) == 2
