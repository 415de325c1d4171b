"""What a drafter costs: milliseconds of one level of its trees."""

from __future__ import annotations

import statistics
import time

from drafters.drafter import Drafter, DraftState, Observation
from drafters.proposal import Budget
from server.targets.target import PrefillChunk, Target

SLOT = 0
CONTEXT = 64


def draft_step_ms(
    target: Target, drafter: Drafter, budget: Budget, context: int = CONTEXT, repeats: int = 15
) -> float | None:
    """Median milliseconds of one draft step: the forward pass over ``top_k`` nodes, the LM head, the tree's growth.

    It is the difference of a tree of ``budget.depth`` levels and one of the first level alone, divided by the depth
    (None for depth 0), behind ``context`` tokens. No level is left out, however few rows the budget has. Both trees
    take turns. Slot 0 of target and drafter is used and left empty.
    """
    if budget.depth == 0:
        return None
    rows = 1 + budget.top_k + budget.depth * budget.top_k**2
    budgets = [Budget(rows, budget.top_k, 0), Budget(rows, budget.top_k, budget.depth)]
    token_ids = [i % target.info.vocab_size for i in range(context + 1)]
    target.select_features(drafter.feature_layers or ("last",))
    try:
        features = target.prefill(PrefillChunk(SLOT, token_ids[:context])).features
        drafter.observe([Observation(SLOT, features, token_ids[1:])])
        differences: list[float] = []
        for repeat in range(repeats + 1):
            taken: list[float] = []
            for tree in budgets:
                started = time.perf_counter()
                drafter.propose([DraftState(SLOT, token_ids)], tree)
                taken.append(time.perf_counter() - started)
            if repeat:  # the first turn warms up
                differences.append((taken[1] - taken[0]) / budget.depth)
    finally:
        target.release(SLOT)
        drafter.release(SLOT)
    # What costs nothing, such as a lookup, may come out below zero.
    return round(max(statistics.median(differences), 0.0) * 1e3, 3)
