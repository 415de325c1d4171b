"""The loop: requests in, events out. Everything else in this folder is a part of one of these lines.

1. Admit: waiting requests get free slots and rows, the most urgent first; where rows run out the least urgent waits.
2. Prefill: the target reads one chunk of one text; behind a prompt's last chunk its own choice is the first token.
3. Propose: ``Drafting`` gives each decoding request a tree of tokens, or an empty one, which is plain decoding.
4. Verify: the target runs all rows of all requests in one forward pass; each request gets its share of it.
5. Accept: the path of the tree along the target's own choices, and the choice behind it, become the request's text.
6. Keep: the target commits the path's rows; all others are dropped. A request that has ended frees its slot.
7. Observe: what was committed waits, with the target's true features, until the drafter is next asked for a tree.
8. An error ends the one request it belongs to; an error in drafting ends none: the round goes on without drafts.
9. The text of a request is the same whatever is drafted, whoever runs beside it, and however often it had to wait.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drafters.drafter import Drafter
from drafters.proposal import Budget
from server.engine.acceptance import Accepted, accept
from server.engine.candidates import NOTHING, Candidates
from server.engine.cost import Costs, PrefillPace, Spent
from server.engine.drafting import Drafting, DraftingOptions
from server.engine.figures import Counts, EngineFigures
from server.engine.logprobs import rank, rank_prompt
from server.engine.pooling import pool_prompt
from server.engine.prefix_cache import PrefixCache
from server.engine.request import (
    ContextTooLong,
    EngineError,
    Event,
    FinishedEvent,
    FinishReason,
    GrammarStuck,
    Ranked,
    Request,
    TokensEvent,
)
from server.engine.sampling import chooser, prompt_chooser
from server.engine.scheduler import Limits, Scheduler
from server.engine.sequence import RunningSequence, Status
from server.targets.target import PrefillChunk, Prefilled, Target, Verified, VerifyRows

logger = logging.getLogger(__name__)

OBSERVED_ROWS = 256  # positions of one request that the drafter is shown in a call


@dataclass(frozen=True)
class EngineOptions:
    """max_seqs: requests that run at once; context_length: prompt and output together; budget: the largest tree of a
    request; prefill_chunk: tokens of a prompt's chunk on targets without exact rows, on others time decides; lookup:
    whether chains copied from a request's own text are drafted; cache_bytes: the most that cached prompts may take, 0
    keeps none; pool_rows: rows that all slots together may hold, None: every slot may be full."""

    max_seqs: int = 4
    context_length: int = 2048
    budget: Budget = field(default_factory=Budget)
    prefill_chunk: int = 64
    lookup: bool = False
    cache_bytes: int = 0
    pool_rows: int | None = None

    @property
    def longest(self) -> int:
        """Rows that one request may need."""
        return self.context_length + self.budget.rows


@dataclass
class RoundClock:
    """Where the time of decoding rounds went, in seconds, and what they did."""

    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    rounds: int = 0
    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Turn:
    """One request in one round: its drafts and its share of the verify pass."""

    sequence: RunningSequence
    drafts: Candidates
    verified: Verified


class Engine:
    """Requests in, events out. One thread calls it; ``EngineThread`` is that thread in the server."""

    def __init__(
        self, target: Target, drafter: Drafter | None, options: EngineOptions, costs: Costs | None = None
    ) -> None:
        """``costs`` of target and drafter: rows are chosen by them; None: trees are as large as the budget allows."""
        num_rows = options.max_seqs * options.longest if options.pool_rows is None else options.pool_rows
        if num_rows < options.longest:
            raise EngineError(f"a pool of {num_rows} rows holds no request of {options.longest}")
        self.target = target
        self.options = options
        fixed_chunk = None if target.info.exact_rows else options.prefill_chunk
        limits = Limits(options.max_seqs, num_rows, options.budget.rows, fixed_chunk)
        self.scheduler = Scheduler(limits, PrefillPace() if costs is None else costs.prefill_pace())
        drafting = DraftingOptions(options.budget, options.lookup, OBSERVED_ROWS, target.info.vocab_size)
        self.drafting = Drafting(drafter, drafting, costs)
        cached = options.cache_bytes > 0
        self.prefixes = PrefixCache(target, options.prefill_chunk, options.cache_bytes) if cached else None
        self.clock = RoundClock()
        self.counts = Counts()

    def check(self, request: Request) -> None:
        """Refuse what could never run: EngineError for an empty prompt, ContextTooLong."""
        if not request.prompt_ids or request.max_tokens < 0:
            raise EngineError(
                f"{len(request.prompt_ids)} prompt tokens and max_tokens {request.max_tokens}; "
                "at least 1 and 0 are needed"
            )
        if len(request.prompt_ids) + request.max_tokens > self.options.context_length:
            raise ContextTooLong(len(request.prompt_ids), request.max_tokens, self.options.context_length)

    def submit(self, request: Request) -> None:
        """Queue a request, after ``check``."""
        self.check(request)
        self.scheduler.add(RunningSequence.of(request))

    def cancel(self, request_id: str) -> list[Event]:
        """End a request wherever it is; its slot is free at once. Unknown ids are nobody's loss."""
        sequence = self.scheduler.find(request_id)
        return [] if sequence is None else [self._end(sequence, FinishReason.CANCELLED)]

    def fail_running(self, error: Exception) -> list[Event]:
        """End all that hold a slot, after a step that threw."""
        text = f"{type(error).__name__}: {error}"
        return [self._end(each, FinishReason.FAILED, text) for each in list(self.scheduler.running.values())]

    def step(self) -> list[Event]:
        """One turn: a chunk of a prompt, then a round of everything that decodes."""
        while (sequence := self.scheduler.in_the_way()) is not None:
            self._preempt(sequence)
        self.scheduler.admit()
        events: list[Event] = []
        waiting = self.scheduler.next_prefill()
        if waiting is not None:
            events += self._alone(waiting, functools.partial(self._prefill, waiting))
        while (sequence := self.scheduler.crowded_out()) is not None:
            self._preempt(sequence)
        decoding = self.scheduler.decoding()
        if decoding:
            events += self._round(decoding)
        return events

    def figures(self) -> EngineFigures:
        """What was done so far and how full it is. May be called from any thread, a moment old."""
        rows, scheduler, costs = self.scheduler.limits.num_rows, self.scheduler, self.drafting.costs
        return EngineFigures(
            self.counts,
            self.clock.draft_s,
            self.clock.verify_s,
            self.clock.other_s,
            kv_rows=sum(sequence.reserved for sequence in list(scheduler.running.values())),
            kv_capacity=rows,
            cache_bytes=0 if self.prefixes is None else self.prefixes.pages.num_bytes,
            verify_curve={} if costs is None else costs.verify.curve(),
        )

    def check_integrity(self) -> None:
        """Raises EngineError where a slot, a row or a page has leaked; for idle moments and tests."""
        self.scheduler.check_integrity()
        held = {sequence.slot for sequence in self.scheduler.running.values()}
        self.drafting.check_integrity(held)
        if self.prefixes is not None:
            self.prefixes.check_integrity(held)

    def _prefill(self, sequence: RunningSequence) -> list[Event]:
        """One chunk of one text; behind the last chunk of a prompt, the first token."""
        started = time.perf_counter()
        if sequence.num_rows == 0:
            self._restore(sequence)
            if sequence.num_output == 0:
                self.counts.prompt_tokens += sequence.num_prompt
                self.counts.cached_tokens += sequence.num_rows
        start = sequence.num_rows
        block = self.target.info.stream_block
        chunk = sequence.token_ids[start : start + self.scheduler.chunk_rows(sequence, block)]
        is_block = start == sequence.streamed < sequence.streamable(block)
        result = self.target.prefill(PrefillChunk(sequence.slot, chunk))
        sequence.read(len(chunk))
        if is_block and self.target.info.stream_block:  # else its device failed, and the CPU read it
            sequence.streamed = sequence.num_rows
        if self.prefixes is not None:
            self.prefixes.extend(sequence, result.features)
            self.prefixes.keep(sequence)  # at once: a whole prompt's pages would hold up those that decode
        events: list[Event] = [*rank_prompt(sequence, start, result), *pool_prompt(sequence, start, result.last)]
        if sequence.status is Status.DECODING and sequence.num_output == 0:
            events += self._begin_answer(sequence, result)
        if sequence.is_running:
            next_ids = sequence.token_ids[start + 1 : start + 1 + len(chunk)]
            self.drafting.observe(sequence, result.features, next_ids)
            self.drafting.catch_up()
        seconds = time.perf_counter() - started
        self.counts.prefill_s += seconds
        if not is_block:
            self.scheduler.pace.record(len(chunk), seconds)
        return events

    def _begin_answer(self, sequence: RunningSequence, result: Prefilled) -> list[Event]:
        """The first token, from the prompt's last row; the end where no answer is wanted."""
        if sequence.request.max_tokens == 0:
            return [self._end(sequence, FinishReason.LENGTH)]
        logits = result.logits
        token_id = prompt_chooser(sequence, logits)(0, ())
        return self._commit(sequence, Accepted((), (token_id,)), lambda: logits[None])

    def _restore(self, sequence: RunningSequence) -> None:
        """Take over what is known of a text; the drafter learns of it as of anything else.

        A prompt whose every row is wanted is read whole.
        """
        if sequence.request.wants_prompt_rows and sequence.num_output == 0:
            return
        features = None if self.prefixes is None else self.prefixes.restore(sequence)
        if self.prefixes is not None and features is not None:
            self.prefixes.extend(sequence, features)
            self.drafting.observe(sequence, features, sequence.token_ids[1 : sequence.num_rows + 1])

    def _round(self, batch: list[RunningSequence]) -> list[Event]:
        """Propose, verify, accept, keep, observe."""
        num_before = sum(len(s.token_ids) for s in batch)
        moments = [time.perf_counter()]
        drafts = self.drafting.propose(batch)
        moments.append(time.perf_counter())
        turns, events = self._verify(batch, drafts)
        moments.append(time.perf_counter())
        for turn in turns:
            events += self._alone(turn.sequence, functools.partial(self._settle, turn))
        moments.append(time.perf_counter())
        self._account(turns, sum(len(s.token_ids) for s in batch) - num_before, moments)
        return events

    def _verify(self, batch: list[RunningSequence], drafts: Sequence[Candidates]) -> tuple[list[Turn], list[Event]]:
        """One pass over all rows. Where it fails the trees are left out; where that fails too, each request runs alone,
        so that only those which cannot run are ended."""
        try:
            return self._pass(batch, drafts), []
        except Exception as error:
            if any(c.tree for c in drafts):
                self.drafting.failed(error)
                return self._verify(batch, [NOTHING] * len(batch))
        turns: list[Turn] = []
        events: list[Event] = []
        for sequence in batch:

            def alone(sequence: RunningSequence = sequence) -> list[Event]:
                turns.extend(self._pass([sequence], [NOTHING]))
                return []

            events += self._alone(sequence, alone)
        return turns, events

    def _pass(self, batch: list[RunningSequence], drafts: Sequence[Candidates]) -> list[Turn]:
        """The target's verify pass, with the arg-max of its rows where somebody wants that."""
        rows = [VerifyRows(s.slot, s.token_ids[-1], c.tree) for s, c in zip(batch, drafts, strict=True)]
        verified = self.target.verify(rows)
        if any(s.request.takes_argmax for s in batch):
            verified[0].argmax()
        return [Turn(*turn) for turn in zip(batch, drafts, verified, strict=True)]

    def _settle(self, turn: Turn) -> list[Event]:
        """Accept, keep, observe: what the round gives one request."""
        sequence = turn.sequence
        accepted = accept(turn.drafts.tree, chooser(sequence, turn.verified))
        sequence.stats.rounds += 1
        sequence.stats.drafted += len(turn.drafts.tree)
        self.counts.verified(len(turn.drafts.tree), accepted.num_drafts)
        self.drafting.learn(sequence, turn.drafts, accepted)
        events = self._commit(sequence, accepted, lambda: torch.stack([turn.verified.logits(r) for r in accepted.rows]))
        if sequence.is_running:
            self.target.keep(sequence.slot, accepted.rows)
            sequence.num_rows += len(accepted.rows)
            features = turn.verified.features(accepted.rows)
            self.drafting.observe(sequence, features, accepted.token_ids)
            if self.prefixes is not None:
                self.prefixes.extend(sequence, features)
        return events

    def _commit(self, sequence: RunningSequence, accepted: Accepted, logits: Callable[[], Tensor]) -> list[Event]:
        """Append what acceptance gave, as far as the request goes; end the request where it ends.

        ``logits()``: [accepted tokens, vocabulary], each token's own; asked for where the request ranks its tokens.
        """
        sequence.timings.first_token = sequence.timings.first_token or time.monotonic()
        token_ids, reason = sequence.commit(accepted.token_ids)
        self.counts.output_tokens += len(token_ids)
        drafted = tuple(i < accepted.num_drafts for i in range(len(token_ids)))
        if accepted.rows:
            sequence.stats.accepted += sum(drafted)
            sequence.stats.committed += len(token_ids)
            self.counts.passes += 1
            self.counts.pass_tokens += len(token_ids)
        num_top, ranked = sequence.request.num_logprobs, tuple[Ranked, ...]()
        if num_top is not None:
            ranked = rank(logits()[: len(token_ids)], token_ids, num_top)
        events: list[Event] = [TokensEvent(sequence.request_id, token_ids, drafted, ranked)]
        if reason is not None:
            events.append(self._end(sequence, reason))
        return events

    def _alone(self, sequence: RunningSequence, work: Callable[[], list[Event]]) -> list[Event]:
        """Do a request's own work; an error in it ends that request and no other."""
        try:
            return work()
        except GrammarStuck as error:
            return [self._end(sequence, FinishReason.STUCK, str(error))] if sequence.is_running else []
        except Exception as error:
            logger.exception("request %s failed and is ended", sequence.request_id)
            if not sequence.is_running:
                return []
            return [self._end(sequence, FinishReason.FAILED, f"{type(error).__name__}: {error}")]

    def _end(self, sequence: RunningSequence, reason: FinishReason, error: str | None = None) -> FinishedEvent:
        """Take a request out, wherever it is, and free what it held."""
        self._keep_pages(sequence, error is None)
        self._free(self.scheduler.remove(sequence))
        sequence.timings.finished = time.monotonic()
        return FinishedEvent(sequence.request_id, reason, sequence.stats, sequence.timings, error)

    def _preempt(self, sequence: RunningSequence) -> None:
        """Back into the queue; its tokens stay, its rows are read again, from the cache as far as that has them."""
        logger.info("request %s gives its rows back and waits for room", sequence.request_id)
        self.counts.preemptions += 1
        self._keep_pages(sequence)
        self._free(self.scheduler.preempt(sequence))

    def _keep_pages(self, sequence: RunningSequence, are_good: bool = True) -> None:
        """What a request that leaves its slot has read stays in the cache."""
        if self.prefixes is None or not sequence.is_running:
            return
        try:
            if are_good:
                self.prefixes.keep(sequence)
        except Exception:  # without memory, say: then it is read again
            logger.warning("the pages of request %s could not be kept", sequence.request_id, exc_info=True)
        self.prefixes.release(sequence.slot)

    def _free(self, slot: int | None) -> None:
        """Nobody holds this slot any more."""
        if slot is not None:
            self.target.release(slot)
            self.drafting.release(slot)

    def _account(self, turns: Sequence[Turn], num_tokens: int, moments: Sequence[float]) -> None:
        """Share the round's time out, and tell drafting what it gave."""
        started, drafted, checked, ended = moments
        self.clock.draft_s += drafted - started
        self.clock.verify_s += checked - drafted
        self.clock.other_s += ended - checked
        self.clock.rounds += 1
        rows = sum(turn.drafts.tree.num_rows for turn in turns)
        self.clock.rows += rows
        self.counts.rounds_of[rows] += 1
        self.clock.tokens += num_tokens
        self.drafting.record(Spent(len(turns), rows, num_tokens, drafted - started, checked - drafted, ended - checked))
