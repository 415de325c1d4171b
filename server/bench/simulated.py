"""What a given acceptance would buy: a drafter that knows the answer and is wrong as often as asked."""

from __future__ import annotations

import random
from collections.abc import Sequence

from drafters.drafter import DrafterError, DraftState, Observation
from drafters.proposal import Budget, Proposal


def acceptance_probability(acceptance_length: float, longest: int) -> float:
    """The probability p of each draft, given that those before it were right, with 1 + p + ... + p^longest as asked.

    Errors: DrafterError where no probability gives that length.
    """
    if not 1 <= acceptance_length <= longest + 1:
        raise DrafterError(
            f"an acceptance length of {acceptance_length} cannot be simulated: chains of {longest} drafts give 1 to "
            f"{longest + 1}; allow deeper drafts or more rows"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if 1 + sum(middle**i for i in range(1, longest + 1)) < acceptance_length:
            low = middle
        else:
            high = middle
    return high


class SimulatedDrafter:
    """Drafts the known continuation as a chain whose tokens fail at random; the other rows are wrong on purpose.

    Every tree has as many rows as the budget allows, so the target's verify pass costs what it would cost with a real
    drafter; drafting itself costs nothing, so the speed-up shown is an upper bound for that acceptance.
    """

    feature_layers: tuple[str, ...] = ()

    def __init__(
        self, texts: Sequence[Sequence[int]], acceptance_length: float, budget: Budget, vocab_size: int
    ) -> None:
        """``texts``: prompts with the continuations the target is known to give."""
        self.name = f"simulated acceptance length {acceptance_length:g}"
        self.texts = [tuple(text) for text in texts]
        self.vocab_size = vocab_size
        self.probability = acceptance_probability(acceptance_length, chain_length(budget))
        self.random = random.Random(0)
        self.by_slot: dict[int, tuple[int, ...]] = {}

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One full tree for each state whose continuation is known."""
        return [self.tree(state, budget) for state in states]

    def tree(self, state: DraftState, budget: Budget) -> Proposal:
        """A chain of right tokens up to the first failure, wrong ones behind it, wrong siblings beside it."""
        known = self.known_text(state)[len(state.token_ids) :][: chain_length(budget)]
        token_ids: list[int] = []
        parents: list[int | None] = []
        is_right = True
        for i, token_id in enumerate(known):
            is_right = is_right and self.random.random() < self.probability
            token_ids.append(token_id if is_right else self.wrong(token_id, 1))
            parents.append(i - 1 if i else None)
        while known and len(token_ids) < budget.rows - 1:
            # Children of the root beside the chain; 2 and up, since a failed first draft is the 1.
            token_ids.append(self.wrong(known[0], len(token_ids) - len(known) + 2))
            parents.append(None)
        return Proposal(tuple(token_ids), tuple(parents), (0.0,) * len(token_ids))

    def known_text(self, state: DraftState) -> tuple[int, ...]:
        """The text that begins with the state's tokens; empty when there is none."""
        prefix = tuple(state.token_ids)
        text = self.by_slot.get(state.slot, ())
        if text[: len(prefix)] != prefix:
            text = next((text for text in self.texts if text[: len(prefix)] == prefix), ())
            self.by_slot[state.slot] = text
        return text

    def wrong(self, token_id: int, offset: int) -> int:
        """A token that is not ``token_id``."""
        return (token_id + 1 + (offset - 1) % (self.vocab_size - 1)) % self.vocab_size

    def observe(self, batch: Sequence[Observation]) -> None:
        """Nothing to learn: it knows."""

    def release(self, slot: int) -> None:
        """Forget which text the slot was on."""
        self.by_slot.pop(slot, None)


def chain_length(budget: Budget) -> int:
    """The longest chain of drafts a budget allows."""
    return min(budget.depth + 1, budget.rows - 1)
