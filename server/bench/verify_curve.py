"""T(n): how long the target takes to verify n rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from drafters.proposal import chain
from server.targets.target import PrefillChunk, Target, VerifyRows

ROWS = (1, 2, 4, 8, 16)
CONTEXT = 64


def verify_ms(target: Target, rows: Sequence[int] = ROWS, context: int = CONTEXT, repeats: int = 9) -> dict[str, float]:
    """Median milliseconds of a verify pass with its arg-max, for each number of rows, behind ``context`` tokens.

    The numbers of rows take turns, so that other load on the machine bends the curve as little as may be. Slot 0 is
    used and left empty.
    """
    token_ids = [i % target.info.vocab_size for i in range(context + max(rows))]
    times: dict[int, list[float]] = {num_rows: [] for num_rows in rows}
    target.prefill(PrefillChunk(0, token_ids[:context]))
    try:
        for repeat in range(repeats + 1):
            for num_rows in rows:
                tree = chain(token_ids[context + 1 : context + num_rows])
                started = time.perf_counter()
                target.verify([VerifyRows(0, token_ids[context], tree)])[0].argmax()
                if repeat:  # the first turn warms up
                    times[num_rows].append(time.perf_counter() - started)
    finally:
        target.release(0)
    return {str(num_rows): round(statistics.median(taken) * 1e3, 3) for num_rows, taken in times.items()}
