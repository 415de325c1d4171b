"""How many threads this process may really use: processor affinity, capped by the control group's quota."""

import math
import os
from pathlib import Path


def available_threads(root: Path = Path("/")) -> int:
    """Threads worth starting, at least 1: usable processors, fewer where a cgroup (v1 or v2) grants less time.

    `root` is where `proc` and `sys` lie.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min((limit for limit in (_quota_v2(root), _quota_v1(root)) if limit is not None), default=math.inf)
    return max(1, min(processors, math.ceil(quota) if quota < processors else processors))


def _quota_v2(root: Path) -> float | None:
    """Smallest `cpu.max` from the process's group up to the root, in processors."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    base = root / "sys/fs/cgroup"
    group = base / path.strip("/")
    limits = []
    for folder in (group, *group.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            quota, period = "max", "1"
        if quota != "max":
            limits.append(int(quota) / int(period))
        if folder == base:
            break
    return min(limits, default=None)


def _quota_v1(root: Path) -> float | None:
    folder = root / "sys/fs/cgroup/cpu"
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
