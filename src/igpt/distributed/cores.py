"""Number of CPU cores, with and without hardware threads, available to this process."""

import math
import os
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")  # control groups of this process, one hierarchy per line
MOUNT = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")


def count_cores() -> int:
    """CPU cores that this process may use, hardware threads (SMT) included, at least 1.

    Those of its affinity mask, or of the machine on systems without one (macOS), limited by the CPU quota of its
    control group (containers), rounded up.
    """
    return _limit_by_quota(len(_list_cpus()))


def count_physical_cores() -> int:
    """As `count_cores`, hardware threads of the same core counted once: threads that compute gain nothing from two."""
    return _limit_by_quota(len({_read_core(cpu) for cpu in _list_cpus()}))


def _list_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read_core(cpu: int) -> str:
    """The hardware threads of the core of this one, as the kernel lists them (`0,4`); itself on other systems."""
    topology = CPUS / f"cpu{cpu}" / "topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second: before Linux 5.3
        if threads := _read_words(topology / name):
            return threads[0]
    return str(cpu)


def _limit_by_quota(cores: int) -> int:
    return max(1, min(cores, math.ceil(min(_read_quota(), cores))))


def _read_quota() -> float:
    """CPU quota, in cores, of this process's control group and its parents; infinite without a limit."""
    limits = [math.inf]
    for line in _read_words(GROUPS, "\n"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (MOUNT / controllers, MOUNT / "cpu") if controllers else (MOUNT, MOUNT / "unified"):
            inner = mount / group.strip("/")  # missing in a container, which sees its own group as the root
            for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(mount))):
                limits.append(_read_limit(folder))
    return min(limits)


def _read_limit(folder: Path) -> float:
    """CPU quota, in cores, of one control group: of version 2, else of version 1."""
    words = _read_words(folder / "cpu.max") or [
        *_read_words(folder / "cpu.cfs_quota_us"), *_read_words(folder / "cpu.cfs_period_us")
    ]  # fmt: skip
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or no such file
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf  # -1: no limit


def _read_words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return path.read_text().strip().split(separator)
    except OSError:
        return []
