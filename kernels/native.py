"""The shared object with the native kernels: found, checked, loaded once; absent where no compiler was at hand.

It is built with the install (see `setup.py`), holds every instruction set and chooses at load. All calls go through
ctypes, which releases the interpreter's lock while native code runs.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

logger = logging.getLogger(__name__)

ABI = 8  # what `dovetail_abi` of a library built from the same sources answers
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


PARTS = (  # `Part` of csrc/profile.h
    "norms", "quantising", "products", "rope", "attention", "activation", "head", "waiting", "outside",
)  # fmt: skip
_MOST_THREADS = 256


class PackedDescriptor(ctypes.Structure):
    """`struct Packed` of csrc/layout.h."""

    _fields_ = [
        ("data", _POINTER), ("out_features", _INT64), ("in_features", _INT64),
        ("bits", ctypes.c_int32), ("group", ctypes.c_int32), ("kind", ctypes.c_int32), ("scale_bytes", ctypes.c_int32),
        ("table", ctypes.c_int8 * 16),
    ]  # fmt: skip


_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "dovetail_abi": ([], ctypes.c_int),
    "dovetail_instruction_set": ([], ctypes.c_char_p),
    "dovetail_available_instruction_set": ([ctypes.c_int], ctypes.c_char_p),
    "dovetail_choose_instruction_set": ([ctypes.c_char_p], ctypes.c_int),
    "dovetail_set_threads": ([ctypes.c_int], None),
    "dovetail_threads": ([], ctypes.c_int),
    "dovetail_packed_bytes": ([ctypes.POINTER(PackedDescriptor)], _INT64),
    "dovetail_decoder_layers": ([_POINTER, _INT64, _POINTER, _POINTER, _POINTER], None),
    "dovetail_normalise": (
        [*[_POINTER] * 3, ctypes.c_int, ctypes.c_float, _INT64, _INT64, _POINTER],
        None,
    ),
    "dovetail_argmax": ([ctypes.POINTER(PackedDescriptor), _POINTER, _INT64, _POINTER, _POINTER], None),
    "dovetail_top_k": ([ctypes.POINTER(PackedDescriptor), _POINTER, _INT64, _INT64, _POINTER, _POINTER], None),
    "dovetail_draft_observe": ([*[_POINTER] * 4, _INT64, _POINTER, _POINTER, _POINTER], None),
    "dovetail_draft_trees": ([_POINTER, _POINTER, _INT64, *[_POINTER] * 5], None),
    "dovetail_stream": ([_POINTER, _INT64], ctypes.c_uint64),
    "dovetail_dots": ([_INT64], _INT64),
    "dovetail_profile": ([ctypes.c_int], None),
    "dovetail_profile_times": ([_POINTER, ctypes.c_int], ctypes.c_int),
    "dovetail_linear": ([ctypes.POINTER(PackedDescriptor), _POINTER, _INT64, _POINTER], None),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The native kernels, or None where they are not built; says once in the log which it is, and why."""
    folder = Path(__file__).resolve().parent
    path = next((file for suffix in EXTENSION_SUFFIXES if (file := folder / f"_native{suffix}").exists()), None)
    if path is None:
        logger.warning(
            "native kernels are not built: int8 and int4 targets run on torch's own products, about 1.5 times slower "
            "at one row and 4 times at sixteen. With a C++20 compiler at hand, `pip install --editable .` builds them."
        )
        return None
    native = ctypes.CDLL(str(path))
    if (abi := native.dovetail_abi()) != ABI:
        logger.warning(
            "%s was built from other sources (interface %d, wanted %d): the plain torch reference stands in, tens of "
            "times slower. `pip install --editable .` builds it anew.", path.name, abi, ABI,
        )  # fmt: skip
        return None
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(native, name)
        function.argtypes, function.restype = arguments, result
    native.dovetail_set_threads(_processors())
    logger.info("native kernels: %s, %d threads", native.dovetail_instruction_set().decode(), native.dovetail_threads())
    return native


def available_instruction_sets() -> list[str]:
    """Names of the instruction sets that processor and build offer, fastest first; empty without native kernels."""
    native = library()
    names: list[str] = []
    while native is not None and (name := native.dovetail_available_instruction_set(len(names))) is not None:
        names.append(name.decode())
    return names


def instruction_set() -> str:
    """Name of the instruction set in use; "reference" without native kernels."""
    native = library()
    return "reference" if native is None else str(native.dovetail_instruction_set().decode())


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Forces an instruction set, for tests and benchmarks."""
    native, before = library(), instruction_set()
    if native is None or native.dovetail_choose_instruction_set(name.encode()) != 0:
        raise ValueError(
            f"no instruction set {name!r} here; available: {', '.join(available_instruction_sets()) or 'none'}"
        )
    try:
        yield
    finally:
        native.dovetail_choose_instruction_set(before.encode())


@contextmanager
def profiled() -> Iterator[list[dict[str, float]]]:
    """Counts where threads spend their time; gives, once done, each thread's milliseconds by part of `PARTS`.

    "waiting": at barriers and for work; "outside": between two calls, which other threads than the caller's count as
    waiting. Empty without native kernels. Not to be nested.
    """
    native = library()
    threads: list[dict[str, float]] = []
    if native is not None:
        native.dovetail_profile(1)
    try:
        yield threads
    finally:
        if native is not None:
            native.dovetail_profile(0)
            times = (_INT64 * (_MOST_THREADS * len(PARTS)))()
            count = native.dovetail_profile_times(ctypes.addressof(times), _MOST_THREADS)
            rows = (times[i * len(PARTS) : (i + 1) * len(PARTS)] for i in range(count))
            spent = ({part: ns / 1e6 for part, ns in zip(PARTS, row, strict=True)} for row in rows)
            threads += [parts for parts in spent if any(parts.values())]


def num_threads() -> int:
    """Threads that the native kernels compute with, the caller's included; 1 without native kernels."""
    native = library()
    return 1 if native is None else int(native.dovetail_threads())


def set_num_threads(count: int) -> int:
    """Resizes the pool and returns its size; how many are worth starting the caller knows, quotas are not read here."""
    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    if (native := library()) is not None:
        native.dovetail_set_threads(count)
    return num_threads()


def _processors() -> int:
    """Processors this process is bound to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
