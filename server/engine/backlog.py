"""What the drafter has not seen yet: committed positions wait here until it drafts again.

While drafting does not pay or the drafter has failed, showing it every token would cost time for nothing; the features
are small, so they wait, and are shown in order and in bounded pieces when drafting resumes.
"""

from __future__ import annotations

from collections import deque

import torch

from drafters.drafter import Drafter, Observation


class Backlog:
    """Queues of observations per slot, shown to the drafter for all slots together."""

    def __init__(self, drafter: Drafter, max_rows: int) -> None:
        self.drafter = drafter
        self.max_rows = max_rows
        self.waiting: dict[int, deque[Observation]] = {}
        self.num_rows = 0  # positions that wait, of all slots

    def add(self, observation: Observation) -> None:
        """Queue committed positions of one slot."""
        self.waiting.setdefault(observation.slot, deque()).append(observation)
        self.num_rows += len(observation.next_ids)

    def show(self) -> None:
        """Show everything, in calls of at most ``max_rows`` positions for each slot.

        What the drafter failed on waits on: a drafter takes in all of a call or nothing.
        """
        while self.waiting:
            batch = [self._join(slot) for slot in self.waiting]
            self.drafter.observe(batch)
            for observation in batch:
                queue = self.waiting[observation.slot]
                queue.popleft()
                self.num_rows -= len(observation.next_ids)
                if not queue:
                    del self.waiting[observation.slot]

    def release(self, slot: int) -> None:
        """Forget what waits for a slot."""
        self.num_rows -= sum(len(observation.next_ids) for observation in self.waiting.pop(slot, ()))

    def _join(self, slot: int) -> Observation:
        """As many of the slot's queued positions as one call may hold, put together at the head of its queue."""
        queue = self.waiting[slot]
        taken = [queue.popleft()]
        num_rows = len(taken[0].next_ids)
        while queue and num_rows + len(queue[0].next_ids) <= self.max_rows:
            taken.append(queue.popleft())
            num_rows += len(taken[-1].next_ids)
        if len(taken) > 1:
            features = torch.cat([observation.features for observation in taken])
            taken = [Observation(slot, features, [token_id for o in taken for token_id in o.next_ids])]
        queue.appendleft(taken[0])
        return taken[0]
