"""A second device that is none: CPU tensors behind a wrapper that torch sees on ``fake:0``.

It does what an accelerator does and a second CPU would not: operations that mix its tensors with the CPU's are refused,
what crosses is counted in bytes (in the type of this side, as CUDA copies do it), memory has an end, and it can die at
any operation. Time is counted, not slept. torch's kernels for the CPU compute, at the CPU's speed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake"
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class DeviceLost(torch.AcceleratorError):
    """What a driver's failure looks like."""


@dataclass
class FakeDevice:
    """The device's state and what it counted.

    limit: bytes it holds; up_bytes, down_bytes: moved from and to the CPU, in up_copies and down_copies; used and peak:
    bytes of its tensors; dies_at: the number of the operation that it dies at, None lives; gb_per_s, latency_s: of its
    bus, for the time that transfers would have taken (bus_s).
    """

    limit: int = 1 << 40
    dies_at: int | None = None
    gb_per_s: float = 10.0
    latency_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    up_copies: int = 0
    down_copies: int = 0
    used: int = 0
    peak: int = 0
    operations: int = 0
    dead: bool = False
    held: dict[int, int] = field(default_factory=dict)

    @property
    def bus_s(self) -> float:
        """Seconds that the transfers so far would have taken."""
        copies = self.up_copies + self.down_copies
        return copies * self.latency_s + (self.up_bytes + self.down_bytes) / self.gb_per_s / 1e9

    def operate(self) -> None:
        """Count an operation; die where that is due."""
        self.operations += 1
        self.dead = self.dead or (self.dies_at is not None and self.operations >= self.dies_at)
        if self.dead:
            raise DeviceLost("fake error: the device has fallen off the bus")

    def hold(self, raw: Tensor) -> None:
        """Count a tensor's memory, once for each storage, until that is freed."""
        storage = raw.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or key in self.held:
            return
        if self.used + size > self.limit:
            raise torch.OutOfMemoryError(
                f"fake out of memory: {self.used} bytes of {self.limit} used, {size} asked for"
            )
        self.used += size
        self.peak = max(self.peak, self.used)
        self.held[key] = size
        weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        """A storage is gone."""
        self.used -= self.held.pop(key)

    def cross(self, up: bool, num_bytes: int) -> None:
        """Count a copy over the bus."""
        if up:
            self.up_bytes, self.up_copies = self.up_bytes + num_bytes, self.up_copies + 1
        else:
            self.down_bytes, self.down_copies = self.down_bytes + num_bytes, self.down_copies + 1


current = FakeDevice()


class FakeTensor(Tensor):
    """A tensor on the device; ``raw`` is where its numbers lie."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> FakeTensor:
        """Wrap; views of one tensor share memory as their raw tensors do."""
        current.hold(raw)
        with torch.inference_mode(raw.is_inference()):  # a view is an inference tensor where its base is one
            made: FakeTensor = Tensor._make_wrapper_subclass(
                cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=NAME
            )
        made.raw = raw
        return made

    def __repr__(self) -> str:
        """The numbers, and where they claim to be."""
        return f"FakeTensor({self.raw})"

    def tolist(self) -> Any:
        """torch refuses to do this for subclasses."""
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        """Every operation with one of these tensors."""
        return operate(operation, arguments, options or {})


def operate(operation: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """Refuse, count, compute on the raw tensors, and wrap what stays on the device."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
        return operation.decompose(*arguments, **options)  # inference mode does not take these apart by itself
    current.operate()
    leaves = tree_flatten((arguments, options))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    fakes = {id(leaf.raw): leaf for leaf in tensors if isinstance(leaf, FakeTensor)}
    stays = count_copies(operation, arguments, options, tensors, bool(fakes))
    raw_arguments, raw_options = tree_map(unwrapped, (arguments, options))
    result = operation(*raw_arguments, **raw_options)
    if not stays:
        return result

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return fakes[id(leaf)] if id(leaf) in fakes else FakeTensor(leaf)

    return tree_map(wrapped, result)


def count_copies(
    operation: Any, arguments: Any, options: dict[str, Any], tensors: list[Tensor], any_fake: bool
) -> bool:
    """Whether the result is on the device; what an operation moves is counted, mixing devices otherwise refused."""
    wanted = options.get("device")
    on_cpu = [t for t in tensors if not isinstance(t, FakeTensor) and t.dim() > 0]
    if operation is torch.ops.aten._to_copy.default:
        (source,) = tensors
        stays = isinstance(source, FakeTensor) if wanted is None else wanted.type == NAME
        if stays != isinstance(source, FakeTensor):
            size = torch.empty((), dtype=options.get("dtype") or source.dtype).element_size()
            current.cross(stays, source.numel() * (size if stays else source.element_size()))
        return stays
    if operation is torch.ops.aten.copy_.default:
        target, source = arguments[:2]
        if isinstance(target, FakeTensor) != isinstance(source, FakeTensor):
            on_device = target if isinstance(target, FakeTensor) else source
            current.cross(on_device is target, on_device.numel() * on_device.element_size())
        return isinstance(target, FakeTensor)
    if operation is torch.ops.aten._local_scalar_dense.default:
        current.cross(False, tensors[0].element_size())
        return False
    if operation in INDEXING:  # CUDA takes indices of the CPU and moves them
        for index in on_cpu:
            current.cross(True, index.numel() * index.element_size())
        return True
    if any_fake and on_cpu:
        raise RuntimeError(f"Expected all tensors to be on the same device: {operation} got {NAME}:0 and cpu")
    return any_fake or wanted is not None


def unwrapped(leaf: Any) -> Any:
    """The raw tensor, and the CPU for the device."""
    if isinstance(leaf, FakeTensor):
        return leaf.raw
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


def create(operation: Any, *arguments: Any, **options: Any) -> Any:
    """What torch calls for ``torch.zeros(..., device="fake")``."""
    return operate(operation, arguments, options)


_setup_privateuseone_for_python_backend(NAME)
EVERYTHING, COPIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
EVERYTHING.fallback(create, "PrivateUse1")
# torch.tensor(..., device="fake") copies below the wrapper, where the fallback is not reached.
COPIES.impl("copy_", functools.partial(create, torch.ops.aten.copy_.default), "PrivateUse1")
# torch would make these by giving an empty tensor another size, which a wrapper does not notice.
for overload in ("default", "start", "start_step"):
    operation = getattr(torch.ops.aten.arange, overload)
    COPIES.impl(operation.name().removesuffix(".default"), functools.partial(create, operation), "PrivateUse1")


@contextmanager
def fake_device(**settings: Any) -> Iterator[FakeDevice]:
    """A device of its own, with these fields of ``FakeDevice``; tensors of an older one are forgotten."""
    global current
    before, current = current, FakeDevice(**settings)
    try:
        yield current
    finally:
        current = before
