"""The native thread pool beside other work: what is computed stays the same, and nothing waits for ever."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kernels.linear_lowbit import PackedWeight, linear, pack
from kernels.native import available_instruction_sets, library

pytestmark = pytest.mark.skipif(not available_instruction_sets(), reason="the native kernels are not built")

PROCESSORS = sorted(os.sched_getaffinity(0))


@contextmanager
def pool_of(threads: int) -> Iterator[None]:
    """A pool of any size, more threads than processors included."""
    native = library()
    assert native is not None
    before = native.dovetail_threads()
    native.dovetail_set_threads(threads)
    try:
        yield
    finally:
        native.dovetail_set_threads(before)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def product() -> tuple[torch.Tensor, PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(1000, 256, generator=generator), 8)
    return torch.randn(5, 256, generator=generator), packed


def test_rows_are_the_same_beside_busy_processes_whatever_the_pool(product: tuple[torch.Tensor, PackedWeight]) -> None:
    x, packed = product
    with pool_of(1):
        wanted = linear(x, packed)
    with busy_processes(2 * len(PROCESSORS)):
        for threads in (2, 5, 3):
            with pool_of(threads):
                for _ in range(200):
                    assert torch.equal(linear(x, packed), wanted)


def test_an_affinity_mask_that_changes_while_running(product: tuple[torch.Tensor, PackedWeight]) -> None:
    x, packed = product
    with pool_of(1):
        wanted = linear(x, packed)
    try:
        with pool_of(4):
            for mask in ({PROCESSORS[0]}, set(PROCESSORS), {PROCESSORS[-1]}, set(PROCESSORS)):
                os.sched_setaffinity(0, mask)
                for _ in range(50):
                    assert torch.equal(linear(x, packed), wanted)
    finally:
        os.sched_setaffinity(0, PROCESSORS)


def test_callers_on_several_threads_wait_for_each_other(product: tuple[torch.Tensor, PackedWeight]) -> None:
    x, packed = product
    with pool_of(3):
        wanted, wrong = linear(x, packed), []

        def call() -> None:
            wrong.extend(1 for _ in range(100) if not torch.equal(linear(x, packed), wanted))

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not wrong


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's list of threads")
def test_a_forked_child_starts_threads_only_when_it_computes(product: tuple[torch.Tensor, PackedWeight]) -> None:
    x, packed = product
    with pool_of(3):
        wanted = linear(x, packed)
        child = os.fork()
        if child == 0:  # no exception may leave the child: it would run the rest of the tests
            status = 1
            try:
                threads_at_first = len(os.listdir("/proc/self/task"))
                equal = torch.equal(linear(x, packed), wanted)
                status = 0 if threads_at_first == 1 and equal and len(os.listdir("/proc/self/task")) == 3 else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
