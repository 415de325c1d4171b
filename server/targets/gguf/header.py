"""The container of a GGUF file: metadata and where every tensor lies, checked against the file's size while it is read.

Everything here treats the file as hostile: no length, count or offset is used before it is known to fit. gguf-py's own
reader trusts them, and takes seconds for a vocabulary (a Python object for each string); its tables of types are used.
Source: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from server.targets.target import TargetError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
STRING, ARRAY = 8, 9
SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in the file. shape: the slowest dimension first, as torch has it; data: uint8 [bytes]."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: Bytes


@dataclass(frozen=True)
class GGUFFile:
    """A file, or all parts of a split one: ``metadata`` of the first part, ``tensors`` of every part, memory-mapped."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    buffers: tuple[mmap.mmap, ...]

    def forget_pages(self) -> None:
        """What was read so far need not stay in this process's memory; it is read again when asked for."""
        for buffer in self.buffers:
            buffer.madvise(mmap.MADV_DONTNEED)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value of the expected type. Errors: TargetError for a value of another type."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TargetError(f"{self.path}: the metadata key {key} holds {type(value).__name__}, not what it should")
        return value


def open_gguf(path: Path) -> GGUFFile:
    """Map the file, and the other parts where it is one of several. Errors: TargetError naming file and cause."""
    parts = [read_part(part) for part in part_files(path)]
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise TargetError(
                    f"{part.path}: the tensor {name} is in another part too; the parts do not belong together"
                )
            tensors[name] = tensor
    promised = parts[0].get("split.tensors.count", int)
    if promised is not None and promised != len(tensors):
        raise TargetError(f"{path}: its parts hold {len(tensors)} tensors, the first part promises {promised}")
    if parts[0].get("split.count", int, 1) not in (0, len(parts)):
        raise TargetError(
            f"{path} is one of {parts[0].metadata['split.count']} parts; keep their names, NAME-00001-of-0000N.gguf"
        )
    return GGUFFile(path, parts[0].metadata, tensors, tuple(buffer for part in parts for buffer in part.buffers))


def part_files(path: Path) -> list[Path]:
    """Every part of a split file, by its name; the file alone where it is whole. Errors: TargetError for a gap."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    files = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise TargetError(f"{path} is one part of {count}; missing beside it: {', '.join(missing[:3])}")
    return files


def read_part(path: Path) -> GGUFFile:
    """One file. Errors: TargetError for anything but a whole, well-formed GGUF file."""
    try:
        with path.open("rb") as file:
            beginning = file.read(8)
            if beginning[:4] != MAGIC:
                raise TargetError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise TargetError(f"{path} cannot be read: {error.strerror or error}") from error
    cursor = Cursor(path, buffer)
    cursor.position = 4
    version = cursor.number("<I")
    if version not in VERSIONS:
        big_endian = int.from_bytes(beginning[4:8], "big") in VERSIONS
        hint = "it is written for big-endian machines" if big_endian else f"known are {VERSIONS[0]} and {VERSIONS[1]}"
        raise TargetError(f"{path} has GGUF version {version}; {hint}")
    num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
    metadata = read_metadata(cursor, num_values)
    return GGUFFile(path, metadata, read_tensors(cursor, num_tensors, metadata), (buffer,))


class Cursor:
    """Reads forward through a mapped file, and never beyond its end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path, self.buffer, self.position = path, buffer, 0

    def take(self, num_bytes: int, what: str) -> int:
        """Step over ``num_bytes``; where they begin. Errors: TargetError where the file ends before."""
        begin = self.position
        if num_bytes > len(self.buffer) - begin:
            raise TargetError(
                f"{self.path} is truncated or damaged: {what} at byte {begin} needs {num_bytes} bytes, "
                f"the file has {len(self.buffer)}"
            )
        self.position = begin + num_bytes
        return begin

    def number(self, layout: str) -> int:
        """One unsigned number."""
        value: int = struct.unpack_from(layout, self.buffer, self.take(struct.calcsize(layout), "a number"))[0]
        return value

    def text(self, what: str) -> str:
        """One string; bytes that are no UTF-8 become replacement characters."""
        length = self.number("<Q")
        begin = self.take(length, what)
        return self.buffer[begin : begin + length].decode("utf-8", "replace")

    def value(self, key: str) -> Any:
        """One metadata value: a number, a bool, a string, or a list of one of them."""
        kind = self.number("<I")
        if kind == STRING:
            return self.text(key)
        if kind == ARRAY:
            return self.array(key)
        return self.scalars(kind, 1, key)[0]

    def array(self, key: str) -> list[Any]:
        """A list of numbers, bools or strings."""
        kind, length = self.number("<I"), self.number("<Q")
        if kind != STRING:
            return self.scalars(kind, length, key)
        # A string is at least its length; a longer list cannot be in the file, so nothing grows before it is known.
        if length * 8 > len(self.buffer) - self.position:
            self.take(length * 8, key)
        return self.texts(length, key)

    def texts(self, length: int, key: str) -> list[str]:
        """``length`` strings; vocabularies are long, so this loop is the plain one."""
        buffer, position, end, found = self.buffer, self.position, len(self.buffer), list[str]()
        read_length = struct.Struct("<Q").unpack_from
        for _ in range(length):
            begin = position + 8
            position = begin + read_length(buffer, position)[0] if begin <= end else end + 1
            if position > end:
                raise TargetError(
                    f"{self.path} is truncated or damaged: {key} does not end before the file's {end} bytes do"
                )
            found.append(buffer[begin:position].decode("utf-8", "replace"))
        self.position = position
        return found

    def scalars(self, kind: int, length: int, key: str) -> list[Any]:
        """Numbers of one type."""
        if kind not in SCALARS:
            raise TargetError(f"{self.path}: the metadata key {key} has the unknown type {kind}")
        layout = np.dtype(SCALARS[kind])
        begin = self.take(length * layout.itemsize, key)
        values: list[Any] = np.frombuffer(self.buffer, layout, length, begin).tolist()
        return values


def read_metadata(cursor: Cursor, num_values: int) -> dict[str, Any]:
    """All keys and values."""
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise TargetError(f"{cursor.path}: the metadata key {key} is there twice")
        metadata[key] = cursor.value(key)
    return metadata


def read_tensors(cursor: Cursor, num_tensors: int, metadata: dict[str, Any]) -> dict[str, StoredTensor]:
    """Names, shapes, types and places of all tensors; each inside the file and none over another."""
    headers = [read_tensor_header(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise TargetError(
            f"{cursor.path}: general.alignment is {alignment!r}, not a power of two up to {MAX_ALIGNMENT}"
        )
    start = -(-cursor.position // alignment) * alignment
    whole: Bytes = np.frombuffer(cursor.buffer, np.uint8)
    tensors: dict[str, StoredTensor] = {}
    free_from = start
    for name, shape, kind, offset in sorted(headers, key=lambda header: header[3]):
        if name in tensors:
            raise TargetError(f"{cursor.path}: the tensor {name} is there twice")
        begin, num_bytes = start + offset, tensor_bytes(cursor.path, name, shape, kind)
        if offset % alignment or begin < free_from:
            raise TargetError(f"{cursor.path} is damaged: the tensor {name} lies at offset {offset}, over another one")
        if begin + num_bytes > len(whole):
            raise TargetError(
                f"{cursor.path} is truncated or damaged: the tensor {name} ends at byte {begin + num_bytes}, "
                f"the file has {len(whole)}"
            )
        free_from = begin + num_bytes
        tensors[name] = StoredTensor(name, shape, kind, whole[begin : begin + num_bytes])
    return tensors


def read_tensor_header(cursor: Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape, type and offset of one tensor."""
    name = cursor.text("a tensor's name")
    num_dimensions = cursor.number("<I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise TargetError(f"{cursor.path}: the tensor {name} has {num_dimensions} dimensions; 1 to 4 are allowed")
    shape = tuple(cursor.number("<Q") for _ in range(num_dimensions))[::-1]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        return name, shape, GGMLQuantizationType(kind), offset
    except ValueError as error:
        raise TargetError(f"{cursor.path}: the tensor {name} has the unknown type {kind}") from error


def tensor_bytes(path: Path, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Size of a tensor in the file. Errors: TargetError for a shape that its type cannot have."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise TargetError(f"{path}: the tensor {name} {list(shape)} does not divide into {kind.name} blocks of {block}")
    num_bytes: int = math.prod(shape) // block * block_bytes
    return num_bytes
