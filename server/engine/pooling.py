"""One vector for a whole text: the mean of its tokens' last features, of length 1."""

from __future__ import annotations

from torch import Tensor

from server.engine.request import PooledEvent
from server.engine.sequence import RunningSequence


def pool_prompt(sequence: RunningSequence, start: int, last: Tensor) -> list[PooledEvent]:
    """Add a chunk's features ``last`` [n, hidden], whose first row is the text's ``start``; the vector behind the end.

    A text that is read again begins anew.
    """
    if not sequence.request.pools:
        return []
    total = last.double().sum(dim=0)
    sequence.pooled = total if start == 0 else sequence.pooled + total
    if start + len(last) < sequence.num_prompt:
        return []
    vector = sequence.pooled / sequence.pooled.norm().clamp(min=1e-12)
    return [PooledEvent(sequence.request_id, tuple(vector.tolist()))]
