"""What all drafters that read the target's features share: which slots have observed what, and who is drafted for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from drafters.drafter import DrafterError, DraftState, Observation
from drafters.network import BlockConfig
from drafters.proposal import Budget, Proposal
from kernels.tree_attention import KVSlots, causal_segment


class FeatureDrafter(ABC):
    """Slots of committed rows, and for each the prediction behind its last row, from which its next tree grows.

    Subclasses store rows (``extend``) and grow trees (``grow``). The pair (feature f_i, token t_{i+1}) sits at row and
    rotary position i of its slot. Committed rows hold true features of the target; drafting appends rows of predicted
    features behind them and drops those when the tree is done, so the cache is at all times what a run from scratch on
    the true features would give.
    """

    name = "dovetail"

    def __init__(self, config: BlockConfig, feature_layers: tuple[str, ...], slots: KVSlots, outputs: Tensor) -> None:
        """``outputs`` [slots, H], zeros in the type and on the device that the subclass predicts in."""
        self.config = config
        self.feature_layers = feature_layers
        self.slots = slots
        self.last_outputs = outputs
        self.ready: set[int] = set()

    @torch.inference_mode()
    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One tree for each state; empty for a slot that has observed nothing since it was released."""
        slots = [state.slot for state in states if state.slot in self.ready and budget.rows > 1]
        trees = dict(zip(slots, self.grow(slots, budget), strict=True)) if slots else {}
        return [trees.get(state.slot) or Proposal() for state in states]

    @torch.inference_mode()
    def observe(self, batch: Sequence[Observation]) -> None:
        """Extend the slots by committed positions, all requests in one pass."""
        batch = [observation for observation in batch if observation.next_ids]
        if not batch:
            return
        if len({observation.slot for observation in batch}) < len(batch):
            raise DrafterError("one slot is observed twice in a batch; join its positions into one observation")
        for observation in batch:
            length = self.slots.lengths[observation.slot]
            self.slots.check(causal_segment(observation.slot, length, len(observation.next_ids)))
        self.extend(batch)
        for observation in batch:
            self.slots.lengths[observation.slot] += len(observation.next_ids)
            self.ready.add(observation.slot)

    @abstractmethod
    def extend(self, batch: Sequence[Observation]) -> None:
        """Store the rows of all observations behind the committed ones, and each slot's last output."""

    @abstractmethod
    def grow(self, slots: Sequence[int], budget: Budget) -> list[Proposal]:
        """One tree for each of these slots, which have all observed something."""

    def release(self, slot: int) -> None:
        """Empty the slot."""
        self.slots.release(slot)
        self.ready.discard(slot)


def check_fit(config: BlockConfig, embedding: Tensor, lm_head: Tensor) -> None:
    """Refuse a drafter whose hidden size or vocabulary is not the target's."""
    for name, tensor in (("embedding", embedding), ("LM head", lm_head)):
        if tuple(tensor.shape) != (config.vocab_size, config.hidden_size):
            vocab_size, hidden_size = tensor.shape
            raise DrafterError(
                f"the drafter has hidden size {config.hidden_size} and vocabulary {config.vocab_size}, the target's "
                f"{name} has hidden size {hidden_size} and vocabulary {vocab_size}; use a drafter trained for this "
                "target"
            )
