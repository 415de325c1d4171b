"""Packed weights on disk: one safetensors file, read by memory map, with a format version that is checked.

Packed weights are stored as their bytes; beside them lie plain tensors (norms, biases, embeddings). What a name is
stands in the file's metadata, so that nothing is guessed from shapes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels.linear_lowbit.packed import FORMAT_VERSION, PackedWeight, dequantise

_FORMAT = "dovetail-packed"
_LINE = 64  # bytes
_READABLE = ("1", str(FORMAT_VERSION))  # 1 had fewer formats, with the same bytes


class PackedFormatError(ValueError):
    """A file is not a packed checkpoint, or one that another version wrote."""


def save_packed(path: Path, weights: Mapping[str, PackedWeight | Tensor]) -> None:
    """Writes packed weights and plain tensors under their names."""
    described = {
        name: {
            "out_features": weight.out_features, "in_features": weight.in_features, "bits": weight.bits,
            "group_size": weight.group_size, "zero_point": weight.zero_point,
            "wide_scales": weight.wide_scales, "table": weight.table,
        }
        for name, weight in weights.items() if isinstance(weight, PackedWeight)
    }  # fmt: skip
    tensors = {
        name: weight.data if isinstance(weight, PackedWeight) else weight.contiguous()
        for name, weight in weights.items()
    }
    metadata = {"format": _FORMAT, "format_version": str(FORMAT_VERSION), "packed": json.dumps(described)}
    unaligned = path.with_name(path.name + ".unaligned")
    try:
        save_file(tensors, unaligned, metadata=metadata)
        _copy_aligned(unaligned, path)
    finally:
        unaligned.unlink(missing_ok=True)


def _copy_aligned(source: Path, path: Path) -> None:
    """Copies a safetensors file, its header lengthened by blanks so that the first tensor starts on a cache line.

    Packed weights are whole lines, so that each starts on one where the plain tensors before it do; the kernels read
    64 bytes at a time, and would touch two lines for each.
    """
    with source.open("rb") as read, path.open("wb") as written:
        size = int.from_bytes(read.read(8), "little")
        header = read.read(size).ljust(size + -(8 + size) % _LINE)
        written.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(read, written, 1 << 24)


def load_packed(path: Path) -> dict[str, PackedWeight | Tensor]:
    """Reads what `save_packed` wrote; pages of the file are read when first used.

    Raises PackedFormatError for another format, another version, or bytes that do not fit their description.
    """
    try:
        with safe_open(path, framework="pt") as file:
            described = _described(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise PackedFormatError(f"{path} is not a safetensors file: {error}") from error
    if missing := described.keys() - tensors.keys():
        raise PackedFormatError(f"{path} describes weights it does not hold: {', '.join(sorted(missing))}")
    try:
        return {
            name: PackedWeight(tensor, **described[name]) if name in described else tensor
            for name, tensor in tensors.items()
        }
    except (TypeError, ValueError) as error:
        raise PackedFormatError(f"{path} is damaged: {error}") from error


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if metadata.get("format") != _FORMAT:
        raise PackedFormatError(
            f"{path} is no packed checkpoint; `dovetail convert` writes one from safetensors weights"
        )
    version = metadata.get("format_version")
    if version not in _READABLE:
        raise PackedFormatError(
            f"{path} has packed format {version}, this version reads {' and '.join(_READABLE)}: "
            "`dovetail convert TARGET FOLDER --weights int8` makes the folder anew from the original weights"
        )
    try:
        described: dict[str, dict[str, Any]] = json.loads(metadata["packed"])
        for fields in described.values():
            if fields.get("table") is not None:
                fields["table"] = tuple(fields["table"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise PackedFormatError(f"{path} does not say which of its weights are packed") from error
    return described


@dataclass(frozen=True)
class PackingError:
    """How far a packed weight is from the original: |packed - original| / |original|, and the largest difference."""

    relative: float
    largest: float


def packing_error(original: Tensor, *parts: PackedWeight) -> PackingError:
    """Compares original [out_features, in_features] with what the packed weights stand for, their outputs in order."""
    difference = torch.cat([dequantise(part) for part in parts]) - original.detach().float()
    size = torch.linalg.vector_norm(original.detach().float())
    return PackingError(
        relative=float(torch.linalg.vector_norm(difference) / size) if size > 0 else 0.0,
        largest=float(difference.abs().max()),
    )
