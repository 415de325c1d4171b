import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import linear_lowbit

COMPILER, EMULATOR = (
    shutil.which("aarch64-linux-gnu-g++"),
    shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64"),
)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER or not EMULATOR, reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
def test_arm_kernels_equal_the_portable_ones_under_emulation(tmp_path: Path) -> None:
    assert COMPILER and EMULATOR
    sources = Path(linear_lowbit.__file__).parent / "csrc"
    program = tmp_path / "arm_twin"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-static", "-pthread", f"-I{sources}"]
    files = [str(Path(__file__).with_name("arm_twin.cpp")), *map(str, sorted(sources.glob("*.cpp")))]
    subprocess.run([COMPILER, *flags, *files, "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", str(program)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal" and done.returncode == 0, done.stdout + done.stderr
