"""How long a context is served: what the model's positions allow and the memory holds. Settled before weights load."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from server.targets.target import TargetError

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.25  # of the memory that the weights leave; the rest is the drafter's, the page cache's and others'
ROUNDING = 256
BYTES_PER_NUMBER = {None: 4, "bf16": 2, "int8": 1}  # None is the model's own type, fp32 at most
SCALE_BYTES = 4  # of one vector of an int8 cache


@dataclass(frozen=True)
class CacheShape:
    """bytes_per_position: keys and values of one position of one request; num_slots: requests that run at once."""

    bytes_per_position: int
    num_slots: int

    def positions_in(self, num_bytes: float) -> int:
        """Positions for each request that fit into so many bytes."""
        return max(0, int(num_bytes // (self.bytes_per_position * self.num_slots)))


def cache_shape(config: Any, num_slots: int, kv_cache: str | None) -> CacheShape:
    """From a model's text configuration alone."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    scales = SCALE_BYTES if kv_cache == "int8" else 0
    vector = head_dim * BYTES_PER_NUMBER[kv_cache] + scales
    return CacheShape(2 * config.num_hidden_layers * kv_heads * vector, num_slots)


def served_context(name: str, limit: int, wanted: int | None, shape: CacheShape, free_bytes: float) -> int:
    """Positions to serve; ``free_bytes``: memory left once the weights are loaded.

    Errors: TargetError for more than the model's positions, or a cache larger than the memory, saying what fits.
    """
    if wanted is not None and wanted > limit:
        raise TargetError(f"--context {wanted} is asked for; the positions of {name} end at {limit}")
    fits = shape.positions_in(free_bytes)
    if wanted is not None:
        if wanted > fits:
            raise TargetError(
                f"--context {wanted} for {shape.num_slots} requests takes "
                f"{wanted * shape.num_slots * shape.bytes_per_position / 2**30:.1f} GiB of keys and values, and "
                f"{max(0.0, free_bytes) / 2**30:.1f} GiB are free beside the weights of {name}; {fits} positions would "
                "fit, more with a smaller --max-seqs or --kv-cache int8"
            )
        return wanted
    comfortable = shape.positions_in(free_bytes * DEFAULT_SHARE) // ROUNDING * ROUNDING
    context = min(limit, max(comfortable, min(fits, ROUNDING)))
    if context < 1:
        raise TargetError(f"{name} does not fit: no memory is left for keys and values beside its weights")
    if context < limit:
        logger.info(
            "context: %d of the %d positions of %s, for %d requests in a quarter of the free memory; --context N and "
            "--max-seqs N choose otherwise", context, limit, name, shape.num_slots,
        )  # fmt: skip
    return context
