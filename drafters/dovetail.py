"""The Dovetail drafter at work: trees for all requests, one forward pass a level.

The pair (feature f_i, token t_{i+1}) sits at row and rotary position i of its slot. Committed rows hold true features
of the target; drafting appends rows of predicted features behind them and drops those when the tree is done, so the
cache is at all times what a run from scratch on the true features would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from drafters.checkpoint import read_config, read_network
from drafters.drafter import DrafterError, DraftState, Observation
from drafters.growing_tree import Children, GrowingTree, Level, best_children, grow
from drafters.network import BlockConfig, FeatureNetwork, rotary_table
from drafters.proposal import Budget, Proposal
from kernels.tree_attention import KVSlots, Segment, causal_segment, tree_attention


class DovetailDrafter:
    """A trained drafter with its slots. ``capacity`` bounds committed and drafted rows of a slot together.

    ``embedding`` and ``lm_head`` [V, H] are the target's, the embedding on the drafter's device and in its type; pass
    one tensor twice where they are tied. Of the LM head only the rows that can be drafted are moved there. Scores are
    fp32 log-probabilities at temperature 1, whatever the request's temperature, as the paper has it. Source: Dovetail
    (arXiv 2412.18934) with the dynamic tree of EAGLE-2 (arXiv 2406.16858).
    """

    name = "dovetail"

    def __init__(
        self, network: FeatureNetwork, embedding: Tensor, lm_head: Tensor, num_slots: int, capacity: int
    ) -> None:
        config = network.config
        check_fit(config, embedding, lm_head)
        self.network = network
        self.embedding = embedding
        self.device, self.dtype = embedding.device, embedding.dtype
        self.lm_head = network.select_head(lm_head).to(self.device, self.dtype)
        self.feature_layers = network.feature_layers
        self.slots = KVSlots(
            num_slots, capacity, config.num_blocks, config.num_kv_heads, config.head_dim, self.dtype, self.device
        )
        self.scale = config.head_dim**-0.5
        # [positions, 2, D]: one gather gives a pass both angles of all its rows.
        self.angles = torch.stack(rotary_table(config, capacity, self.dtype, self.device), dim=1)
        self.last_outputs = torch.zeros(num_slots, config.hidden_size, dtype=self.dtype, device=self.device)
        self.ready: set[int] = set()

    @torch.inference_mode()
    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One tree for each state; empty for a slot that has observed nothing since it was released or forked."""
        trees: dict[int, GrowingTree] = {}
        for state in states:
            if state.slot in self.ready and budget.rows > 1:
                trees[state.slot] = GrowingTree(state.slot, self.slots.lengths[state.slot], budget, len(trees))
        if trees:
            grow(self, list(trees.values()), self.last_outputs[list(trees)], budget)
        return [trees[state.slot].growth.proposal() if state.slot in trees else Proposal() for state in states]

    @torch.inference_mode()
    def observe(self, batch: Sequence[Observation]) -> None:
        """Extend the slots by committed positions, all requests in one pass."""
        batch = [observation for observation in batch if observation.next_ids]
        if not batch:
            return
        if len({observation.slot for observation in batch}) < len(batch):
            raise DrafterError("one slot is observed twice in a batch; join its positions into one observation")
        segments: list[Segment] = []
        token_ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for observation in batch:
            length, num_rows = self.slots.lengths[observation.slot], len(observation.next_ids)
            segments.append(causal_segment(observation.slot, length, num_rows))
            self.slots.check(segments[-1])
            token_ids += observation.next_ids
            positions += range(length, length + num_rows)
            last_rows.append(len(token_ids) - 1)
        features = torch.cat([observation.features for observation in batch]).to(self.device, self.dtype)
        features = self.network.project(features)
        rows = torch.tensor([token_ids, positions], device=self.device)
        outputs = self.forward(features, rows[0], rows[1], segments)
        self.last_outputs[[segment.slot for segment in segments]] = outputs[last_rows]
        for segment in segments:
            self.slots.lengths[segment.slot] += segment.num_rows
            self.ready.add(segment.slot)

    def fork(self, source: int, slot: int, length: int) -> None:
        """Copy the first ``length`` pairs of ``source``.

        Pair ``length - 1`` holds the token AFTER that position, so both requests must agree on ``length + 1`` tokens.
        Unless the whole slot is copied, the fork proposes nothing until it has observed a position of its own.
        """
        self.slots.fork(source, slot, length)
        self.ready.discard(slot)
        if source in self.ready and length == self.slots.lengths[source]:
            self.last_outputs[slot] = self.last_outputs[source]
            self.ready.add(slot)

    def release(self, slot: int) -> None:
        """Empty the slot."""
        self.slots.release(slot)
        self.ready.discard(slot)

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
        return best_children(self.network.logits(outputs, self.lm_head), top_k, self.network.draft_ids)


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


def load_drafter(
    folder: Path,
    embedding: Tensor,
    lm_head: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    num_slots: int,
    capacity: int,
) -> DovetailDrafter:
    """A drafter folder on ``device`` in fp32, bf16 or fp16.

    ``embedding`` and ``lm_head`` [V, H] come from the target and are moved once (not copied where device and type are
    the same already); tied ones, the same tensor twice, stay one. Errors: DrafterError, naming the file or both shapes.
    """
    check_fit(read_config(folder), embedding, lm_head)
    network = read_network(folder, device, dtype)
    own_embedding = embedding.detach().to(device, dtype)
    own_lm_head = own_embedding if lm_head is embedding else lm_head.detach()
    return DovetailDrafter(network, own_embedding, own_lm_head, num_slots, capacity)
