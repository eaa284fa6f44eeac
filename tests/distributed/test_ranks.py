"""Which process of a run this one is, as whoever started it says."""

import os

import pytest

from igpt.distributed.launcher import RANK_VARIABLES, count_devices, is_rank
from igpt.distributed.rank import MPI_SIZES, Rank, this_rank

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
UNEVEN = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x1),3,1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "3"}
BATCH_SCRIPT = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # sbatch itself, before any srun
SALLOC = {**SRUN, "SLURM_STEP_ID": "4294967290"}  # its shell, where it passes on the variables of the allocation
SRUN_MPI = {**SRUN, "PMI_SIZE": "8", "PMI_RANK": "5"}  # srun --mpi=pmi2
NO_LOCAL_SIZE = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}


def start_as(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in {*RANK_VARIABLES, *MPI_SIZES, *(name for name in os.environ if name.startswith("SLURM_"))}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank(0, 0, 1, 1)),
        (TORCHRUN, Rank(5, 1, 8, 4)),
        (NO_LOCAL_SIZE, Rank(5, 1, 8, None)),
        (SRUN, Rank(5, 1, 8, 4)),
        (SRUN_MPI, Rank(5, 1, 8, 4)),
        (UNEVEN, Rank(5, 1, 8, 3)),
        (BATCH_SCRIPT, Rank(0, 0, 1, 1)),
        (SALLOC, Rank(0, 0, 1, 1)),
    ],
    ids=["alone", "torchrun", "no local size", "srun", "srun with MPI", "uneven", "batch script", "salloc"],
)
def test_this_rank(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: Rank) -> None:
    """By hand, from the variables that torchrun and srun document; a batch script and a shell are no rank."""
    start_as(monkeypatch, environment)
    assert this_rank() == rank
    assert is_rank() == (rank.count > 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set|LOCAL_RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set, other variables of a rank are"),
        ({**TORCHRUN, "WORLD_SIZE": "eight"}, "WORLD_SIZE='eight' is no number of processes"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' is no number"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8, WORLD_SIZE=8, .* cannot be true together"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4 cannot be true together"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 cannot be true together"),
        ({**NO_LOCAL_SIZE, "LOCAL_RANK": "8"}, "LOCAL_RANK=8 cannot be true together"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set, RANK is not"),
        ({**SRUN, "SLURM_LOCALID": "4"}, "SLURM_LOCALID=4 cannot be true together"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8: MPI started 8 processes"),
        ({**SRUN, "PMI_SIZE": "16"}, "PMI_SIZE=16: MPI started 16 processes"),  # mpirun, which srun starts on each node
    ],
)
def test_variables_that_name_no_rank(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    """No process of several takes itself for the only one: each would do the whole run."""
    start_as(monkeypatch, environment)
    with pytest.raises(ValueError, match=message) as caught:
        is_rank()
    assert len(str(caught.value).splitlines()) == 1


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_devices({"devices": 3, "accelerator": "auto"}) == 3
    assert count_devices({"devices": "auto", "accelerator": "cpu"}) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert count_devices({"devices": "auto", "accelerator": "auto"}) == 8
    assert count_devices({"devices": "auto", "accelerator": "cpu"}) == 2
