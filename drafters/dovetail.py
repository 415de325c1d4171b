"""The Dovetail drafter on torch, for any device: trees for all requests, one forward pass a level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from drafters.checkpoint import read_config, read_network
from drafters.drafter import Observation
from drafters.feature_drafter import FeatureDrafter, check_fit
from drafters.growing_tree import Children, GrowingTree, Level, best_children, grow
from drafters.network import FeatureNetwork, rotary_table
from drafters.proposal import Budget, Proposal
from kernels.tree_attention import KVSlots, Segment, causal_segment, tree_attention


class DovetailDrafter(FeatureDrafter):
    """A trained drafter with its slots. ``capacity`` bounds committed and drafted rows of a slot together.

    ``embedding`` and ``lm_head`` [V, H] are the target's, the embedding on the drafter's device and in its type; pass
    one tensor twice where they are tied. Of the LM head only the rows that can be drafted are moved there. Scores are
    fp32 log-probabilities at temperature 1, whatever the request's temperature, as the paper has it. Source: Dovetail
    (arXiv 2412.18934) with the dynamic tree of EAGLE-2 (arXiv 2406.16858).
    """

    def __init__(
        self, network: FeatureNetwork, embedding: Tensor, lm_head: Tensor, num_slots: int, capacity: int
    ) -> None:
        config = network.config
        check_fit(config, embedding, lm_head)
        device, dtype = embedding.device, embedding.dtype
        slots = KVSlots(num_slots, capacity, config.num_blocks, config.num_kv_heads, config.head_dim, dtype, device)
        outputs = torch.zeros(num_slots, config.hidden_size, dtype=dtype, device=device)
        super().__init__(config, network.feature_layers, slots, outputs)
        self.network = network
        self.embedding = embedding
        self.device, self.dtype = device, dtype
        self.lm_head = network.select_head(lm_head).to(device, dtype)
        self.scale = config.head_dim**-0.5
        # [positions, 2, D]: one gather gives a pass both angles of all its rows.
        self.angles = torch.stack(rotary_table(config, capacity, dtype, device), dim=1)

    def grow(self, slots: Sequence[int], budget: Budget) -> list[Proposal]:
        """One tree for each slot."""
        trees = [GrowingTree(slot, self.slots.lengths[slot], budget, row) for row, slot in enumerate(slots)]
        grow(self, trees, self.last_outputs[list(slots)], budget)
        return [tree.growth.proposal() for tree in trees]

    def extend(self, batch: Sequence[Observation]) -> None:
        """Rows of all requests in one pass."""
        segments: list[Segment] = []
        token_ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for observation in batch:
            length, num_rows = self.slots.lengths[observation.slot], len(observation.next_ids)
            segments.append(causal_segment(observation.slot, length, num_rows))
            token_ids += observation.next_ids
            positions += range(length, length + num_rows)
            last_rows.append(len(token_ids) - 1)
        features = torch.cat([observation.features for observation in batch]).to(self.device, self.dtype)
        features = self.network.project(features)
        rows = torch.tensor([token_ids, positions], device=self.device)
        outputs = self.forward(features, rows[0], rows[1], segments)
        self.last_outputs[[segment.slot for segment in segments]] = outputs[last_rows]

    def forward(self, features: Tensor, token_ids: Tensor, positions: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Rows of all segments in order, stored behind what their slots hold -> predicted features [rows, H]."""

        def attend(block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            start = 0
            for segment in segments:
                rows = slice(start, start + segment.num_rows)
                self.slots.write(block, segment, key[:, rows], value[:, rows])
                start += segment.num_rows
            return tree_attention(query, self.slots, block, segments, self.scale)

        cos, sin = self.angles[positions].unbind(1)
        output: Tensor = self.network(features, functional.embedding(token_ids, self.embedding), (cos, sin), attend)
        return output

    def expand(self, outputs: Tensor, level: Level) -> Tensor:
        """A node reads the feature its parent predicted."""
        return self.forward(outputs[level.parent_rows], level.token_ids, level.positions, level.segments)

    def children(self, outputs: Tensor, top_k: int) -> list[Children]:
        """The best tokens by the LM head, for each predicted feature [rows, H]."""
        logits, confidence = self.network.logits(outputs, self.lm_head), self.network.confidence(outputs)
        return best_children(logits, top_k, self.network.draft_ids, confidence)


def load_drafter(
    folder: Path,
    embedding: Tensor,
    lm_head: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    num_slots: int,
    capacity: int,
    head_rows: int | None = None,
) -> DovetailDrafter:
    """A drafter folder on ``device`` in fp32, bf16 or fp16; ``head_rows``: it drafts the first so many tokens alone.

    Vocabularies made by merging pairs number their tokens about by frequency, so the first ones are those to keep.

    ``embedding`` and ``lm_head`` [V, H] come from the target and are moved once (not copied where device and type are
    the same already); tied ones, the same tensor twice, stay one. Errors: DrafterError, naming the file or both shapes.
    """
    check_fit(read_config(folder), embedding, lm_head)
    network = read_network(folder, device, dtype)
    if head_rows is not None and network.draft_ids is None:
        network.draft_ids = torch.arange(head_rows, device=device)
    own_embedding = embedding.detach().to(device, dtype)
    own_lm_head = own_embedding if lm_head is embedding else lm_head.detach()
    return DovetailDrafter(network, own_embedding, own_lm_head, num_slots, capacity)
