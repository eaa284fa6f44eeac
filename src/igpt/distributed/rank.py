"""The rank of this process, from the environment variables of whoever started it: this package, torchrun or srun."""

import os
import re
from dataclasses import dataclass

# processes of `mpirun`, by its kind: Open MPI, MPICH and Intel MPI, MVAPICH
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
NO_STEPS = ("4294967290", "4294967291")  # SLURM_STEP_ID of the shell of salloc and of a batch script
STARTERS = "torchrun and srun set all of them (docs/clusters.md)"


@dataclass(frozen=True)
class Rank:
    """The rank of this process in its run."""

    index: int  # over all machines
    local: int  # on this machine
    count: int  # processes of the run
    n_local: int | None  # on this machine; None: the variables do not say

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.index == 0


def this_rank() -> Rank:
    """The rank from the environment: of this package or torchrun (RANK, …), else srun (SLURM_…), else one process.

    Raises:
        ValueError: variables that are missing, no numbers or contradict each other, or processes of `mpirun`.
    """
    if "RANK" in os.environ:
        return _check(_rank_of_torchrun(), "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE")
    n_task = _read_number("SLURM_STEP_NUM_TASKS", 1)
    n_mpi = {name: _read_number(name, 1) for name in MPI_SIZES}
    if name := next((name for name, n in n_mpi.items() if n > 1 and (name != "PMI_SIZE" or n != n_task)), None):
        raise ValueError(
            f"{name}={n_mpi[name]}: MPI started {n_mpi[name]} processes, each would be a run of its own: start one, "
            "which starts the others (trainer.devices), or take torchrun or srun (docs/clusters.md)"
        )
    if n_task > 1 and os.environ.get("SLURM_STEP_ID") not in NO_STEPS:
        rank = Rank(_read_number("SLURM_PROCID"), _read_number("SLURM_LOCALID"), n_task, _count_local_tasks(n_task))
        return _check(rank, "SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE")
    if _read_number("WORLD_SIZE", 1) > 1:
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, RANK is not: unset it; {STARTERS}")
    return Rank(0, 0, 1, 1)


def _rank_of_torchrun() -> Rank:
    n_local = _read_number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else None  # some starters do not
    return Rank(_read_number("RANK"), _read_number("LOCAL_RANK"), _read_number("WORLD_SIZE"), n_local)


def _count_local_tasks(n_task: int) -> int:
    """Tasks of this job step on this machine, from a list as `4(x2),2`; without it equally many on each."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    groups = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group) for group in counts.split(",")]
    each = [int(group[1]) for group in groups if group for _ in range(int(group[2] or 1))]
    node = _read_number("SLURM_NODEID", 0)
    if None in groups or node >= len(each):
        return n_task // max(1, _read_number("SLURM_STEP_NUM_NODES", 1))
    return each[node]


def _read_number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ValueError(f"{name} is not set, other variables of a rank are: {STARTERS}")
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise ValueError(f"{name}={text!r:.40} is no number of processes: {STARTERS}")
    return int(text)


def _check(rank: Rank, names: str) -> Rank:
    n_local = rank.n_local or rank.count
    if not (rank.index < rank.count and rank.local < n_local <= rank.count and rank.n_local != 0):
        values = [f"{name}={os.environ[name]}" for name in names.split(", ") if name in os.environ]
        raise ValueError(f"{', '.join(values)} cannot be true together: {STARTERS}")
    return rank
