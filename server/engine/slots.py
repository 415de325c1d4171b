"""Which request owns which slot. Policy only: the rows themselves live in the target and the drafter. No torch here."""

from __future__ import annotations

from server.engine.request import EngineError


class SlotPool:
    """A fixed number of places for running requests; the lowest free one is given first."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.free = list(range(num_slots))
        self.owners: dict[int, str] = {}

    def allocate(self, owner: str) -> int | None:
        """A slot for ``owner``, or None when all are taken."""
        if not self.free:
            return None
        slot = min(self.free)
        self.free.remove(slot)
        self.owners[slot] = owner
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        if slot not in self.owners:
            raise EngineError(f"slot {slot} is released but nobody owns it; taken are {sorted(self.owners)}")
        del self.owners[slot]
        self.free.append(slot)

    def check(self) -> None:
        """Every slot is either free or owned, never both: raises EngineError otherwise."""
        if sorted([*self.free, *self.owners]) != list(range(self.num_slots)):
            raise EngineError(
                f"slots leaked: free {sorted(self.free)}, owned {sorted(self.owners)} of {self.num_slots}"
            )
