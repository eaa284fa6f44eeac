"""For how long OpenMP's threads spin, and how many there are: in the processes of real commands, before PyTorch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from igpt.distributed import process_state
from igpt.distributed.cores import count_physical_cores
from igpt.distributed.process_state import num_threads, one_thread_per_core
from igpt.distributed.spinning import SPIN_LIMITS, SPIN_VARIABLES
from igpt.run import launch
from tests.conftest import ROOT
from tests.distributed.test_launcher import a_sweep

RUNTIME = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
# notes what a process was told as it imports PyTorch; a rank, which would train, ends there
NOTE = """
import os, sys
from importlib.abc import MetaPathFinder

class Note(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            told = [os.environ.get(key, "none") for key in ("RANK", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")]
            with open(os.environ["NOTES"], "a") as file:
                file.write(" ".join(told) + chr(10))
            if "RANK" in os.environ:
                os._exit(0)

sys.meta_path.insert(0, Note())
"""


def without_choice(**more: str) -> dict[str, str]:
    """The environment of a user who has set nothing but `more`."""
    unset = (*SPIN_VARIABLES, *process_state.THREAD_VARIABLES)
    return {**{name: value for name, value in os.environ.items() if name not in unset}, **more}


@pytest.mark.skipif(RUNTIME is None, reason="PyTorch has no libgomp here")
@pytest.mark.parametrize(
    ("before", "given", "count"),
    [
        ("import igpt", {}, SPIN_LIMITS["GOMP_SPINCOUNT"]),
        ("import igpt", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("import igpt", {"OMP_WAIT_POLICY": "passive"}, "0"),
        ("import igpt", {"KMP_BLOCKTIME": "5"}, "300000"),
        ("import sys; sys.modules['torch'] = sys; import igpt", {}, "300000"),  # too late: nothing is changed
    ],
)
def test_openmp_itself_tells_how_long_it_spins(before: str, given: dict[str, str], count: str) -> None:
    """Independent source: libgomp's own report of its settings; 300,000 is its documented default."""
    code = f"{before}; import ctypes; ctypes.CDLL({str(RUNTIME)!r})"
    environment = without_choice(OMP_DISPLAY_ENV="verbose", **given)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
    assert done.stdout == ""


def test_a_command_and_its_ranks_know_it_before_pytorch_is_imported(tmp_path: Path) -> None:
    """Invariant: one count in all ranks of a real command; they share out the cores."""
    (tmp_path / "sitecustomize.py").write_text(NOTE)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = without_choice(PYTHONPATH=paths, NOTES=str(tmp_path / "notes"))
    command = [sys.executable, str(ROOT / "train.py"), "trainer=ddp", "trainer.devices=2"]
    subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=170, check=True)
    threads = str(max(1, count_physical_cores() // 2))
    expected = [f"{rank} {SPIN_LIMITS['GOMP_SPINCOUNT']} {threads}" for rank in (0, 1)]
    assert sorted((tmp_path / "notes").read_text().splitlines()) == expected


def test_jobs_of_a_sweep_have_the_choice_of_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a value that was set before the sweep is that of its jobs, and only one for threads is added."""
    for variable in (*SPIN_VARIABLES, *process_state.THREAD_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    names = (*SPIN_VARIABLES, *process_state.THREAD_VARIABLES)  # scikit-learn sets others of Intel's runtime
    code = f"import igpt, os; print({{k: v for k, v in os.environ.items() if k in {names}}})"
    a_sweep(tmp_path, "", n_jobs=1).run([sys.executable, "-c", code])
    told = (tmp_path / "sweep" / "job_000.txt").read_text().splitlines()[-1]
    assert ast.literal_eval(told) == {"GOMP_SPINCOUNT": "77", "OMP_NUM_THREADS": str(count_physical_cores())}


def test_a_run_has_a_thread_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: fewer threads than PyTorch would take, never more, and as many as before once the run has ended."""

    def stop(config: object) -> None:
        raise ValueError(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(launch, "check_structure", stop)
    for variable in process_state.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with num_threads(3):
        for cores, expected in ((2, 2), (3, 3), (8, 3)):
            monkeypatch.setattr(process_state, "count_physical_cores", lambda cores=cores: cores)
            with pytest.raises(ValueError, match=f"^{expected} threads$"):
                launch.run()
            assert torch.get_num_threads() == 3
        monkeypatch.setattr(process_state, "count_physical_cores", lambda: 1)
        for variable in process_state.THREAD_VARIABLES:
            monkeypatch.setenv(variable, "3")
            with one_thread_per_core():
                assert torch.get_num_threads() == 3
            monkeypatch.delenv(variable)
