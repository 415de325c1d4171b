"""What the drafter has not seen yet: committed positions wait here until it drafts again.

While the guard has switched drafting off, showing every token to the drafter would cost time for nothing; the features
are small, so they wait, and are shown in order and in bounded pieces when drafting resumes.
"""

from __future__ import annotations

from collections import deque

import torch

from drafters.drafter import Drafter, Observation


class Observations:
    """Queues of observations per slot, shown to the drafter for all slots together."""

    def __init__(self, drafter: Drafter, max_rows: int) -> None:
        self.drafter = drafter
        self.max_rows = max_rows
        self.waiting: dict[int, deque[Observation]] = {}

    def add(self, observation: Observation) -> None:
        """Queue committed positions of one slot."""
        self.waiting.setdefault(observation.slot, deque()).append(observation)

    def flush(self) -> None:
        """Show everything, in calls of at most ``max_rows`` positions for each slot."""
        while self.waiting:
            self.drafter.observe([self._next(slot) for slot in list(self.waiting)])

    def release(self, slot: int) -> None:
        """Forget a slot, here and in the drafter."""
        self.waiting.pop(slot, None)
        self.drafter.release(slot)

    def _next(self, slot: int) -> Observation:
        """As many of the slot's queued positions as one call may hold, joined."""
        queue = self.waiting[slot]
        taken = [queue.popleft()]
        num_rows = len(taken[0].next_ids)
        while queue and num_rows + len(queue[0].next_ids) <= self.max_rows:
            taken.append(queue.popleft())
            num_rows += len(taken[-1].next_ids)
        if not queue:
            del self.waiting[slot]
        if len(taken) == 1:
            return taken[0]
        next_ids = [token_id for piece in taken for token_id in piece.next_ids]
        return Observation(slot, torch.cat([piece.features for piece in taken]), next_ids)
