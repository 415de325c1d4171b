"""Triton's kernels, under its interpreter on a machine without a GPU.

The interpreter has to be chosen before anything imports Triton, and other libraries do; hence a process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with CUDA builds of torch)")
def test_kernels_equal_the_reference() -> None:
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=os.environ | interpreter, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
