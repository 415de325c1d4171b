"""Everything about drafting: the drafter, what it has not seen yet, which drafts pay, and what happens when it fails.

Nothing that goes wrong in here reaches a request: a drafter that raises, runs out of memory or gives numbers that are
none costs the round its drafts. The requests go on plainly, what the drafter has not seen waits, and it is tried again
after a pause that doubles with every failure in a row.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from drafters.drafter import Drafter, DrafterError, DraftState, Observation
from drafters.ngram import Copied, NGramDrafter
from drafters.proposal import Budget, Proposal
from server.engine.acceptance import Accepted
from server.engine.backlog import Backlog
from server.engine.calibration import DRAFTER, FORCED, LOOKUP, Calibration
from server.engine.candidates import NOTHING, Candidates, choose_rows, learn_unused, merge, possible, sorted_gains
from server.engine.cost import Costs, Spent, best_count
from server.engine.ledger import Ledger
from server.engine.request import TokenFilter
from server.engine.sequence import RunningSequence
from server.placement.recovery import Recovery

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PLAIN = Proposal()
ROUNDS_TO_CATCH_UP = 4  # over which the cost of showing the drafter what it has missed is spread


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


@dataclass(frozen=True)
class DraftingOptions:
    """budget: the largest tree of a request; lookup: whether chains copied from a request's own text are drafted too;
    max_rows: positions of one request that the drafter is shown in a call; vocab_size: the target's."""

    budget: Budget
    lookup: bool
    max_rows: int
    vocab_size: int


class Drafting:
    """Drafts for a batch of requests from up to three stages: a drafter, chains copied from the request's own text, and
    what its grammar forces.

    With ``costs`` every round verifies the rows that are expected to pay and asks the drafter only where it does;
    without, every tree is as large as the budget allows. A request that asked for no drafting is never shown to the
    drafter.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        options: DraftingOptions,
        costs: Costs | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``now``: a clock in seconds, for pauses and for the cost of drafting."""
        self.drafter = drafter
        self.options = options
        self.costs = costs
        self.now = now
        self.lookup = NGramDrafter() if options.lookup else None
        self.backlog = None if drafter is None else Backlog(drafter, options.max_rows)
        self.calibration = Calibration()
        self.ledger = Ledger()
        self.recovery = Recovery()
        self.pays = True

    @property
    def status(self) -> DraftingStatus:
        """For health checks; may be read from any thread."""
        if self.drafter is None:
            state = DraftingState.OFF if self.lookup is None else DraftingState.ON
            return DraftingStatus(state, "no drafter is loaded" + ("" if self.lookup is None else "; lookup is on"))
        if self.recovery.reason:
            left = max(0.0, self.recovery.until - self.now())
            return DraftingStatus(DraftingState.FAILED, f"{self.recovery.reason}; tried again in {left:.0f} s")
        if not self.pays:
            return DraftingStatus(DraftingState.UNPROFITABLE, "its drafts are expected to cost more than they bring")
        return DraftingStatus(DraftingState.ON)

    def propose(self, batch: Sequence[RunningSequence]) -> list[Candidates]:
        """The drafts to verify for each request, none deeper than what the request may still get."""
        wanted = [s for s in batch if s.request.draft and s.num_left > 1]
        if not wanted or (self.drafter is None and self.lookup is None):
            return [NOTHING] * len(batch)
        self.calibration.round += 1
        if self._all_rest and not any(s.request.grammar is not None for s in wanted):
            self.pays = False
            return [NOTHING] * len(batch)
        copied = {s.slot: self._copy(s) for s in wanted}
        found = {s.slot: self._merge(s, PLAIN, copied[s.slot]) for s in wanted}
        drafted = [s for s in wanted if s.drafts]
        depth = self._depth(len(batch), drafted, list(found.values()))
        if depth is not None:
            started = self.now()
            trees = self._attempt(lambda: self._trees(drafted, depth)) or []
            self.ledger.drafted(DRAFTER, self.now() - started)
            found |= {s.slot: self._merge(s, tree, copied[s.slot]) for s, tree in zip(drafted, trees, strict=False)}
        return self._choose([found.get(s.slot, NOTHING) for s in batch])

    def observe(self, sequence: RunningSequence, features: Tensor, next_ids: Sequence[int]) -> None:
        """Committed positions of a request: their features [n, width] and the tokens that follow them."""
        if self.backlog is not None and sequence.drafts:
            self.backlog.add(Observation(sequence.slot, features, next_ids))

    def learn(self, sequence: RunningSequence, drafts: Candidates, accepted: Accepted) -> None:
        """What became of a request's drafts."""
        for draft, is_accepted in drafts.tried(accepted):
            for cell, prior in draft.cells:
                self.calibration.add(cell, prior, is_accepted, sequence.record)
        self.calibration.add_levels(drafts.followed(accepted))
        self.ledger.verified(drafts, accepted)

    def catch_up(self) -> None:
        """Show the drafter what it has not seen, where it is expected to draft."""
        if self.backlog is not None and self.pays and self.now() >= self.recovery.until:
            started = self.now()
            self._attempt(self.backlog.show)
            self.ledger.drafted(DRAFTER, self.now() - started)

    def record(self, spent: Spent) -> None:
        """A finished round."""
        if self.costs is not None and spent.num_requests:
            drafted = self.ledger.drafter_worked
            self.ledger.close(self.costs, spent)
            self.costs.record(spent, drafted=drafted)

    def release(self, slot: int) -> None:
        """A request has left its slot."""
        if self.lookup is not None:
            self.lookup.release(slot)
        if self.drafter is not None and self.backlog is not None:
            self.backlog.release(slot)
            try:
                self.drafter.release(slot)
            except Exception as error:
                self.failed(error)

    def check_integrity(self, held: Collection[int]) -> None:
        """Raises DrafterError where something waits for a slot that nobody holds."""
        stray = set(self.backlog.waiting if self.backlog is not None else ()) - set(held)
        if stray:
            raise DrafterError(f"positions wait for the slots {sorted(stray)}, which nobody holds")

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

    def _copy(self, sequence: RunningSequence) -> Copied:
        """What followed the same words before, as much of it as the request may still get."""
        if self.lookup is None or not sequence.request.lookup or not self._may(LOOKUP):
            return Copied()
        count = min(self._rows(sequence) - 1, sequence.num_left - 1)
        return self.lookup.lookup(DraftState(sequence.slot, sequence.token_ids), count)

    @property
    def _all_rest(self) -> bool:
        """Whether neither stage may cost anything now; then a round takes what a plain one takes."""
        may_copy = self.lookup is not None and self._may(LOOKUP)
        return not may_copy and (self.drafter is None or not self._may(DRAFTER))

    def _may(self, stage: str) -> bool:
        """Whether a stage may cost anything now; without costs nobody counts."""
        return self.costs is None or self.ledger.may_draft(stage)

    def _merge(self, sequence: RunningSequence, tree: Proposal, copied: Copied) -> Candidates:
        """One request's drafts of all stages: those its grammar has a place for, the best where there are too many."""
        # The last token of a request is the target's own, so a draft at that depth would be thrown away.
        tree = tree.cut(sequence.num_left - 1)
        grammar = sequence.request.grammar
        if grammar is None:
            merged = merge(tree, copied.token_ids, copied.match_length, self.calibration, sequence.record)
            return merged.best(self._rows(sequence) - 1)
        try:
            merged = self._held_to(grammar, sequence, tree, copied)
        except Exception:  # whoever asks for the next token is told the same, and ends the request
            logger.warning("request %s: no drafts, its grammar failed", sequence.request_id, exc_info=True)
            return NOTHING
        return merged.best(self._rows(sequence) - 1)

    def _held_to(self, grammar: TokenFilter, sequence: RunningSequence, tree: Proposal, copied: Copied) -> Candidates:
        """The drafts that a grammar has a place for, and those that it forces."""
        output_ids = sequence.token_ids[sequence.num_prompt :]
        count = min(self._rows(sequence), sequence.num_left) - 1
        forced = grammar.forced(output_ids)[:count] if self._may(FORCED) else ()
        merged = merge(tree, copied.token_ids, copied.match_length, self.calibration, sequence.record, forced)
        return merged.select(possible(merged.tree, lambda token_ids: grammar.follows(output_ids, token_ids)))

    def _rows(self, sequence: RunningSequence) -> int:
        """The largest tree of a request, the root included."""
        return min(self.options.budget.rows, sequence.request.max_rows or self.options.budget.rows)

    def _depth(self, num_requests: int, drafted: Sequence[RunningSequence], copied: Sequence[Candidates]) -> int | None:
        """How many levels behind the first to ask the drafter for; None where it is not to be asked."""
        if self.drafter is None or self.backlog is None or not drafted or self.now() < self.recovery.until:
            return None
        if not self._may(DRAFTER):
            self.pays = False
            return None
        deepest = min(self.options.budget.depth, max(s.num_left for s in drafted) - 2)
        costs = self.costs
        if costs is None:
            return deepest
        _, best_s = best_count(costs, num_requests, sorted_gains(copied))
        factor = sum(s.record.factor(DRAFTER) for s in drafted) / len(drafted)
        beside_s = costs.draft.row_s * self.backlog.num_rows / ROUNDS_TO_CATCH_UP + costs.verify.slowing_s(num_requests)
        best: int | None = None
        for depth in range(deepest + 1):
            num_tokens = min(depth + 1, self.options.budget.rows - 1)
            gain = len(drafted) * self.calibration.expected_depth(num_tokens, factor)
            draft_s = beside_s + costs.draft.seconds(len(drafted), depth)
            saved_s = costs.saved_s(num_requests, gain, len(drafted) * num_tokens, draft_s)
            if saved_s > best_s:
                best, best_s = depth, saved_s
        self.pays = best is not None
        return best

    def _trees(self, drafted: Sequence[RunningSequence], depth: int) -> list[Proposal]:
        """The drafter's trees, checked, once it has seen everything."""
        assert self.drafter is not None
        assert self.backlog is not None
        started, num_behind = self.now(), self.backlog.num_rows
        self.backlog.show()
        budget = Budget(self.options.budget.rows, self.options.budget.top_k, depth)
        trees = self.drafter.propose([DraftState(s.slot, s.token_ids) for s in drafted], budget)
        if self.costs is not None:
            self.costs.draft.record(len(drafted), depth, num_behind, self.now() - started)
        if len(trees) != len(drafted):
            raise DrafterError(f"the drafter proposed {len(trees)} trees for {len(drafted)} requests")
        for sequence, tree in zip(drafted, trees, strict=True):
            self._check(sequence, tree)
        return trees

    def _check(self, sequence: RunningSequence, tree: Proposal) -> None:
        """Refuse what no drafter may propose; where its numbers are none, its rows for the request are spoilt."""
        if any(math.isnan(log_prob) for log_prob in tree.log_probs):
            sequence.drafts = False
            raise DrafterError("the drafter's log-probabilities are not numbers")
        unknown = [token_id for token_id in tree.token_ids if not 0 <= token_id < self.options.vocab_size]
        if unknown:
            raise DrafterError(f"the drafter proposed token {unknown[0]} of a vocabulary of {self.options.vocab_size}")

    def _choose(self, found: list[Candidates]) -> list[Candidates]:
        """The nodes worth their rows, over all requests together; without costs, all of them."""
        if self.costs is None:
            return found
        count, _ = best_count(self.costs, len(found), sorted_gains(found))
        chosen = choose_rows(found, count)
        learn_unused(self.calibration, found, chosen)
        return chosen
