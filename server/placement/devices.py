"""Devices by name, and the types parts are held in there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.native import library

CPU = torch.device("cpu")


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


def drafter_placement(name: str) -> Placement:
    """``auto`` takes the first CUDA device where there is one. fp16 on a GPU as the paper has it, fp32 on the CPU.

    On the CPU the native kernels take over where they are built.
    """
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return Placement(CPU, torch.float32, native=library() is not None)
    if not torch.cuda.is_available():
        raise PlacementError(f"{name} is asked for, but torch {torch.__version__} sees no CUDA device; use cpu or auto")
    if (device.index or 0) >= torch.cuda.device_count():
        raise PlacementError(f"{name} is asked for; this machine has {torch.cuda.device_count()} CUDA devices")
    return Placement(device, torch.float16)
