"""The loop: admit, prefill a chunk, then one round over everything that decodes.

A round: the drafter proposes one tree per request -> the target verifies all rows of all requests in one forward pass
-> acceptance picks each path -> the slots keep its rows. What was committed is shown to the drafter, with the target's
true features, before it drafts again. Plain decoding is the same round with empty proposals.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from drafters.drafter import Drafter, DraftState, Observation
from drafters.proposal import Budget, Proposal
from server.engine.acceptance import Accepted, Choose, accept, greedy
from server.engine.guard import DraftGuard
from server.engine.observations import Observations
from server.engine.request import (
    ContextTooLong,
    EngineError,
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    TokensEvent,
)
from server.engine.sampling import chooser
from server.engine.scheduler import Scheduler
from server.engine.scheduler import Sequence as RunningSequence
from server.targets.target import PrefillChunk, Target, Verified, VerifyRows

logger = logging.getLogger(__name__)

Step = Callable[[list[RunningSequence]], list[Event]]


@dataclass(frozen=True)
class EngineOptions:
    """max_seqs: requests that run at once; context_length: prompt and output together; prefill_chunk: prompt tokens
    between two rounds of the others; guard: whether drafting may be switched off where it does not pay."""

    max_seqs: int = 4
    context_length: int = 2048
    budget: Budget = field(default_factory=Budget)
    prefill_chunk: int = 256
    guard: bool = True


@dataclass
class RoundClock:
    """Where the time of decoding rounds went, in seconds, and what they did."""

    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    rounds: int = 0
    rows: int = 0
    tokens: int = 0

    def reset(self) -> None:
        """Start counting anew."""
        self.draft_s = self.verify_s = self.other_s = 0.0
        self.rounds = self.rows = self.tokens = 0


class Engine:
    """Requests in, events out. One thread calls it; ``EngineThread`` is that thread in the server."""

    def __init__(self, target: Target, drafter: Drafter | None, options: EngineOptions) -> None:
        self.target = target
        self.drafter = drafter
        self.options = options
        self.scheduler = Scheduler(options.max_seqs)
        self.guard = DraftGuard()
        self.clock = RoundClock()
        self.observations = Observations(drafter, options.prefill_chunk) if drafter is not None else None
        self.seeds: dict[str, int] = {}

    def check(self, request: Request) -> None:
        """Refuse what could never run: EngineError for an empty prompt or no tokens wanted, ContextTooLong."""
        if not request.prompt_ids or request.max_tokens < 1:
            raise EngineError(
                f"{len(request.prompt_ids)} prompt tokens and max_tokens {request.max_tokens}; both must be at least 1"
            )
        if len(request.prompt_ids) + request.max_tokens > self.options.context_length:
            raise ContextTooLong(len(request.prompt_ids), request.max_tokens, self.options.context_length)

    def submit(self, request: Request) -> None:
        """Queue a request, after ``check``."""
        self.check(request)
        seed = request.sampling.seed
        self.seeds[request.request_id] = secrets.randbits(63) if seed is None else seed
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> list[Event]:
        """End a request wherever it is; its slot is free at once. Unknown ids are nobody's loss."""
        sequence = self.scheduler.remove(request_id)
        return [] if sequence is None else [self._finished(sequence, FinishReason.CANCELLED)]

    def step(self) -> list[Event]:
        """One turn. An error fails the requests it touched and nothing else."""
        self.scheduler.admit()
        events: list[Event] = []
        waiting = self.scheduler.next_prefill()
        if waiting is not None:
            events += self._guarded([waiting], self._prefill)
        decoding = self.scheduler.decoding()
        if decoding:
            events += self._guarded(decoding, self._round)
        return events

    def _guarded(self, batch: list[RunningSequence], work: Step) -> list[Event]:
        try:
            return work(batch)
        except Exception as error:
            logger.exception("a step failed; its %d requests are ended", len(batch))
            alive = [s for s in batch if s.request.request_id in self.scheduler.running]
            return [self._end(sequence, FinishReason.FAILED, f"{type(error).__name__}: {error}") for sequence in alive]

    def _prefill(self, batch: list[RunningSequence]) -> list[Event]:
        """One chunk of one prompt; behind the last chunk, the first token."""
        (sequence,) = batch
        start = sequence.num_prefilled
        chunk = sequence.request.prompt_ids[start : start + self.options.prefill_chunk]
        result = self.target.prefill(PrefillChunk(sequence.slot, chunk))
        sequence.num_prefilled += len(chunk)
        events: list[Event] = []
        if sequence.is_prefilled:
            choose = chooser(sequence, self.seeds[sequence.request.request_id], lambda _: result.logits)
            events = self._commit(sequence, Accepted((), (choose(0, ()),)))
        if self.observations is not None and sequence.request.request_id in self.scheduler.running:
            next_ids = sequence.token_ids[start + 1 : start + 1 + len(chunk)]
            self.observations.add(Observation(sequence.slot, result.features, next_ids))
            if self._may_draft([sequence]):
                self.observations.flush()
        return events

    def _round(self, batch: list[RunningSequence]) -> list[Event]:
        """Propose, verify, accept, keep, observe."""
        started = time.perf_counter()
        proposals = self._propose(batch)
        drafted = time.perf_counter()
        verified = self.target.verify(
            [VerifyRows(s.slot, s.token_ids[-1], p) for s, p in zip(batch, proposals, strict=True)]
        )
        greedy_ids = verified.argmax() if any(s.request.sampling.is_plain_greedy for s in batch) else []
        checked = time.perf_counter()
        events: list[Event] = []
        first_row = num_tokens = 0
        for sequence, proposal in zip(batch, proposals, strict=True):
            choose = self._chooser(sequence, verified, greedy_ids, first_row, proposal.num_rows)
            accepted = accept(proposal, choose)
            sequence.stats.rounds += 1
            sequence.stats.drafted += len(proposal)
            num_before = sequence.num_output
            events += self._commit(sequence, accepted)
            num_tokens += sequence.num_output - num_before
            if sequence.request.request_id in self.scheduler.running:
                self._keep(sequence, accepted, verified, first_row)
            first_row += proposal.num_rows
        self._account(batch, proposals, num_tokens, (started, drafted, checked, time.perf_counter()))
        return events

    def _propose(self, batch: list[RunningSequence]) -> list[Proposal]:
        """One tree per request, none larger than what the request may still get."""
        plain = Proposal()
        if self.drafter is None or self.observations is None or not self._may_draft(batch):
            return [plain] * len(batch)
        self.observations.flush()
        # A tree deeper than the tokens left would be thrown away; the last token of a request is never drafted for.
        wanted = [s for s in batch if s.request.draft and s.num_left > 1]
        if not wanted:
            return [plain] * len(batch)
        deepest = max(s.num_left for s in wanted) - 2
        budget = self.options.budget
        budget = Budget(budget.rows, budget.top_k, min(budget.depth, deepest))
        trees = self.drafter.propose([DraftState(s.slot, s.token_ids) for s in wanted], budget)
        by_slot = {s.slot: tree for s, tree in zip(wanted, trees, strict=True)}
        return [by_slot.get(s.slot, plain) for s in batch]

    def _may_draft(self, batch: Sequence[RunningSequence]) -> bool:
        """Whether this batch would be drafted for: somebody wants it, and the guard does not object."""
        if not any(s.request.draft for s in batch):
            return False
        return not self.options.guard or self.guard.wants_draft(len(batch))

    def _chooser(
        self, sequence: RunningSequence, verified: Verified, greedy_ids: list[int], first_row: int, num_rows: int
    ) -> Choose:
        if sequence.request.sampling.is_plain_greedy:
            return greedy(greedy_ids[first_row : first_row + num_rows])
        seed = self.seeds[sequence.request.request_id]
        return chooser(sequence, seed, lambda row: verified.logits([first_row + row])[0])

    def _commit(self, sequence: RunningSequence, accepted: Accepted) -> list[Event]:
        """Append what acceptance gave, as far as the request goes; end the request where it ends."""
        sequence.timings.first_token = sequence.timings.first_token or time.monotonic()
        token_ids, reason = sequence.commit(accepted.token_ids)
        drafted = tuple(i < accepted.num_drafts for i in range(len(token_ids)))
        if accepted.rows:
            sequence.stats.accepted += sum(drafted)
            sequence.stats.committed += len(token_ids)
        events: list[Event] = [TokensEvent(sequence.request.request_id, token_ids, drafted)]
        if reason is not None:
            events.append(self._end(sequence, reason))
        return events

    def _keep(self, sequence: RunningSequence, accepted: Accepted, verified: Verified, first_row: int) -> None:
        """The target keeps the path's rows; the drafter will see their features."""
        self.target.keep(sequence.slot, accepted.rows)
        if self.observations is not None:
            features = verified.features[[first_row + row for row in accepted.rows]]
            self.observations.add(Observation(sequence.slot, features, accepted.token_ids))

    def _end(self, sequence: RunningSequence, reason: FinishReason, error: str | None = None) -> FinishedEvent:
        self.scheduler.remove(sequence.request.request_id)
        return self._finished(sequence, reason, error)

    def _finished(self, sequence: RunningSequence, reason: FinishReason, error: str | None = None) -> FinishedEvent:
        """Clean up behind a request that has left the scheduler."""
        if sequence.slot >= 0:
            self.target.release(sequence.slot)
            if self.observations is not None:
                self.observations.release(sequence.slot)
        self.seeds.pop(sequence.request.request_id, None)
        sequence.timings.finished = time.monotonic()
        return FinishedEvent(sequence.request.request_id, reason, sequence.stats, sequence.timings, error)

    def _account(
        self,
        batch: Sequence[RunningSequence],
        proposals: Sequence[Proposal],
        num_tokens: int,
        moments: tuple[float, float, float, float],
    ) -> None:
        """Share the round's time out, and tell the guard."""
        started, drafted, checked, ended = moments
        self.clock.draft_s += drafted - started
        self.clock.verify_s += checked - drafted
        self.clock.other_s += ended - checked
        self.clock.rounds += 1
        self.clock.rows += sum(proposal.num_rows for proposal in proposals)
        self.clock.tokens += num_tokens
        if self.drafter is not None and any(s.request.draft for s in batch):
            self.guard.record(len(batch), any(map(len, proposals)), num_tokens, ended - started)
