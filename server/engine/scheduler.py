"""Who runs next: the most urgent first, within a number of slots and of rows that all of them share. No torch here.

Urgency is (priority, due, arrival). A request is due when its ``deadline_s`` says, else after a few times what reading
its prompt takes: a short prompt passes a long one that came before it, and nothing waits for ever, because what comes
later is due later. Where rows run out, the least urgent request gives its own back and waits; it is read again when
there is room. A waiting request displaces a running one only where its priority is better, not where it is only due
sooner. Earliest deadline first is Liu and Layland's rule (J. ACM 20, 1973); due times from a prompt's length are ours.
"""

from __future__ import annotations

import itertools
import time
from bisect import insort
from dataclasses import dataclass

from server.engine.cost import PrefillPace
from server.engine.request import EngineError
from server.engine.sequence import RunningSequence, Status

PATIENCE = 4.0  # a request without a deadline is due after so many times what its prompt takes to read
CHUNK_S = 0.06  # of the 100 ms that a stream may wait for somebody's prompt: what a chunk takes is not known exactly
CHUNK_STEP = 8  # rows
HEADROOM = 64  # rows that each running request may still get before a newcomer's arrival makes anybody give way


@dataclass(frozen=True)
class Limits:
    """num_slots: requests that run at once; num_rows: rows that all slots together hold; round_rows: rows a request may
    need behind its text in a round; fixed_chunk: tokens of a prompt's chunk where those must lie by position, None
    where their size is free."""

    num_slots: int
    num_rows: int
    round_rows: int
    fixed_chunk: int | None = None


class Scheduler:
    """Waiting and running requests, and who gets the next slot, the next chunk and the rows."""

    def __init__(self, limits: Limits, pace: PrefillPace) -> None:
        self.limits = limits
        self.pace = pace
        self.free_slots = list(range(limits.num_slots))
        self.waiting: list[RunningSequence] = []  # the most urgent first
        self.running: dict[str, RunningSequence] = {}
        self.arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    @property
    def free_rows(self) -> int:
        """Rows that no running request has reserved."""
        return self.limits.num_rows - sum(sequence.reserved for sequence in self.running.values())

    def add(self, sequence: RunningSequence) -> None:
        """Queue a request."""
        request = sequence.request
        wait_s = request.deadline_s
        if wait_s is None:
            wait_s = PATIENCE * self.pace.seconds(sequence.num_prompt)
        sequence.urgency = (request.priority, sequence.timings.submitted + wait_s, next(self.arrivals))
        insort(self.waiting, sequence, key=_urgency)

    def in_the_way(self) -> RunningSequence | None:
        """The running request that must give way so that the most urgent waiting one can run; None where none must."""
        if not self.waiting or self._has_room_for(self.waiting[0]):
            return None
        least = self._least_urgent()
        return least if least and least.request.priority > self.waiting[0].request.priority else None

    def admit(self) -> None:
        """Move waiting requests into free slots while there is room, the most urgent first; the lowest slot is given
        first. Nobody passes one that has no room: else it might wait for ever."""
        while self.waiting and self._has_room_for(self.waiting[0]):
            sequence = self.waiting.pop(0)
            sequence.held_slot = min(self.free_slots)
            self.free_slots.remove(sequence.slot)
            sequence.status = Status.PREFILLING
            sequence.reserved = self._rows_of(sequence)
            sequence.timings.admitted = sequence.timings.admitted or time.monotonic()
            self.running[sequence.request_id] = sequence

    def next_prefill(self) -> RunningSequence | None:
        """The most urgent running request whose text is not read yet."""
        reading = (s for s in self.running.values() if s.status is Status.PREFILLING)
        return min(reading, key=_urgency, default=None)

    def chunk_rows(self, sequence: RunningSequence, stream_block: int = 0) -> int:
        """Tokens of its next chunk: as many as are read in ``CHUNK_S``, or up to the next fixed border.

        A whole block of a prompt whose blocks before were streamed to a device is one chunk.
        """
        if sequence.num_rows == sequence.streamed < sequence.streamable(stream_block):
            return stream_block
        fixed = self.limits.fixed_chunk
        if fixed is not None:
            rows = fixed - sequence.num_rows % fixed
        else:
            rows = max(self.pace.rows_in(CHUNK_S) // CHUNK_STEP, 1) * CHUNK_STEP
        return min(rows, sequence.num_readable - sequence.num_rows)

    def decoding(self) -> list[RunningSequence]:
        """All running requests whose text is read, in order of admission."""
        return [s for s in self.running.values() if s.status is Status.DECODING]

    def crowded_out(self) -> RunningSequence | None:
        """Reserve the rows of the next round for all that decode; the request to preempt where they do not suffice."""
        for sequence in sorted(self.decoding(), key=_urgency):
            more = self._rows_of(sequence) - sequence.reserved
            if more > self.free_rows:
                return self._least_urgent()
            sequence.reserved += max(more, 0)
        return None

    def preempt(self, sequence: RunningSequence) -> int:
        """Back into the queue, with its tokens and its place in the order; the slot it held, which is free now."""
        slot = self._vacate(sequence)
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_urgency)
        return slot

    def find(self, request_id: str) -> RunningSequence | None:
        """A request by its name, wherever it is; None if it is not here any more."""
        return self.running.get(request_id) or next((s for s in self.waiting if s.request_id == request_id), None)

    def remove(self, sequence: RunningSequence) -> int | None:
        """End a request; the slot it held, which is free now, or None."""
        slot = None
        if sequence.held_slot is None:
            self.waiting.remove(sequence)
        else:
            slot = self._vacate(sequence)
        sequence.status = Status.ENDED
        return slot

    def check_integrity(self) -> None:
        """Every slot is free or held by one running request, and no row is reserved twice: raises EngineError else."""
        held = [sequence.slot for sequence in self.running.values()]
        if sorted([*self.free_slots, *held]) != list(range(self.limits.num_slots)):
            raise EngineError(f"slots leaked: free {sorted(self.free_slots)}, held {held} of {self.limits.num_slots}")
        if self.free_rows < 0:
            raise EngineError(f"{-self.free_rows} rows more are reserved than the {self.limits.num_rows} there are")
        if stray := [s.request_id for s in self.waiting if s.reserved or s.num_rows or s.held_slot is not None]:
            raise EngineError(f"requests that wait hold rows or slots: {stray}")

    def _vacate(self, sequence: RunningSequence) -> int:
        slot = sequence.slot
        del self.running[sequence.request_id]
        self.free_slots.append(slot)
        sequence.held_slot, sequence.num_rows, sequence.streamed, sequence.reserved = None, 0, 0, 0
        return slot

    def _rows_of(self, sequence: RunningSequence) -> int:
        """Rows that its text and a round behind it take."""
        return len(sequence.token_ids) + self.limits.round_rows

    def _has_room_for(self, sequence: RunningSequence) -> bool:
        """Whether a slot is free, and rows for its text and for what it and its neighbours add before long."""
        if not self.free_slots:
            return False
        needed = self._rows_of(sequence)
        if self.running:
            needed += sum(min(s.num_left, HEADROOM) for s in (sequence, *self.running.values()))
        return needed <= self.free_rows

    def _least_urgent(self) -> RunningSequence | None:
        return max(self.running.values(), key=_urgency, default=None)


def _urgency(sequence: RunningSequence) -> tuple[int, float, int]:
    return sequence.urgency
