"""Trees that grow level by level, one forward pass a level for all requests; whatever the network behind them.

Shapes: n rows of a pass, H what the model hands from a node to its children.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from drafters.proposal import Budget, TreeGrowth
from kernels.tree_attention import KVSlots, Segment

Children = tuple[list[int], list[float]]
"""Tokens and log-probabilities, best first."""


class GrowingTree:
    """One request's tree between two levels.

    path_rows: for every expanded node the rows behind the committed ones that hold its ancestors and itself;
    output_rows: where the last pass put the outputs of the nodes it expanded (None: the root).
    """

    def __init__(self, slot: int, length: int, budget: Budget, output_row: int) -> None:
        self.slot = slot
        self.length = length
        self.growth = TreeGrowth(budget)
        self.num_expanded = 0
        self.path_rows: dict[int | None, tuple[int, ...]] = {None: ()}
        self.output_rows: dict[int | None, int] = {None: output_row}

    def beam(self, capacity: int) -> list[int]:
        """The nodes to expand next; none when the tree is finished or the slot is full."""
        beam = self.growth.beam()
        return beam if self.length + self.num_expanded + len(beam) <= capacity else []

    def expand(self, beam: Sequence[int], first_output: int, device: torch.device) -> tuple[Segment, list[list[int]]]:
        """Give each beam node a row.

        Returns the segment of the pass and, for each node, [its token, the output row of its parent, its position].
        """
        growth, total = self.growth, self.num_expanded + len(beam)
        mask: list[list[bool]] = []
        inputs: list[list[int]] = []
        output_rows: dict[int | None, int] = {}
        for i, node in enumerate(beam):
            parent = growth.parents[node]
            self.path_rows[node] = rows = (*self.path_rows[parent], self.num_expanded + i)
            seen = [False] * total
            for row in rows:
                seen[row] = True
            mask.append(seen)
            inputs.append([growth.token_ids[node], self.output_rows[parent], self.length + len(rows) - 1])
            output_rows[node] = first_output + i
        self.num_expanded, self.output_rows = total, output_rows
        return Segment(self.slot, self.length, len(beam), torch.tensor(mask, device=device)), inputs


@dataclass(frozen=True)
class Level:
    """The rows of one level of all trees: each node's token, the output row of its parent, its position, all [n]."""

    token_ids: Tensor
    parent_rows: Tensor
    positions: Tensor
    segments: list[Segment]


class TreeModel(Protocol):
    """What the growth asks of a network with slots."""

    slots: KVSlots
    device: torch.device

    def expand(self, outputs: Tensor, level: Level) -> Tensor:
        """Outputs [n, H] of a level's rows, given those of the level before; rows go behind what the slots hold."""
        ...

    def children(self, outputs: Tensor, top_k: int) -> list[Children]:
        """For each row of ``outputs`` [n, H] the best next tokens."""
        ...


def grow(model: TreeModel, trees: list[GrowingTree], outputs: Tensor, budget: Budget) -> None:
    """Grow all trees from the outputs [trees, H] of their roots, as long as one has a node worth expanding."""
    for tree, best in zip(trees, model.children(outputs, budget.top_k), strict=True):
        tree.growth.add([(None, *best)])
    for _ in range(budget.depth):
        beams = [(tree, beam) for tree in trees if (beam := tree.beam(model.slots.capacity))]
        if not beams:
            return
        segments: list[Segment] = []
        inputs: list[list[int]] = []
        for tree, beam in beams:
            segment, rows = tree.expand(beam, len(inputs), model.device)
            segments.append(segment)
            inputs += rows
        token_ids, parent_rows, positions = torch.tensor(inputs, device=model.device).unbind(1)
        outputs = model.expand(outputs, Level(token_ids, parent_rows, positions, segments))
        children = iter(model.children(outputs, budget.top_k))
        for tree, beam in beams:
            tree.growth.add([(node, *next(children)) for node in beam])
        trees = [tree for tree, _ in beams]


SMALLEST_REST = 1e-6


def by_confidence(log_probs: Tensor, confidence: Tensor) -> Tensor:
    """Log-probabilities [n, k] of acceptance, best first, in place of the drafter's own [n, k].

    ``confidence`` [n]: logits of the first child's acceptance. The others share what is left in proportion to their
    probabilities; none counts for more than the first. A confidence that equals the first probability changes nothing.
    """
    first = functional.logsigmoid(confidence.float())[:, None]
    rest = (-torch.expm1(log_probs[:, :1])).clamp_min(SMALLEST_REST).log()
    others = functional.logsigmoid(-confidence.float())[:, None] + log_probs[:, 1:] - rest
    return torch.cat((first, torch.minimum(others, first)), dim=1)


def best_children(
    logits: Tensor, top_k: int, token_ids: Tensor | None = None, confidence: Tensor | None = None
) -> list[Children]:
    """For each row of ``logits`` [n, V] its best tokens and their log-probabilities (fp32), best first.

    ``token_ids`` [V] names the token of each column where the columns are not the vocabulary itself; with
    ``confidence`` [n] the log-probabilities are those of ``by_confidence``. Ids and scores
    cross to the host together, in fp32, which holds every id below 2^24.
    """
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_probs, columns = scores.topk(min(top_k, scores.shape[1]))
    if confidence is not None:
        log_probs = by_confidence(log_probs, confidence)
    found = columns if token_ids is None else token_ids[columns]
    rows = torch.cat((found.float(), log_probs), dim=1).tolist()
    count = columns.shape[1]
    return [([int(token_id) for token_id in row[:count]], row[count:]) for row in rows]
