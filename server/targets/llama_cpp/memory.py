"""What a GGUF file's metadata say about context and cache, for any architecture that llama.cpp may know."""

from __future__ import annotations

from typing import Any

from server.targets.context import CacheShape
from server.targets.gguf.configuration import number
from server.targets.gguf.header import GGUFFile
from server.targets.target import TargetError

VALUE_BYTES = {None: 2.0, "bf16": 2.0, "int8": 34 / 32}  # Q8_0 has a scale of 2 bytes for 32 values


def context_and_cache(file: GGUFFile, num_slots: int, kv_cache: str | None) -> tuple[int, CacheShape]:
    """Positions of the model, and bytes of keys and values of one position. Errors: TargetError naming the key."""
    name = file.get("general.architecture", str, "")
    heads = per_layer(file, f"{name}.attention.head_count", None)
    kv_heads = per_layer(file, f"{name}.attention.head_count_kv", heads)
    head_size = max(1, number(file, f"{name}.embedding_length") // max(heads))
    vectors = sum(number(file, f"{name}.attention.{part}_length", head_size) for part in ("key", "value"))
    values = sum(kv_heads) * vectors
    shape = CacheShape(max(1, int(values * VALUE_BYTES[kv_cache])), num_slots, shared=False)
    return number(file, f"{name}.context_length"), shape


def per_layer(file: GGUFFile, key: str, default: list[int] | None) -> list[int]:
    """One number for each layer; files give one for all, or a list."""
    layers = number(file, f"{file.get('general.architecture', str, '')}.block_count")
    value: Any = file.get(key, (int, list), default)
    numbers = value if isinstance(value, list) else [value] * min(layers, 1 << 16)
    if len(numbers) < layers or any(not isinstance(one, int) or one < 0 for one in numbers) or not max(numbers):
        raise TargetError(f"{file.path}: the metadata key {key} must be a positive number for each of {layers} layers")
    return numbers[:layers]
