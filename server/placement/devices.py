"""Devices by name, and the types parts are held in there. The only place that asks torch for accelerators."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from kernels.native import library

CPU = torch.device("cpu")
# How drivers and their libraries fail, where torch has no type for it. A mistake in a program, shapes that do not fit
# or tensors on two devices, is a plain RuntimeError too, and names a device at most as cuda:0.
FAILURE = re.compile(
    r"\b(CUDA|HIP|cuDNN|NCCL|Triton) (driver |unknown )?error|\bCUDA (driver|initialization)|out of memory"
    r"|\bC(UBLAS|UDNN|USOLVER|USPARSE|UFFT)_STATUS_|NVIDIA driver|No CUDA GPUs|NVML",
    re.IGNORECASE,
)


class PlacementError(ValueError):
    """A device is asked for that this machine, or this build of torch, does not have."""


@dataclass(frozen=True)
class Placement:
    """Where a part lives and in which floating-point type.

    native: whether the project's own kernels may run it, where they know how; in types of their own choice then.
    """

    device: torch.device
    dtype: torch.dtype
    native: bool = False


@dataclass(frozen=True)
class Card:
    """An accelerator: its memory, what is free of it now (others take part of it), and the type of layers there."""

    device: torch.device
    name: str
    memory_bytes: int
    free_bytes: int
    layer_dtype: torch.dtype = torch.float16

    @property
    def drafter(self) -> Placement:
        """fp16, as the paper has it."""
        return Placement(self.device, torch.float16)

    @property
    def layers(self) -> Placement:
        """bf16 where the device computes it, since activations of large models may leave fp16's range."""
        return Placement(self.device, self.layer_dtype)


def is_device_failure(error: BaseException) -> bool:
    """Whether a device or its driver failed: no memory, an error of its own, gone. Mistakes of a program are not."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and FAILURE.search(str(error)) is not None


def on_cpu() -> Placement:
    """fp32; the native kernels take over where they are built."""
    return Placement(CPU, torch.float32, native=library() is not None)


def find_card(name: str) -> Card | None:
    """The card of ``cuda:N``, the first one for ``auto``; None for ``cpu``, and for ``auto`` where there is none.

    Errors: PlacementError for a card that is not here.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return None
    device = torch.device("cuda:0" if name == "auto" else name)
    if not torch.cuda.is_available():
        raise PlacementError(f"{name} is asked for, but torch {torch.__version__} sees no CUDA device; use cpu or auto")
    if (device.index or 0) >= torch.cuda.device_count():
        raise PlacementError(f"{name} is asked for; this machine has {torch.cuda.device_count()} CUDA devices")
    free_bytes, memory_bytes = torch.cuda.mem_get_info(device)
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return Card(device, torch.cuda.get_device_name(device), memory_bytes, free_bytes, dtype)


def drafter_placement(name: str) -> Placement:
    """Where a drafter goes that is measured by itself. Errors: PlacementError."""
    card = find_card(name)
    return on_cpu() if card is None else card.drafter
