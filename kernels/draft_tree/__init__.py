"""A feature-level drafter on native kernels: committed positions in one call, the trees of all requests in one call.

A level of a small drafter costs some 0.05 ms here; in eager torch its calls alone cost 1 ms. The drafters' own torch
networks and Python tree growth are the slow twin, in the tests.
"""

from kernels.draft_tree.cpu import DraftModel, GrownTree
from kernels.draft_tree.fusion import PackedFusion, gated_fusion, linear_fusion

__all__ = ["DraftModel", "GrownTree", "PackedFusion", "gated_fusion", "linear_fusion"]
