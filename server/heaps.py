"""Memory beside what a model takes: glibc's heaps, how many there are and giving back what a moment took (other C
libraries have no such heaps), and what Python's collector walks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Take no garbage's cycles apart while modules and a model are loaded, and never look at what is there then again.

    Next to all of it stays: collections took an eighth of the processor's time for the imports, and every full one
    afterwards would walk all of transformers' and the model's objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.collect()
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
