"""glibc's heaps: how many there are, and giving back what a moment took. Other C libraries have no such heaps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

M_ARENA_MAX, NUM_ARENAS = -8, 2  # of glibc's malloc.h

Result = TypeVar("Result")


def share_arenas() -> None:
    """Have all threads allocate from a few heaps.

    glibc gives eight to a processor, each of which keeps what its busiest moment took: under load the server's memory
    grew by a tenth for it. The variable ``MALLOC_ARENA_MAX`` goes before.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, NUM_ARENAS)


def and_give_back(work: Callable[..., Result], *arguments: Any) -> Result:
    """Run ``work``, which takes much memory for a moment, and give the system what it leaves: a long text's tokens take
    a hundred times its bytes, and the heaps would keep that."""
    try:
        return work(*arguments)
    finally:
        if sys.platform == "linux":
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
