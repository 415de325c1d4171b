"""Several processes of one run, as torchrun starts them: who prepares what all of them read.

Answers hold before any process group exists, from the variables torchrun sets. Waiting is for files, not at a barrier:
preparing may take hours, and a process that dies while the others wait is torchrun's to notice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

POLL_S = 0.5


def num_processes() -> int:
    """Processes of this run on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process writes what the run keeps; true without torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_until(is_ready: Callable[[], bool], poll_s: float = POLL_S) -> None:
    """Sleep until the first process has prepared something; it must appear in one piece."""
    while not is_ready():
        time.sleep(poll_s)
