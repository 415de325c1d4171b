"""What the engine asks of anything that proposes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from drafters.proposal import Budget, Proposal


class DrafterError(ValueError):
    """A drafter cannot be loaded, or does not fit the target it is meant for."""


@dataclass(frozen=True)
class DraftState:
    """One running request as a drafter sees it.

    slot: the request's place, the same number for target and drafter; token_ids: every committed token, prompt
    included, the root last (a live view: read it, do not keep it).
    """

    slot: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class Observation:
    """Committed positions of one request, told once each and in order.

    features: [n, width] the target's features of n consecutive committed positions, on the target's device;
    next_ids: the n committed tokens that FOLLOW those positions, so the last one is the root of the next tree once the
    prompt is through.
    """

    slot: int
    features: Tensor
    next_ids: Sequence[int]


class Drafter(Protocol):
    """Proposes token trees; owns its own cache on its own device. Wrong guesses cost time, never correctness."""

    name: str
    feature_layers: tuple[str, ...]
    """Which of the target's features it needs: ``()`` none, ``("last",)`` the vector the LM head consumes."""

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One tree for each state, in order; an empty proposal means: decode plainly."""
        ...

    def observe(self, batch: Sequence[Observation]) -> None:
        """Take in committed positions: after each prefill chunk and after each round, all requests in one call."""
        ...

    def release(self, slot: int) -> None:
        """Forget a request; its slot may be used again."""
        ...
