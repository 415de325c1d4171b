import logging
import os
from pathlib import Path

import pytest

from kernels import native
from kernels.threads import available_threads

PROCESSORS = len(os.sched_getaffinity(0))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, PROCESSORS),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, PROCESSORS),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "90000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, PROCESSORS),
    ],
)
def test_threads_follow_the_quota(tmp_path: Path, files: dict[str, str], wanted: int) -> None:
    assert available_threads(write(tmp_path, files)) == wanted


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
def test_more_threads_than_processors_are_capped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    before = native.num_threads()
    with caplog.at_level(logging.WARNING):
        assert native.set_num_threads(PROCESSORS + 5) == available_threads()
    assert "usable" in caplog.text
    assert native.set_num_threads(1) == 1
    native.set_num_threads(before)
    with pytest.raises(ValueError, match="at least 1"):
        native.set_num_threads(0)


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    with (
        pytest.raises(ValueError, match="no instruction set 'mmx' here; available:"),
        native.use_instruction_set("mmx"),
    ):
        pass
