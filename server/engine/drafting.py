"""Everything about drafting: the drafter, what it has not seen yet, when it pays, and what happens when it fails.

Nothing that goes wrong in here reaches a request: a drafter that raises, runs out of memory or gives numbers that are
none costs the round its drafts. The requests go on plainly, what the drafter has not seen waits, and it is tried again
after a pause that doubles with every failure in a row.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from drafters.drafter import Drafter, DrafterError, DraftState, Observation
from drafters.proposal import Budget, Proposal
from server.engine.backlog import Backlog
from server.engine.guard import DraftGuard
from server.engine.sequence import RunningSequence

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PLAIN = Proposal()
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0


class DraftingState(enum.StrEnum):
    """Whether requests are drafted for."""

    ON = "on"
    OFF = "off"
    FAILED = "failed"
    UNPROFITABLE = "unprofitable"


@dataclass(frozen=True)
class DraftingStatus:
    """The state and, where it is not ``on``, the reason, for people."""

    state: DraftingState
    reason: str = ""


@dataclass
class Recovery:
    """When a drafter that failed is tried again."""

    reason: str = ""
    pause_s: float = 0.0
    until: float = 0.0

    def failed(self, reason: str, now: float) -> None:
        """Pause, twice as long as the last time in a row."""
        self.reason = reason
        self.pause_s = min(max(2 * self.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self.until = now + self.pause_s

    def succeeded(self) -> None:
        """The drafter works."""
        self.reason, self.pause_s = "", 0.0


class Drafting:
    """Proposals for a batch of requests, from at most one drafter (None: all are empty).

    A request that asked for no drafting is never shown to the drafter.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        budget: Budget,
        max_rows: int,
        vocab_size: int,
        guard: bool = True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``max_rows``: positions of one request that the drafter is shown in a call; ``now``: a clock in seconds."""
        self.drafter = drafter
        self.budget = budget
        self.vocab_size = vocab_size
        self.backlog = None if drafter is None else Backlog(drafter, max_rows)
        self.guard = DraftGuard() if guard else None
        self.recovery = Recovery()
        self.now = now
        self.abandoned: set[int] = set()  # slots whose rows in the drafter are spoilt, until their requests end

    @property
    def status(self) -> DraftingStatus:
        """For health checks; may be read from any thread."""
        if self.drafter is None:
            return DraftingStatus(DraftingState.OFF, "no drafter is loaded")
        if self.recovery.reason:
            left = max(0.0, self.recovery.until - self.now())
            return DraftingStatus(DraftingState.FAILED, f"{self.recovery.reason}; tried again in {left:.0f} s")
        if self.guard is not None and not self.guard.wants_draft(1):
            return DraftingStatus(DraftingState.UNPROFITABLE, "drafted rounds give fewer tokens/s than plain ones")
        return DraftingStatus(DraftingState.ON)

    def propose(self, batch: Sequence[RunningSequence]) -> list[Proposal]:
        """One tree for each request, none deeper than what the request may still get."""
        wanted = [s for s in batch if self._drafts_for(s) and s.num_left > 1]
        if not wanted or not self._may_draft(batch):
            return [PLAIN] * len(batch)
        trees = self._attempt(lambda: self._trees(wanted)) or [PLAIN] * len(wanted)
        by_slot = {s.slot: tree for s, tree in zip(wanted, trees, strict=True)}
        return [by_slot.get(s.slot, PLAIN) for s in batch]

    def observe(self, sequence: RunningSequence, features: Tensor, next_ids: Sequence[int]) -> None:
        """Committed positions of a request: their features [n, width] and the tokens that follow them."""
        if self.backlog is not None and self._drafts_for(sequence):
            self.backlog.add(Observation(sequence.slot, features, next_ids))

    def catch_up(self, batch: Sequence[RunningSequence]) -> None:
        """Show the drafter what it has not seen, where these requests would be drafted for."""
        if self.backlog is not None and self._may_draft(batch):
            self._attempt(self.backlog.show)

    def record(self, batch: Sequence[RunningSequence], drafted: bool, tokens: int, seconds: float) -> None:
        """A finished round: the tokens it gave and how long it took."""
        if self.guard is not None and any(s.request.draft for s in batch):
            self.guard.record(len(batch), drafted, tokens, seconds)

    def release(self, slot: int) -> None:
        """A request has left its slot."""
        self.abandoned.discard(slot)
        if self.drafter is not None and self.backlog is not None:
            self.backlog.release(slot)
            self.drafter.release(slot)

    def failed(self, error: Exception) -> None:
        """The drafter, or the tree it proposed, broke a round."""
        self.recovery.failed(f"{type(error).__name__}: {error}", self.now())
        logger.warning(
            "drafting failed and is tried again in %.0f s; requests go on without it",
            self.recovery.pause_s, exc_info=error,
        )  # fmt: skip

    def _attempt(self, work: Callable[[], Result]) -> Result | None:
        """Whatever work gives; None, and a pause, where the drafter fails."""
        try:
            result = work()
        except Exception as error:
            self.failed(error)
            return None
        if self.recovery.reason:
            logger.info("drafting works again")
            self.recovery.succeeded()
        return result

    def _trees(self, wanted: Sequence[RunningSequence]) -> list[Proposal]:
        """The drafter's trees, checked, each cut to the depth its request can use."""
        assert self.drafter is not None
        assert self.backlog is not None
        self.backlog.show()
        budget = self.budget
        depth = min(budget.depth, max(s.num_left for s in wanted) - 2)
        states = [DraftState(s.slot, s.token_ids) for s in wanted]
        trees = self.drafter.propose(states, Budget(budget.rows, budget.top_k, depth))
        for sequence, tree in zip(wanted, trees, strict=True):
            self._check(sequence, tree)
        # The last token of a request is the target's own, so a draft at that depth would be thrown away.
        return [tree.cut(s.num_left - 1) for s, tree in zip(wanted, trees, strict=True)]

    def _check(self, sequence: RunningSequence, tree: Proposal) -> None:
        """Refuse what no drafter may propose; where its numbers are none, its rows for the request are spoilt."""
        if any(math.isnan(log_prob) for log_prob in tree.log_probs):
            self.abandoned.add(sequence.slot)
            raise DrafterError("the drafter's log-probabilities are not numbers")
        unknown = [token_id for token_id in tree.token_ids if not 0 <= token_id < self.vocab_size]
        if unknown:
            raise DrafterError(f"the drafter proposed token {unknown[0]} of a vocabulary of {self.vocab_size}")

    def _drafts_for(self, sequence: RunningSequence) -> bool:
        return self.drafter is not None and sequence.request.draft and sequence.slot not in self.abandoned

    def _may_draft(self, batch: Sequence[RunningSequence]) -> bool:
        """Whether this batch would be drafted for: somebody wants it, the drafter works, and it pays."""
        if not any(self._drafts_for(s) for s in batch) or self.now() < self.recovery.until:
            return False
        return self.guard is None or self.guard.wants_draft(len(batch))
