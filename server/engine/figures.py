"""What an engine has done since its start, and how full it is: numbers that others read a moment old. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Written by the engine's thread alone, once a chunk or a round.

    prompt_tokens: of prompts that were read or restored, ``cached_tokens`` of them restored; prefill_s: seconds of
    reading; output_tokens: committed, ``pass_tokens`` of them by ``passes``, each a request's share of a verify pass;
    rounds_of: decoding rounds by the rows of their verify pass; trees: trees that
    were verified, with ``drafted`` nodes, of which ``accepted_at[i]`` trees had one accepted at depth i;
    preemptions: requests that gave their rows back.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_s: float = 0.0
    output_tokens: int = 0
    passes: int = 0
    pass_tokens: int = 0
    rounds_of: Counter[int] = field(default_factory=Counter)
    trees: int = 0
    drafted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    preemptions: int = 0

    def verified(self, num_nodes: int, num_accepted: int) -> None:
        """A tree of so many nodes was verified, and its path accepted to this depth."""
        self.trees += num_nodes > 0
        self.drafted += num_nodes
        while len(self.accepted_at) < num_accepted:
            self.accepted_at.append(0)
        for depth in range(num_accepted):
            self.accepted_at[depth] += 1


@dataclass(frozen=True)
class EngineFigures:
    """``Counts``, the seconds of decoding rounds by what they went to, and the state of this moment.

    kv_rows of ``kv_capacity`` are reserved by running requests; cache_bytes: of prompts kept; verify_curve: T(n), the
    seconds of a verify pass by its rows as measured here, empty where rows are not chosen by cost.
    """

    counts: Counts
    draft_s: float
    verify_s: float
    other_s: float
    kv_rows: int
    kv_capacity: int
    cache_bytes: int
    verify_curve: Mapping[int, float]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Where the engine's time went."""
        return {
            "prefill": self.counts.prefill_s,
            "draft": self.draft_s,
            "verify": self.verify_s,
            "other": self.other_s,
        }

    @property
    def accepted_at(self) -> Sequence[int]:
        """Accepted drafts by their depth, the first below the root."""
        return self.counts.accepted_at
