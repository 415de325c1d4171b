"""Prompt lookup: propose what followed the same words before. No weights, no features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drafters.drafter import DraftState, Observation
from drafters.proposal import Budget, Proposal, chain


@dataclass(frozen=True)
class Copied:
    """Tokens copied from behind an earlier occurrence of the last ``match_length`` tokens."""

    token_ids: tuple[int, ...] = ()
    match_length: int = 0


class NGramIndex:
    """Where each run of tokens of one request last occurred with a token after it; grows with the request."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.num_indexed = 0
        self.followers: dict[tuple[int, ...], int] = {}

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in the tokens that are new since the last call; a run counts once the token after it is known."""
        for follower in range(max(self.num_indexed, 1), len(token_ids)):
            for length in self.lengths:
                if length <= follower:
                    self.followers[tuple(token_ids[follower - length : follower])] = follower
        self.num_indexed = len(token_ids)

    def follower(self, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """The position after the latest earlier occurrence of the longest suffix that has one, and that length."""
        for length in self.lengths:
            if length < len(token_ids):
                found = self.followers.get(tuple(token_ids[-length:]))
                if found is not None:
                    return found, length
        return None


class NGramDrafter:
    """Chains copied from the request's own past: the longest suffix of at most ``longest`` tokens that occurred before.

    Log-probabilities are 0, since a lookup knows none. Source: prompt lookup decoding (A. Saxena, 2023) as in
    llama.cpp's and vLLM's n-gram drafters; the incremental index instead of a scan each round is ours.
    """

    name = "ngram"
    feature_layers: tuple[str, ...] = ()

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest {shortest} and longest {longest}: need 1 <= shortest <= longest")
        self.lengths = range(longest, shortest - 1, -1)
        self.indices: dict[int, NGramIndex] = {}

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """A chain of up to ``depth + 1`` tokens (``rows - 1`` where that is less) for each state, or nothing."""
        count = min(budget.depth + 1, budget.rows - 1)
        return [chain(self.lookup(state, count).token_ids) for state in states]

    def lookup(self, state: DraftState, count: int) -> Copied:
        """At most ``count`` tokens for one request."""
        index = self.indices.setdefault(state.slot, NGramIndex(self.lengths))
        index.extend(state.token_ids)
        found = index.follower(state.token_ids)
        if found is None:
            return Copied()
        start, length = found
        return Copied(tuple(state.token_ids[start : start + count]), length)

    def observe(self, batch: Sequence[Observation]) -> None:
        """Nothing to take in: the committed tokens come with ``propose``."""

    def release(self, slot: int) -> None:
        """Forget the request's runs."""
        self.indices.pop(slot, None)
