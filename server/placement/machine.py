"""This machine: cores, memory, devices, bandwidths. The one place that looks; launch, plans, benchmarks, doctor ask it.

Cores and memory are what this process may use: affinity and the limits of nested control groups (v1 and v2) count.
torch is imported when something is measured.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SPARE_FILES = 64  # open files that are no connections
# What decides the speed of products on a CPU.
INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
STREAM_BYTES = 256 * 2**20
STREAM_COLUMNS = 8192
STREAM_SAMPLES = 3
TRANSFER_BYTES, LATENCY_BYTES, TRANSFER_SAMPLES = 64 * 2**20, 4096, 7
GPU_SIDE = 2048  # of the square matrices whose product is timed
ROOT = Path("/")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: memory copied and multiply-adds of fp16 products (2 operations each), and its bus.

    Transfers are from and to pinned memory; a latency is that of one small copy, waited for.
    """

    name: str
    memory_bytes: int
    free_bytes: int
    stream_gb_per_s: float
    fp16_tflops: float
    to_gb_per_s: float
    from_gb_per_s: float
    to_latency_us: float
    from_latency_us: float
    index: int = 0


@dataclass(frozen=True)
class Machine:
    """stream_gb_per_s: memory read per second with ``threads`` threads; dot_gmac_per_s: peak of 8-bit multiply-adds.

    memory_gb is the limit of this process, available_gb what is free of it now. dot_gmac_per_s is None without native
    kernels.
    """

    cpu: str
    cores: int
    threads: int
    instruction_sets: list[str]
    memory_gb: float
    available_gb: float
    stream_gb_per_s: float
    dot_gmac_per_s: float | None
    gpus: list[Gpu]
    system: str
    python: str
    torch: str

    def json(self) -> dict[str, Any]:
        """The ``hardware`` object of reports."""
        return dataclasses.asdict(self)


def measure_machine() -> Machine:
    """Look at the machine and measure its bandwidths, for about half a second."""
    import torch

    from kernels.linear_lowbit.bench import cpu_name

    stream, dots = cpu_limits()
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        threads=compute_threads(),
        instruction_sets=instruction_sets(),
        memory_gb=round(memory_bytes() / 1e9, 1),
        available_gb=round(available_bytes() / 1e9, 1),
        stream_gb_per_s=round(stream, 1),
        dot_gmac_per_s=None if dots is None else round(dots, 1),
        gpus=measure_gpus(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
    )


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may use, at least 1: affinity, cut by every control group's quota."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in group_folders(root, "cpu") if (quota := cpu_quota(folder)) is not None]
    return max(1, min([processors, *map(math.ceil, quotas)]))


def cpu_quota(folder: Path) -> float | None:
    """Processors that a control group grants; None where it sets no limit."""
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # "max", or no such controller here
        return None


def group_folders(root: Path, controller: str) -> Iterator[Path]:
    """The process's control groups for ``controller``, v2 and v1, each from the innermost to the outermost.

    A container may see its own group at the mount's top while ``proc`` names the path from outside; folders that are
    not there are passed over, and the top is always among them.
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


def compute_with(threads: int | None = None) -> int:
    """Size torch's threads and the native pool: so many, or all usable cores. More than those only wait; that is said.

    Returns the number.
    """
    import torch

    from kernels.native import set_num_threads

    limit = usable_cores()
    if threads is not None and threads > limit:
        logger.warning("%d threads asked for, %d cores usable: using %d", threads, limit, limit)
    number = min(threads or limit, limit)
    torch.set_num_threads(number)
    set_num_threads(number)
    return number


def compute_threads() -> int:
    """Threads the target computes with: torch's own, or the native pool's where that does the work."""
    import torch

    from kernels.native import num_threads

    return max(torch.get_num_threads(), num_threads())


def instruction_sets(root: Path = ROOT) -> list[str]:
    """Those of ``INSTRUCTION_SETS`` the processor has; empty where the system does not tell."""
    file = root / "proc/cpuinfo"
    first = file.read_text(encoding="utf-8", errors="replace").split("\n\n")[0] if file.is_file() else ""
    fields = {key.strip(): value for key, _, value in (line.partition(":") for line in first.splitlines())}
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return [name for name in INSTRUCTION_SETS if name in present]


def memory_bytes(root: Path = ROOT) -> int:
    """Main memory, cut by the tightest limit of the process's control groups."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([installed, *(limit for _, limit in memory_groups(root))])


def available_bytes(root: Path = ROOT) -> int:
    """What this process may still take: free in the system, and below every control group's limit.

    What a group holds as file cache is given back when it is needed, so it counts as free.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    return max(0, min([free, *(limit - used_bytes(folder) for folder, limit in memory_groups(root))]))


def memory_groups(root: Path) -> list[tuple[Path, int]]:
    """The control groups that limit memory, with their limits in bytes."""
    found = []
    for folder in group_folders(root, "memory"):
        limits = [read_number(folder / name) for name in ("memory.max", "memory.limit_in_bytes")]
        found += [(folder, limit) for limit in limits if limit is not None]
    return found


def used_bytes(folder: Path) -> int:
    """A group's memory in use, its inactive file cache left out."""
    used = read_number(folder / "memory.current") or read_number(folder / "memory.usage_in_bytes") or 0
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        fields = {}
    return used - int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)


def read_number(file: Path) -> int | None:
    """The number in a file; None where there is none, as for "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def connection_limit(wanted: int) -> int:
    """How many connections may be open: as many as wanted, where this process may open so many files.

    Asks for as many files as the system lets it; some stay free for models, pipes and the vision process.
    """
    if os.name != "posix":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if soft < needed and soft != resource.RLIM_INFINITY:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limit = wanted if soft == resource.RLIM_INFINITY else min(wanted, max(soft - SPARE_FILES, soft // 4))
    if limit < wanted:
        logger.warning("%d connections at once instead of %d: this process may open %d files", limit, wanted, soft)
    return limit


def cpu_limits() -> tuple[float, float | None]:
    """GB/s of streaming, and 1e9 multiply-adds/s of 8-bit dot products (None without native kernels): best samples."""
    from kernels.linear_lowbit.bench import Limits
    from kernels.native import library

    if library() is None:
        return torch_stream_gb_per_s(), None
    limits = Limits()
    for _ in range(STREAM_SAMPLES):
        limits.measure()
    return max(limits.stream), max(limits.dots)


def torch_stream_gb_per_s(seconds: float = 0.3, num_bytes: int = STREAM_BYTES) -> float:
    """The best rate, over ``seconds``, at which torch reads a matrix beyond all caches, for a product with a vector."""
    import torch

    matrix = torch.ones(num_bytes // 4 // STREAM_COLUMNS, STREAM_COLUMNS)
    vector = torch.ones(STREAM_COLUMNS)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - started)
    return matrix.numel() * 4 / best / 1e9


def measure_gpus() -> list[Gpu]:
    """Every CUDA device; one that fails, or has no memory left to measure it in, is left out with a warning."""
    import torch

    from server.placement.devices import is_device_failure

    found = []
    for index in range(torch.cuda.device_count()):
        try:
            found.append(measure_gpu(torch.device("cuda", index)))
        except RuntimeError as error:
            if not is_device_failure(error):
                raise
            logger.warning("cuda:%d cannot be measured: %s: %s", index, type(error).__name__, error)
    return found


def measure_gpu(device: torch.device) -> Gpu:
    """A CUDA device's memory, and its bus each way."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    there = torch.zeros(TRANSFER_BYTES, dtype=torch.uint8, device=device)
    factor = torch.zeros(GPU_SIDE, GPU_SIDE, dtype=torch.float16, device=device)
    here = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, pin_memory=True)

    def seconds(num_bytes: int, copy: Callable[[int], object]) -> float:
        samples = []
        for _ in range(TRANSFER_SAMPLES + 1):  # the first one warms up
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            copy(num_bytes)
            torch.cuda.synchronize(device)
            samples.append(time.perf_counter() - started)
        return statistics.median(samples[1:])

    def double(n: int) -> object:
        return there[:n].clone()

    def multiply(_: int) -> object:
        return factor @ factor

    def send(n: int) -> object:
        return there[:n].copy_(here[:n], non_blocking=True)

    def fetch(n: int) -> object:
        return here[:n].copy_(there[:n], non_blocking=True)

    return Gpu(
        name=torch.cuda.get_device_name(device),
        memory_bytes=total,
        free_bytes=free,
        stream_gb_per_s=round(2 * TRANSFER_BYTES / seconds(TRANSFER_BYTES, double) / 1e9, 1),
        fp16_tflops=round(2 * GPU_SIDE**3 / seconds(0, multiply) / 1e12, 1),
        to_gb_per_s=round(TRANSFER_BYTES / seconds(TRANSFER_BYTES, send) / 1e9, 2),
        from_gb_per_s=round(TRANSFER_BYTES / seconds(TRANSFER_BYTES, fetch) / 1e9, 2),
        to_latency_us=round(seconds(LATENCY_BYTES, send) * 1e6, 1),
        from_latency_us=round(seconds(LATENCY_BYTES, fetch) * 1e6, 1),
        index=device.index or 0,
    )
