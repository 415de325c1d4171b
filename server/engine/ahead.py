"""Drafting for the next round while the target verifies this one.

While a pass runs, the drafter grows the same tree twice as deep, in a thread of its own. If what is accepted, and the
target's own choice behind it, is a path of that tree, the part below is the next tree and the next pass starts at once;
true features reach the drafter while that pass runs. If not, the drafter is asked as it always is. What is proposed
never changes a text, so neither does this. Source: the idea is that of PEARL (arXiv 2408.11850) and of pre-drafting in
Dovetail's outlook; drafting deeper instead of guessing outcomes one by one is ours, and asks nothing new of a drafter.

Whether it pays is measured: rounds with and without take turns at first, and the slower way is left alone for long.
That is for drafters on a device of their own. One on the CPU takes its time from the pass that it runs beside.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from drafters.drafter import Drafter, DraftState, Observation
from drafters.proposal import Budget, Proposal

TRIAL_ROUNDS, TRIALS = 8, 16  # rounds of one way in a row, and how often each way is tried
SETTLED_ROUNDS = 4000  # until it is tried again
LEAST_GAIN = 1.03  # drafting ahead takes memory bandwidth and processor time from others, so it must show


def ahead_budget(budget: Budget) -> Budget:
    """What is grown while a tree of ``budget`` is verified: below the likeliest end of that tree, another one."""
    return Budget(4 * budget.rows, budget.top_k, 2 * budget.depth + 2)


@dataclass
class Trial:
    """Which way is faster: rounds in turns, then the better one for ``SETTLED_ROUNDS``.

    ahead: the way taken now; speeds: tokens/s of the rows of rounds of each way since the last decision; gain: that of
    drafting ahead over the other's, at the last decision.
    """

    ahead: bool = False
    rounds: int = 0
    settled: bool = False
    gain: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    speeds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    def record(self, tokens: int, seconds: float) -> None:
        """A round of the present way gave so many tokens in so long."""
        self.rounds += 1
        if self.settled:
            if self.rounds == SETTLED_ROUNDS:
                self.settled, self.rounds, self.ahead = False, 0, False
            return
        if self.rounds % TRIAL_ROUNDS != 1:  # the first of a row belongs half to the other way
            self.tokens += tokens
            self.seconds += seconds
        if self.rounds % TRIAL_ROUNDS == 0:
            self.speeds[self.ahead].append(self.tokens / max(self.seconds, 1e-9))
            self.ahead, self.tokens, self.seconds = not self.ahead, 0, 0.0
        if self.rounds == 2 * TRIALS * TRIAL_ROUNDS:
            self._settle()

    def _settle(self) -> None:
        """Stay where the gain shows beyond its own uncertainty: how much is accepted varies more than what it takes."""
        gains = [math.log(max(fast, 1e-9) / max(slow, 1e-9)) for slow, fast in zip(*self.speeds.values(), strict=True)]
        gain, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
        self.gain = math.exp(gain)
        self.ahead, self.settled, self.rounds = gain - error >= math.log(LEAST_GAIN), True, 0
        self.speeds = {False: [], True: []}


class AheadDrafter:
    """Drafts ahead where that was measured to pay; the wrapped drafter is touched by one thread at a time."""

    def __init__(self, drafter: Drafter, now: Callable[[], float] = time.perf_counter) -> None:
        """``now``: a clock in seconds, to measure rounds by."""
        self.drafter = drafter
        self.name, self.feature_layers = drafter.name, drafter.feature_layers
        self.now = now
        self.trial = Trial()
        self.hits = self.misses = 0
        self.grown: dict[int, tuple[int, Proposal]] = {}  # by slot: tokens at its root, and the deep tree
        self.waiting: list[Sequence[Observation]] = []  # not shown yet
        self.showing: list[Sequence[Observation]] = []  # being shown by the background
        self.job: Future[list[Proposal]] | None = None
        self.asked: list[tuple[int, int]] = []  # slot and number of tokens of each state of the last round
        self.moment = 0.0
        threads = torch.get_num_threads()
        self.executor = ThreadPoolExecutor(1, "dovetail-ahead", lambda: torch.set_num_threads(threads))

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One tree for each state, from what was grown ahead where the text went there."""
        self._join()
        self._measure(states)
        if not self.trial.ahead:
            self._show(self.waiting)
            return self.drafter.propose(states, budget)
        found = {state.slot: tree for state in states if (tree := self._below(state, budget)) is not None}
        rest = [state for state in states if state.slot not in found]
        self.hits, self.misses = self.hits + len(found), self.misses + len(rest)
        if rest:
            self._show(self.waiting)
            found |= zip((state.slot for state in rest), self.drafter.propose(rest, budget), strict=True)
        self._start(states, budget)
        return [found[state.slot] for state in states]

    def observe(self, batch: Sequence[Observation]) -> None:
        """Take in committed positions: when the drafter is next asked, or while the next pass runs."""
        if not self.trial.ahead:
            self._join()
            self._show(self.waiting)
            self.drafter.observe(batch)
            return
        self.waiting.append(batch)

    def release(self, slot: int) -> None:
        """Forget a request."""
        self._join(keep_error=True)
        kept = ([observation for observation in batch if observation.slot != slot] for batch in self.waiting)
        self.waiting = [batch for batch in kept if batch]
        self.grown.pop(slot, None)
        self.drafter.release(slot)

    def _start(self, states: Sequence[DraftState], budget: Budget) -> None:
        """Grow the trees of this round deeper, in the background; it sees the true features first."""
        frozen = [DraftState(state.slot, tuple(state.token_ids)) for state in states]
        self.showing, self.waiting, self.grown = self.waiting, [], {}

        def work() -> list[Proposal]:
            self._show(self.showing)
            return self.drafter.propose(frozen, ahead_budget(budget))

        self.job = self.executor.submit(work)

    def _join(self, keep_error: bool = False) -> None:
        """Wait for the background. Errors: those of the drafter, which the round that meets them goes without."""
        if self.job is None:
            return
        job = self.job
        failed = job.exception() is not None
        self.waiting, self.showing = [*self.showing, *self.waiting], []  # what it failed on is shown again
        if failed and keep_error:
            return
        self.job = None
        for (slot, length), tree in zip(self.asked, job.result(), strict=True):
            self.grown[slot] = (length, tree)

    def _show(self, batches: list[Sequence[Observation]]) -> None:
        """What the drafter fails on stays: it takes in all of a call or nothing."""
        while batches:
            self.drafter.observe(batches[0])
            batches.pop(0)

    def _below(self, state: DraftState, budget: Budget) -> Proposal | None:
        """The part of the deep tree below what was committed since, if there is enough of it."""
        length, tree = self.grown.get(state.slot, (0, Proposal()))
        if not len(tree) or not 0 < length < len(state.token_ids):
            return None
        below = subtree(tree, state.token_ids[length:])
        if below is None:
            return None
        below = best_nodes(below.cut(budget.depth + 1), budget.rows - 1)
        return below if 2 * max(below.depths, default=0) >= min(budget.depth + 1, budget.rows - 1) else None

    def _measure(self, states: Sequence[DraftState]) -> None:
        """What the last round gave, where the same requests are asked for again."""
        moment = self.now()
        asked = [(state.slot, len(state.token_ids)) for state in states]
        if [slot for slot, _ in asked] == [slot for slot, _ in self.asked]:
            tokens = sum(now - before for (_, now), (_, before) in zip(asked, self.asked, strict=True))
            if tokens > 0:
                self.trial.record(tokens, moment - self.moment)
        self.asked, self.moment = asked, moment


def subtree(tree: Proposal, token_ids: Sequence[int]) -> Proposal | None:
    """What hangs below the path of these tokens from the root; None where the tree has no such path."""
    row = 0
    for token_id in token_ids:
        row = next((child for child in tree.children[row] if tree.token_ids[child - 1] == token_id), -1)
        if row < 0:
            return None
    places: dict[int, int | None] = {row: None}
    nodes: list[int] = []
    for later in range(row + 1, tree.num_rows):
        if tree.row_parents[later] in places:
            places[later] = len(nodes)
            nodes.append(later)
    return Proposal(
        tuple(tree.token_ids[node - 1] for node in nodes),
        tuple(places[tree.row_parents[node]] for node in nodes),
        tuple(tree.log_probs[node - 1] for node in nodes),
    )


def best_nodes(tree: Proposal, count: int) -> Proposal:
    """The ``count`` nodes of the highest probability from the root; a parent never ranks below its children."""
    scores: list[float] = []
    for parent, log_prob in zip(tree.parents, tree.log_probs, strict=True):
        scores.append(log_prob + (0.0 if parent is None else scores[parent]))
    ranked = sorted(range(len(tree)), key=lambda node: (-scores[node], tree.depths[node], node))
    return tree.select(ranked[:count])
