"""The tests on a fake second device, in a process of their own: torch keeps such a device until its process ends."""

import os
import subprocess
import sys

import pytest
from conftest import ON_FAKE_DEVICE


@pytest.mark.timeout(600)
def test_everything_on_a_fake_device() -> None:
    names = [str(file) for file in ON_FAKE_DEVICE]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *names],
        env=os.environ | {"FAKE_DEVICE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
