"""What memory holds: how long a context is served, how many rows all requests share, and the page cache.

Settled before weights load, from the files' sizes and the model's configuration. Rows take memory as they come and give
it back when their request ends, so slots may be longer than their share: requests that together are too long wait.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drafters.drafter import DrafterError
from drafters.proposal import Budget
from server.targets.target import TargetError

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.25  # of the memory that weights and page cache leave; the rest is the drafter's and others'
TREES_SHARE = 0.25  # of the same memory, the most for the rows of drafts of all requests together
ASKED_SHARE = 0.75  # the same where a context is asked for; one request may have more
DEFAULT_CACHE, CACHE_SHARE = 512 * 2**20, 0.125  # of the page cache; of the memory that the weights leave, at most
ROUNDING = 256
BYTES_PER_NUMBER = {None: 4, "bf16": 2, "int8": 1}  # None is the model's own type, fp32 at most
SCALE_BYTES = 4  # of one vector of an int8 cache


@dataclass(frozen=True)
class CacheShape:
    """bytes_per_position: keys and values of one position of one request; num_slots: requests that run at once; shared:
    whether slots draw their rows from one pool, else each takes its whole context when it is loaded."""

    bytes_per_position: int
    num_slots: int
    shared: bool = True

    def rows_in(self, num_bytes: float) -> int:
        """Rows of all requests together that fit into so many bytes."""
        return max(0, int(num_bytes // self.bytes_per_position))

    def positions_in(self, num_bytes: float) -> int:
        """Positions of the longest request that fits into so many bytes."""
        return self.rows_in(num_bytes) // (1 if self.shared else self.num_slots)


@dataclass(frozen=True)
class Wanted:
    """What the user asked for: positions of a request, bytes of the page cache; None: what suits the memory. tree_rows:
    rows of drafts that each running request has beyond its context."""

    context: int | None = None
    cache_bytes: int | None = None
    tree_rows: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """context: positions of a request; pool_rows: those of all requests and of their trees together; cache_bytes: the
    page cache's limit; left_bytes: what remains for everything else, the drafter first."""

    context: int
    pool_rows: int
    cache_bytes: int
    left_bytes: float


def cache_shape(config: Any, num_slots: int, kv_cache: str | None) -> CacheShape:
    """From a model's text configuration alone."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    scales = SCALE_BYTES if kv_cache == "int8" else 0
    vector = head_dim * BYTES_PER_NUMBER[kv_cache] + scales
    return CacheShape(2 * config.num_hidden_layers * kv_heads * vector, num_slots)


def plan_memory(name: str, limit: int, wanted: Wanted, shape: CacheShape, free_bytes: float) -> MemoryPlan:
    """``limit``: the model's positions; ``free_bytes``: memory left once the weights are loaded.

    Errors: TargetError for more than the model's positions, or a context, a cache or a number of requests larger than
    the memory, saying what fits.
    """
    free_bytes = max(0.0, free_bytes)
    cache_bytes = _cache_bytes(name, wanted.cache_bytes, shape, free_bytes)
    left = free_bytes - cache_bytes
    tree_rows = _tree_rows(name, wanted.tree_rows, shape, left)
    left -= tree_rows * shape.bytes_per_position
    context = _context(name, limit, wanted.context, shape, left)
    comfortable = shape.rows_in(left * (DEFAULT_SHARE if wanted.context is None else ASKED_SHARE))
    pool_rows = shape.num_slots * context
    if shape.shared:
        pool_rows = min(pool_rows, max(comfortable, context))
    if context < limit and wanted.context is None:
        logger.info(
            "context: %d of the %d positions of %s, in a quarter of the free memory; --context N chooses otherwise",
            context, limit, name,
        )  # fmt: skip
    if pool_rows < shape.num_slots * context:
        logger.info(
            "%d requests share %d positions; those that do not fit beside the others wait, and go on later",
            shape.num_slots, pool_rows,
        )  # fmt: skip
    left -= pool_rows * shape.bytes_per_position
    return MemoryPlan(context, pool_rows + tree_rows, cache_bytes, left)


def _cache_bytes(name: str, wanted: int | None, shape: CacheShape, free_bytes: float) -> int:
    """The page cache's limit. Errors: TargetError for one that leaves no room for a single request."""
    if wanted is None:
        return min(DEFAULT_CACHE, int(free_bytes * CACHE_SHARE))
    least = min(ROUNDING, shape.rows_in(free_bytes)) * shape.bytes_per_position
    if wanted > free_bytes - least:
        raise TargetError(
            f"--cache {_size(wanted)} is asked for, and {_size(free_bytes)} are free beside the weights of {name}; "
            f"{_size(max(0.0, free_bytes - least))} would fit"
        )
    return wanted


def _tree_rows(name: str, wanted: int, shape: CacheShape, left: float) -> int:
    """Rows of drafts of all requests together. Errors: TargetError for more than their share of the memory."""
    most = left * TREES_SHARE
    if shape.num_slots > 1 and wanted * shape.num_slots * shape.bytes_per_position > most:
        room = shape.rows_in(most)
        fits = f"--max-seqs {room // wanted}" if room >= wanted else f"--max-seqs 1 with --rows {room}"
        raise TargetError(
            f"--max-seqs {shape.num_slots} with {wanted} rows of drafts each takes "
            f"{_size(wanted * shape.num_slots * shape.bytes_per_position)} of keys and values before any text, and "
            f"{_size(left)} are free beside the weights of {name} and the page cache; {fits} would fit"
        )
    return wanted * shape.num_slots


def _context(name: str, limit: int, wanted: int | None, shape: CacheShape, left: float) -> int:
    """Positions of a request in the memory that the page cache leaves."""
    if wanted is not None and wanted > limit:
        raise TargetError(f"--context {wanted} is asked for; the positions of {name} end at {limit}")
    fits = shape.positions_in(left)
    if wanted is not None:
        if wanted > fits:
            whose = "one request" if shape.shared else f"{shape.num_slots} requests"
            needed = wanted * shape.bytes_per_position * (1 if shape.shared else shape.num_slots)
            raise TargetError(
                f"--context {wanted} for {whose} takes {_size(needed)} of keys and values, and {_size(left)} are free "
                f"beside the weights of {name} and the page cache; {fits} positions would fit, more with a smaller "
                "--cache or --kv-cache int8"
            )
        return wanted
    comfortable = shape.positions_in(left * DEFAULT_SHARE) // ROUNDING * ROUNDING
    context = min(limit, max(comfortable, min(fits, ROUNDING)))
    if context < 1:
        raise TargetError(f"{name} does not fit: no memory is left for keys and values beside its weights")
    return context


def slot_capacity(context: int, budgets: Sequence[Budget]) -> int:
    """Rows a slot needs: a full tree may hang below the last position; the drafter also keeps every row it expanded."""
    return context + max(max(budget.rows, budget.top_k * budget.depth) for budget in budgets)


@dataclass(frozen=True)
class DrafterRoom:
    """Where a drafter must fit. capacity: rows of a slot; pool_rows: rows of all slots together, on the CPU, where they
    take memory as they come; left_bytes: what the target leaves of the main memory."""

    num_slots: int
    capacity: int
    pool_rows: int
    left_bytes: float

    def check(self, path: Path, fields: Mapping[str, Any], device: torch.device) -> None:
        """``path``: a folder or a GGUF file; ``fields``: its configuration.

        Errors: DrafterError, by its name, where it does not fit beside the target.
        """
        rows, left = self.pool_rows, self.left_bytes
        if device.type == "cuda":
            rows, left = self.num_slots * self.capacity, torch.cuda.mem_get_info(device)[0]
        files = [path] if path.is_file() else path.glob("*.safetensors")
        weights = sum(file.stat().st_size for file in files)
        needed = weights + rows * drafter_row_bytes(fields)
        if needed > left:
            raise DrafterError(
                f"the drafter {path.name} takes {_size(needed)} on {device} with {self.num_slots} requests of "
                f"{self.capacity} rows, and {_size(max(left, 0.0))} are left; a shorter --context, a smaller "
                "--max-seqs or --cache, or --drafter none leaves room"
            )


def drafter_row_bytes(fields: Mapping[str, Any]) -> int:
    """Keys and values of one row in fp32, by a config.json of a drafter's or of a transformers model's."""

    def field(*names: str, default: int = 0) -> int:
        return next((int(fields[name]) for name in names if isinstance(fields.get(name), int)), default)

    heads = max(field("num_heads", "num_attention_heads", default=1), 1)
    head_dim = field("head_dim", default=field("hidden_size") // heads)
    kv_heads = field("num_kv_heads", "num_key_value_heads", default=heads)
    return 2 * field("num_blocks", "num_hidden_layers", default=1) * kv_heads * head_dim * 4


def _size(num_bytes: float) -> str:
    """For people."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
