"""T(n): how long the target takes to verify n rows, measured, and as the costs of plans predict it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from drafters.proposal import chain
from server.placement.cost import PASS_MS, between
from server.placement.probe import probe
from server.targets.native_target import NativeTarget
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


def predicted_ms(target: NativeTarget, context: int = CONTEXT, rows: Sequence[int] = ROWS) -> dict[int, float]:
    """The same as a plan for this machine expects it: from the first, the middle and the last layer, and the head.

    What a second device computes of the target is not in it.
    """
    layers, count = target.stack.layers, len(target.stack)
    found = probe((layers[0], layers[count // 2], layers[-1]), target.packed_head, count, context)
    return {n: PASS_MS + count * between(found.layer_ms, n) + between(found.head_ms, n) for n in rows}
