"""The machine a figure was measured on."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.native import num_threads
from server.launch import num_usable_cores

# What decides the speed of products on a CPU.
INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
STREAM_BYTES = 256 * 2**20
STREAM_COLUMNS = 8192


@dataclass(frozen=True)
class Hardware:
    """stream_gb_per_s: weights read per second by matrix-vector products, with ``threads`` threads."""

    cpu: str
    cores: int
    threads: int
    instruction_sets: list[str]
    memory_gb: float
    stream_gb_per_s: float
    gpus: list[str]
    system: str
    python: str
    torch: str

    def json(self) -> dict[str, Any]:
        """The ``hardware`` object of reports."""
        return dataclasses.asdict(self)


def measure_hardware() -> Hardware:
    """Look at the machine and measure its bandwidth, for about a third of a second."""
    return Hardware(
        cpu=cpu_model(),
        cores=num_usable_cores(),
        threads=compute_threads(),
        instruction_sets=instruction_sets(),
        memory_gb=round(memory_bytes() / 1e9, 1),
        stream_gb_per_s=round(stream_gb_per_s(), 1),
        gpus=list_gpus(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
    )


def compute_threads() -> int:
    """Threads the target computes with: torch's own, or the native pool's where that does the work."""
    return max(torch.get_num_threads(), num_threads())


def cpu_fields() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return {}
    first = file.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those of ``INSTRUCTION_SETS`` the processor has; empty where the system does not tell."""
    fields = cpu_fields()
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return [name for name in INSTRUCTION_SETS if name in present]


def memory_bytes() -> int:
    """Main memory, cut by the cgroup's limit where one is set."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
        return min(total, int(text))
    return total


def list_gpus() -> list[str]:
    """Names of the CUDA devices torch can use."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def stream_gb_per_s(seconds: float = 0.3, num_bytes: int = STREAM_BYTES) -> float:
    """The best rate, over ``seconds``, at which a matrix larger than the caches is read for a product with a vector.

    Plain decoding reads every weight once a token in just this way, so bandwidth over bytes of weights is its ceiling.
    """
    matrix = torch.ones(num_bytes // 4 // STREAM_COLUMNS, STREAM_COLUMNS)
    vector = torch.ones(STREAM_COLUMNS)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - started)
    return matrix.numel() * 4 / best / 1e9
