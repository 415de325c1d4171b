"""Who runs next: a first-come queue, a fixed number of slots, one prefill chunk a step. Policy only, no torch here."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

from server.engine.request import DraftStats, FinishReason, Request, Timings
from server.engine.slots import SlotPool


@dataclass
class Sequence:
    """A request in the engine: its slot, every committed token (prompt first) and how far the prompt is prefilled."""

    request: Request
    token_ids: list[int]
    slot: int = -1
    num_prefilled: int = 0
    stats: DraftStats = field(default_factory=DraftStats)
    timings: Timings = field(default_factory=Timings)
    output_counts: Counter[int] = field(default_factory=Counter)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        """Tokens committed behind the prompt."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens the request may still get."""
        return self.request.max_tokens - self.num_output

    @property
    def is_prefilled(self) -> bool:
        """Whether the prompt is through, so the sequence decodes."""
        return self.num_prefilled == self.num_prompt

    def commit(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Append tokens up to the first stop id or the token limit; (what was appended, why it ends or None)."""
        for count, token_id in enumerate(token_ids, 1):
            self.token_ids.append(token_id)
            self.output_counts[token_id] += 1
            if token_id in self.request.stop_ids:
                return token_ids[:count], FinishReason.STOP
            if self.num_left == 0:
                return token_ids[:count], FinishReason.LENGTH
        return token_ids, None


class Scheduler:
    """Waiting and running requests. Prefill goes first come, first served; everything prefilled decodes together."""

    def __init__(self, num_slots: int) -> None:
        self.slots = SlotPool(num_slots)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(Sequence(request, list(request.prompt_ids)))

    def admit(self) -> list[Sequence]:
        """Move waiting requests into free slots, in order."""
        admitted = []
        while self.waiting and self.slots.free:
            sequence = self.waiting.popleft()
            slot = self.slots.allocate(sequence.request.request_id)
            assert slot is not None
            sequence.slot = slot
            sequence.timings.admitted = time.monotonic()
            self.running[sequence.request.request_id] = sequence
            admitted.append(sequence)
        return admitted

    def next_prefill(self) -> Sequence | None:
        """The first running request whose prompt is not through."""
        return next((s for s in self.running.values() if not s.is_prefilled), None)

    def decoding(self) -> list[Sequence]:
        """All running requests whose prompt is through, in order of admission."""
        return [s for s in self.running.values() if s.is_prefilled]

    def remove(self, request_id: str) -> Sequence | None:
        """Take a request out, wherever it is; its slot is free afterwards. None if it is not here any more."""
        sequence = self.running.pop(request_id, None)
        if sequence is not None:
            self.slots.release(sequence.slot)
            return sequence
        for waiting in self.waiting:
            if waiting.request.request_id == request_id:
                self.waiting.remove(waiting)
                return waiting
        return None
