"""How many CPU cores there are for this process."""

import math
import os
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")  # which control groups this process is in, a hierarchy a line
MOUNT = Path("/sys/fs/cgroup")


def count_cores() -> int:
    """CPU cores that this process may use, at least 1.

    Those of its affinity, or of the machine where the system keeps none (macOS), and no more than the CPU time that its
    control group is granted (containers), rounded up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(min(_quota(), cores))))


def _quota() -> float:
    """Cores' worth of CPU time that this process's control group, or one above it, is limited to; infinite: none."""
    limits = [math.inf]
    for line in _words(GROUPS, "\n"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (MOUNT / controllers, MOUNT / "cpu") if controllers else (MOUNT, MOUNT / "unified"):
            inner = mount / group.strip("/")  # is not there where a container sees its own group as the root
            for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(mount))):
                limits.append(_limit(folder))
    return min(limits)


def _limit(folder: Path) -> float:
    """Cores' worth of CPU time of one control group: version 2, else version 1."""
    words = _words(folder / "cpu.max") or [
        *_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")
    ]  # fmt: skip
    try:
        quota, period = map(int, words)
    except ValueError:  # max, or nothing there
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf  # -1: no limit


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return path.read_text().strip().split(separator)
    except OSError:
        return []
