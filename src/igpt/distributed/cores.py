"""Number of CPU cores available to this process."""

import math
import os
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")  # control groups of this process, one hierarchy per line
MOUNT = Path("/sys/fs/cgroup")


def count_cores() -> int:
    """CPU cores that this process may use, at least 1.

    Those of its affinity mask, or of the machine on systems without one (macOS), limited by the CPU quota of its
    control group (containers), rounded up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
