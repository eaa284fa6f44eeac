"""How many cores there are, and a run where the system cannot say it: what Linux has and macOS has not, taken away."""

import os
from pathlib import Path

import numpy as np
import pytest

from igpt.data import cache
from igpt.distributed import cores
from igpt.run.launch import run
from tests.conftest import ROOT
from tests.data.test_cache import ROWS, make

LINUX_ONLY = ("sched_getaffinity", "sched_setaffinity", "posix_fallocate", "posix_fadvise")


def written(place: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 12),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),  # 2.5 cores' worth of time: three can be kept busy in turn
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),  # the one above limits
        ("0::/docker/123\n", {"cpu.max": "400000 100000\n"}, 4),  # a container that sees its own group as the root
        ("4:memory:/x\n3:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu,io:/\n", {"cpu,io/cpu.cfs_quota_us": "300000", "cpu,io/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpuacct,cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 12),
        ("3:cpuset:/\n", {"cpuset/cpu.max": "100000 100000"}, 12),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 12),  # more than there are
        ("", {}, 12),
    ],
)  # fmt: skip
def test_no_more_than_the_control_group_grants(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent source: the kernel's documentation of cpu.max (cgroup v2) and cpu.cfs_quota_us (v1), by hand."""
    written(tmp_path / "mount", files)
    written(tmp_path, {"cgroup": groups})
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert cores.count_cores() == expected


def test_affinity_comes_before_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "GROUPS", Path("nowhere"))
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert cores.count_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.count_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.count_cores() == 1


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
@pytest.mark.parametrize(
    ("mask", "quota", "expected"),
    [
        ({0, 1, 2, 3, 4, 5, 6, 7}, "max", 4),
        ({0, 4}, "max", 1),
        ({0, 1, 4}, "max", 2),
        ({5, 6}, "max", 2),
        ({0, 1, 2, 3, 4, 5, 6, 7}, "300000", 3),
        ({0, 1, 4}, "600000", 2),
        ({8, 9}, "max", 2),  # the system does not tell their cores
    ],
)
def test_hardware_threads_of_a_core_count_once(
    name: str, mask: set[int], quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: four cores of two hardware threads, i and i + 4, as Linux numbers them, since 5.3 and before."""
    written(tmp_path, {f"cpu{i}/topology/{name}": f"{i % 4},{i % 4 + 4}\n" for i in range(8)})
    written(tmp_path, {"cgroup": "0::/\n", "mount/cpu.max": f"{quota} 100000\n"})
    monkeypatch.setattr(cores, "CPUS", tmp_path)
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: mask, raising=False)
    assert cores.count_physical_cores() == expected
    assert cores.count_cores() == min(len(mask), {"max": 99, "300000": 3, "600000": 6}[quota])


def test_without_what_only_linux_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a run trains, and more images than one process makes are decoded, as they are on macOS."""
    for name in LINUX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    places = (f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}")
    tiny = ("model=igpt_nano", "model.n_layer=1", "model.n_embd=16", "task.batch_size=8", "task.steps=2")
    result, folder = run(
        *tiny, "task.warmup_steps=0", "callbacks=none", "trainer=cpu", *places, conf=ROOT / "conf"
    )  # fmt: skip
    assert folder is not None
    assert (folder / "result.json").is_file()
    assert 0 < result.numbers["val/loss_gen"].value < 10
    assert np.array_equal(cache.load_pixels(tmp_path / "p.npy", ROWS, 4, make), make(ROWS.tolist()))
