"""A small language model with the target's vocabulary as a drafter: whatever can be a target can be one.

It needs none of the target's features. Its slots lag behind and catch up when it is asked for a tree: it reads the
committed tokens themselves, prompt included. Source: speculative decoding with a small model (arXiv 2211.17192), here
with the dynamic tree of EAGLE-2 (arXiv 2406.16858); the authors of Dovetail run TinyLlama that way for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from drafters.drafter import DraftState, Observation
from drafters.growing_tree import Children, GrowingTree, Level, best_children, grow
from drafters.proposal import Budget, Proposal
from kernels.tree_attention import KVSlots, Segment, causal_segment

MAX_PASS_ROWS = 256  # a long prompt is caught up with in pieces: the scores of a pass are rows x keys for every head


class LanguageModel(Protocol):
    """A model over slots of its own, on a device of its own."""

    slots: KVSlots
    device: torch.device

    def logits_after(
        self, segments: Sequence[Segment], token_ids: list[int], positions: list[int], wanted: Sequence[int]
    ) -> Tensor:
        """Logits [wanted, V] of rows that go behind what their slots hold; none is committed."""
        ...


class SmallLMDrafter:
    """``vocab_size`` is the target's; what the model's slots hold bounds committed and drafted rows together.

    Scores are log-probabilities at temperature 1.
    """

    name = "small-lm"
    feature_layers: tuple[str, ...] = ()

    def __init__(self, model: LanguageModel, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.device = model.device
        self.slots = model.slots

    @torch.inference_mode()
    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One tree for each state; empty where the text has outgrown the model's positions."""
        wanted = [s for s in states if budget.rows > 1 and len(s.token_ids) < self.slots.capacity]
        if not wanted:
            return [Proposal()] * len(states)
        logits = self.catch_up(wanted)
        trees = {s.slot: GrowingTree(s.slot, len(s.token_ids), budget, i) for i, s in enumerate(wanted)}
        grow(self, list(trees.values()), logits, budget)
        return [trees[s.slot].growth.proposal() if s.slot in trees else Proposal() for s in states]

    def catch_up(self, states: Sequence[DraftState]) -> Tensor:
        """Commit every token of the requests that is new; logits [requests, V] after their roots."""
        segments: list[Segment] = []
        token_ids: list[int] = []
        last_rows: list[int] = []
        for state in states:
            known = state.token_ids
            # At least the root is run (again), since its logits are not kept.
            start = min(self.slots.lengths[state.slot], len(known) - 1)
            while len(known) - start > MAX_PASS_ROWS:
                piece = causal_segment(state.slot, start, MAX_PASS_ROWS)
                start += MAX_PASS_ROWS
                self.forward([piece], list(known[piece.prefix : start]), [MAX_PASS_ROWS - 1])
            segments.append(causal_segment(state.slot, start, len(known) - start))
            token_ids += known[start:]
            last_rows.append(len(token_ids) - 1)
        logits = self.forward(segments, token_ids, last_rows)
        for segment in segments:
            self.slots.lengths[segment.slot] = segment.num_keys
        return logits

    def forward(self, segments: Sequence[Segment], token_ids: list[int], wanted: Sequence[int]) -> Tensor:
        """Logits [wanted, V] of consecutive rows, stored behind what their slots hold."""
        positions = [position for s in segments for position in range(s.prefix, s.num_keys)]
        return self.run(segments, token_ids, positions, wanted)

    def run(
        self, segments: Sequence[Segment], token_ids: list[int], positions: list[int], wanted: Sequence[int]
    ) -> Tensor:
        """One pass over n rows -> logits [wanted, V].

        Padded vocabularies differ in their padding only, and ids that the target lacks must not be drafted.
        """
        return self.model.logits_after(segments, token_ids, positions, wanted)[:, : self.vocab_size]

    def expand(self, outputs: Tensor, level: Level) -> Tensor:
        """A language model needs nothing from a node's parent but its keys."""
        del outputs
        positions = level.positions.tolist()
        return self.run(level.segments, level.token_ids.tolist(), positions, range(len(positions)))

    def children(self, outputs: Tensor, top_k: int) -> list[Children]:
        """The best tokens for each row of logits."""
        return best_children(outputs, top_k)

    def observe(self, batch: Sequence[Observation]) -> None:
        """Nothing to take in: the committed tokens come with ``propose``."""

    def release(self, slot: int) -> None:
        """Empty the slot."""
        self.slots.release(slot)
