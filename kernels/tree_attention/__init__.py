"""KV slots and attention for flattened rows of several sequences, each row with its own ancestors."""

from kernels.tree_attention.attention import tree_attention
from kernels.tree_attention.slots import KVSlots, Segment, SlotError, causal_segment, tree_segment

__all__ = ["KVSlots", "Segment", "SlotError", "causal_segment", "tree_attention", "tree_segment"]
