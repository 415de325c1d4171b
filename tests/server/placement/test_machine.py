"""What a process may use, read from made /proc and /sys trees, control groups of both versions, nested or not."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from kernels import native
from server.placement import machine
from server.placement.machine import Gpu, available_bytes, memory_bytes, usable_cores

PROCESSORS = len(os.sched_getaffinity(0))
V1 = "4:cpu,cpuacct:/a/b\n7:memory:/a/b\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, PROCESSORS),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "90000 100000\n",
          "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, PROCESSORS),
        ({"proc/self/cgroup": "0::/seen/from/outside\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "70000",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000", "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, PROCESSORS),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "nonsense\n"}, PROCESSORS),
    ],
)  # fmt: skip
def test_cores_are_cut_by_the_tightest_group_around_the_process(
    tmp_path: Path, files: dict[str, str], wanted: int
) -> None:
    assert usable_cores(write(tmp_path, files)) == wanted


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1000000",
         "sys/fs/cgroup/a/b/memory.max": "max",
         "sys/fs/cgroup/a/memory.current": "400000", "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 100000\n"},
        {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000000",
         "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712",
         "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "400000",
         "sys/fs/cgroup/memory/a/memory.stat": "total_inactive_file 100000\n"},
    ],
)  # fmt: skip
def test_memory_is_cut_likewise_and_file_cache_counts_as_free(tmp_path: Path, files: dict[str, str]) -> None:
    root = write(tmp_path, files | {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n"})
    assert memory_bytes(root) == 1_000_000
    assert available_bytes(root) == 700_000
    (root / "proc/meminfo").write_text("MemAvailable: 500 kB\n")
    assert available_bytes(root) == 512_000


def test_more_threads_than_cores_are_capped_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pool = torch.get_num_threads(), native.num_threads()
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    try:
        with caplog.at_level(logging.WARNING):
            assert machine.compute_with(1) == machine.compute_threads() == 1
            assert not caplog.text
            assert machine.compute_with() == machine.compute_with(7) == 2
        assert "7 threads asked for, 2 cores usable" in caplog.text
    finally:
        torch.set_num_threads(before)
        native.set_num_threads(pool)


def test_without_limits_all_memory_counts(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_instruction_sets_are_read_from_the_first_processor(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "flags\t: fpu avx2 amx_int8\n\nflags\t: avx512f\n"})
    assert machine.instruction_sets(tmp_path) == ["avx2", "amx_int8"]
    assert machine.instruction_sets(tmp_path / "nowhere") == []


def test_the_machine_is_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Gpu("card", 8 * 2**30, 7 * 2**30, 200.0, 5.0, 12.0, 11.0, 9.0, 8.0)
    monkeypatch.setattr(machine, "cpu_limits", lambda: (20.04, 300.0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "measure_gpu", lambda device: card)
    found = json.loads(json.dumps(machine.measure_machine().json()))
    assert found["stream_gb_per_s"] == 20.0 and found["gpus"][0]["to_gb_per_s"] == 12.0
    assert found["cores"] == usable_cores() and 0 < found["available_gb"] <= found["memory_gb"]
