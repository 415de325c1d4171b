"""What the loaded target and drafter cost on this machine, measured in under a second and remembered.

The measurements are kept in a file, by machine, model, kernels and threads, so that a server starts without them the
next time; while it runs they are refined. Slots of target and drafter must be empty, and are left so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from drafters.drafter import Drafter, DraftState, Observation
from drafters.proposal import Budget, Proposal
from kernels.native import ABI, instruction_set, num_threads
from server.engine.cost import Costs, DraftCost, VerifyCost
from server.engine.scheduler import CHUNK_S
from server.targets.target import PrefillChunk, Target, VerifyRows

logger = logging.getLogger(__name__)

METHOD = 3  # of measuring; what another one found is not taken
SLOT = 0
CONTEXT = 32
CHUNKS = (64, 32, 16, 8)  # tokens of a fixed chunk, to choose from
VERIFY_BUDGET_S, DRAFT_BUDGET_S = 0.6, 0.3
FEW_ROWS = (1, 8, 2, 4, 6, 3)  # what most rounds verify, in order of use where a slow target leaves no time for all
MANY_ROWS = (16, 32, 12, 24, 64, 48)
PASSES = (*FEW_ROWS * 2, *MANY_ROWS, *FEW_ROWS * 5, *MANY_ROWS)


def measured_costs(target: Target, drafter: Drafter | None, budget: Budget, max_rows: int) -> Costs:
    """Costs from passes over a short made-up text. ``max_rows``: rows a slot holds beside that text, at most."""
    token_ids = [i % target.info.vocab_size for i in range(CONTEXT + 1)]
    features = target.prefill(PrefillChunk(SLOT, token_ids[:CONTEXT])).features
    try:
        verify = VerifyCost(verify_times(target, token_ids[CONTEXT], max_rows))
        draft = DraftCost(0.0, 0.0, 0.0)
        if drafter is not None:
            try:
                drafter.observe([Observation(SLOT, features[:1], token_ids[1:2])])  # warms up
                started = time.perf_counter()
                drafter.observe([Observation(SLOT, features[1:], token_ids[2:])])
                row_s = (time.perf_counter() - started) / (CONTEXT - 1)
                draft = draft_cost(target, drafter, features[-1:], DraftState(SLOT, token_ids), budget, row_s)
            except Exception:  # it fails while requests are served as well, and is dealt with there
                logger.warning("what the drafter costs could not be measured", exc_info=True)
            finally:
                drafter.release(SLOT)
    finally:
        target.release(SLOT)
    return Costs(verify, draft)


def fixed_chunk(target: Target) -> int:
    """Tokens of a prompt's chunk on a target without exact rows: the most that are read in ``CHUNK_S``.

    They lie by position, so that a text depends on nobody's company; hence their number is settled once, here. A target
    with exact rows needs none.
    """
    if target.info.exact_rows:
        return CHUNKS[0]
    token_ids = [i % target.info.vocab_size for i in range(max(CHUNKS))]
    for rows in CHUNKS[:-1]:
        seconds = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            target.prefill(PrefillChunk(SLOT, token_ids[:rows]))
            seconds = min(seconds, time.perf_counter() - started)
            target.release(SLOT)
        if seconds <= CHUNK_S:
            return rows
    return CHUNKS[-1]


def verify_times(target: Target, root_id: int, max_rows: int) -> dict[int, float]:
    """Seconds of a verify pass by its rows: the shortest of several, as far as the time goes.

    A few rows are measured as they run, behind passes of few rows, and more often: a tenth too much for one row and all
    drafts look free.
    """
    times: dict[int, float] = {}
    ends = time.perf_counter() + VERIFY_BUDGET_S
    for rows in PASSES:
        taken = times.get(rows)
        if rows > max_rows or (times and time.perf_counter() + (taken or 2 * times[1]) > ends):
            continue
        started = time.perf_counter()
        siblings = Proposal((root_id,) * (rows - 1), (None,) * (rows - 1), (0.0,) * (rows - 1))
        target.verify([VerifyRows(SLOT, root_id, siblings)])[0].argmax()
        seconds = time.perf_counter() - started
        times[rows] = seconds if taken is None else min(taken, seconds)
    return times


def draft_cost(
    target: Target, drafter: Drafter, features: Tensor, state: DraftState, budget: Budget, row_s: float
) -> DraftCost:
    """Seconds to show a drafter one more position, ``features`` [1, width], and to grow the first level of a tree, and
    of each level behind it: the shorter of several.

    As in a round the target runs before, so that the drafter's weights do not lie in the cache.
    """
    shallow = deep = float("inf")
    ends = time.perf_counter() + DRAFT_BUDGET_S
    for _ in range(6):
        for depth in (0, budget.depth):
            target.verify([VerifyRows(SLOT, state.token_ids[-1], Proposal())])[0].argmax()
            started = time.perf_counter()
            drafter.observe([Observation(SLOT, features, state.token_ids[-1:])])
            drafter.propose([state], Budget(budget.rows, budget.top_k, depth))
            seconds = time.perf_counter() - started
            shallow, deep = (min(shallow, seconds), deep) if depth == 0 else (shallow, min(deep, seconds))
        if time.perf_counter() > ends:
            break
    level_s = max(deep - shallow, 0.0) / budget.depth if budget.depth else 0.0
    return DraftCost(max(shallow - level_s - row_s, 0.0), level_s, row_s)


def load_costs(target: Target, drafter: Drafter | None, budget: Budget, capacity: int, place: str) -> Costs:
    """What passes and drafts cost: remembered in the user's cache folder, or measured now. ``place``: the drafter's."""
    info = target.info
    model = (info.name, info.architecture, info.num_layers, info.hidden_size, info.num_parameters, info.weights)
    drafts = ("none",) if drafter is None else (drafter.name, place, *dataclasses.astuple(budget))
    machine = (METHOD, platform.node(), os.cpu_count(), instruction_set(), num_threads(), ABI)
    key = "|".join(map(str, (*machine, type(target).__name__, *model, *drafts)))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dovetail"
    return remembered_costs(folder / "costs.json", key, target, drafter, budget, capacity - CONTEXT - 1)


def remembered_costs(
    file: Path, key: str, target: Target, drafter: Drafter | None, budget: Budget, max_rows: int
) -> Costs:
    """The costs that ``file`` holds for ``key``; measured, and added to it, where it has none or cannot be read."""
    known: dict[str, dict[str, dict[str, float]]] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        verify = {int(rows): float(seconds) for rows, seconds in known[key]["verify"].items()}
        draft = known[key]["draft"]
        return Costs(VerifyCost(verify), DraftCost(float(draft["fixed_s"]), draft["level_s"], draft["row_s"]))
    costs = measured_costs(target, drafter, budget, max_rows)
    draft = {"fixed_s": costs.draft.fixed_s, "level_s": costs.draft.level_s, "row_s": costs.draft.row_s}
    entry = {"verify": {str(rows): seconds for rows, seconds in sorted(costs.verify.points.items())}, "draft": draft}
    known = known if isinstance(known, dict) else {}
    try:
        with replaced(file) as partial:
            partial.write_text(json.dumps(known | {key: entry}, indent=1), encoding="utf-8")
    except OSError as error:
        logger.debug("%s cannot be written, so costs are measured again next time: %s", file, error)
    return costs


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A file beside ``file`` that takes its place at the end, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
