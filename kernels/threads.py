"""How many threads this process may really use: processor affinity, capped by the control groups' quotas.

The lowest layer reads this because its thread pool needs it; ``server.placement.machine`` asks here.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_threads(root: Path = Path("/")) -> int:
    """Threads worth starting, at least 1: usable processors, fewer where a control group (v1 or v2) grants less time.

    `root` is where `proc` and `sys` lie.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in group_folders(root, "cpu") if (quota := _quota(folder)) is not None]
    return max(1, min([processors, *map(math.ceil, quotas)]))


def group_folders(root: Path, controller: str) -> Iterator[Path]:
    """The process's control groups for `controller`, v2 and v1, each from the innermost to the outermost.

    A container may see its own group at the mount's top while `proc` names the path from outside; folders that are not
    there are passed over, and the top is always among them.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for number, names, path in [*fields, ("0", "", "/"), ("1", controller, "/")]:
        if number == "0" and not names:
            base = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = base / path.strip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(base) and folder.is_dir())


def _quota(folder: Path) -> float | None:
    """Processors that a group grants; None where it sets no limit."""
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # "max", or no such controller here
        return None
