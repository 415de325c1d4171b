"""The token tree a drafter proposes: drafted nodes only; mask, depths and paths are derived. Pure and frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


class ProposalError(ValueError):
    """The nodes do not form a tree in which every parent precedes its children."""


@dataclass(frozen=True)
class Budget:
    """How large a tree may be.

    rows: rows sent to the target, the root included; top_k: children a node may have, and nodes expanded per level;
    depth: expansions after the first level, so the deepest draft has ``depth + 1`` tokens (EAGLE-2's meaning).
    """

    rows: int = 16
    top_k: int = 4
    depth: int = 5

    def __post_init__(self) -> None:
        if self.rows < 1 or self.top_k < 1 or self.depth < 0:
            raise ValueError(
                f"rows {self.rows}, top-k {self.top_k}, depth {self.depth}: rows and top-k must be at least 1, "
                "depth at least 0"
            )


@dataclass(frozen=True)
class Proposal:
    """A tree of drafted tokens below the root, the last committed token, which itself is not listed.

    token_ids[i] and log_probs[i] (the drafter's log-probability of the token given its parent) belong to node i;
    parents[i] is the index of its parent node, always smaller than i, or None for the root.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int | None, ...] = ()
    log_probs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.parents) == len(self.log_probs):
            raise ProposalError(
                f"{len(self.token_ids)} tokens, {len(self.parents)} parents and {len(self.log_probs)} "
                "log-probabilities; a proposal needs as many of each"
            )
        for node, parent in enumerate(self.parents):
            if parent is not None and not 0 <= parent < node:
                raise ProposalError(f"node {node} has parent {parent}; a parent is the root (None) or an earlier node")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """Rows the target verifies: the root and every node."""
        return len(self.token_ids) + 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Tokens on the way from the root to each node, the node included (1 for children of the root)."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent is None else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def row_parents(self) -> tuple[int, ...]:
        """Parents in rows: row 0 is the root (-1: it has none), row i + 1 is node i."""
        return (-1, *(0 if parent is None else parent + 1 for parent in self.parents))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each row, the rows of its children, in proposal order."""
        children: list[list[int]] = [[] for _ in range(self.num_rows)]
        for row, parent in enumerate(self.row_parents):
            if parent >= 0:
                children[parent].append(row)
        return tuple(tuple(rows) for rows in children)

    def select(self, nodes: Iterable[int]) -> Proposal:
        """The tree of some of the nodes. Errors: ProposalError where one of them is there without its parent."""
        kept = sorted(nodes)
        place: dict[int | None, int | None] = {node: i for i, node in enumerate(kept)}
        place[None] = None
        if orphans := [node for node in kept if self.parents[node] not in place]:
            raise ProposalError(f"node {orphans[0]} is kept without its parent {self.parents[orphans[0]]}")
        return Proposal(
            tuple(self.token_ids[node] for node in kept),
            tuple(place[self.parents[node]] for node in kept),
            tuple(self.log_probs[node] for node in kept),
        )

    def cut(self, depth: int) -> Proposal:
        """The tree without the nodes deeper than ``depth``."""
        if max(self.depths, default=0) <= depth:
            return self
        return self.select(node for node, own in enumerate(self.depths) if own <= depth)

    def path(self, row: int) -> list[int]:
        """Rows from the root to ``row``, both included."""
        path = [row]
        while self.row_parents[path[-1]] >= 0:
            path.append(self.row_parents[path[-1]])
        return path[::-1]


def chain(token_ids: Sequence[int], log_probs: Sequence[float] | None = None) -> Proposal:
    """A proposal without branches."""
    parents = tuple(None if i == 0 else i - 1 for i in range(len(token_ids)))
    return Proposal(tuple(token_ids), parents, tuple(log_probs or (0.0,) * len(token_ids)))


class TreeGrowth:
    """Best-first growth of one tree by cumulative draft log-probability (EAGLE-2's dynamic tree).

    The drafter feeds it level by level: ``add`` takes the children of each node expanded last, ``beam`` names the
    nodes worth expanding next, ``proposal`` keeps the ``rows - 1`` best nodes seen. Scores are Python floats of the
    drafter's fp32 values. A child never outranks its parent: on equal scores the shallower, then the earlier node
    wins, so the kept set is closed under ancestors. A log-probability that is not a number counts as minus infinity.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.token_ids: list[int] = []
        self.parents: list[int | None] = []
        self.log_probs: list[float] = []
        self.scores: list[float] = []
        self.depths: list[int] = []
        self.newest: range = range(0)
        self.best: list[tuple[float, int, int]] = []  # (-score, depth, node) of the nodes kept so far, best first

    def add(self, children: Sequence[tuple[int | None, Sequence[int], Sequence[float]]]) -> None:
        """Add one level: (expanded node or None for the root, its children's tokens, their log-probabilities)."""
        first = len(self.token_ids)
        for parent, token_ids, log_probs in children:
            base, depth = (0.0, 1) if parent is None else (self.scores[parent], self.depths[parent] + 1)
            self.token_ids += token_ids
            self.parents += [parent] * len(token_ids)
            self.log_probs += log_probs
            self.scores += [base + (-math.inf if math.isnan(value) else min(value, 0.0)) for value in log_probs]
            self.depths += [depth] * len(token_ids)
        self.newest = range(first, len(self.token_ids))
        # What has fallen out of the best cannot return, since nodes are only ever added.
        ranks = [(-self.scores[node], self.depths[node], node) for node in self.newest]
        self.best = sorted(self.best + ranks)[: self.budget.rows - 1]

    def beam(self) -> list[int]:
        """Up to top-k nodes of the newest level, best first, that can still have a child among the nodes kept.

        A child scores at most its parent's score and is deeper, so a node that is not itself kept has no such child.
        """
        return [node for _, _, node in self.best if node in self.newest][: self.budget.top_k]

    def kept(self) -> list[int]:
        """The best ``rows - 1`` nodes in level order."""
        return sorted(node for _, _, node in self.best)

    def proposal(self) -> Proposal:
        """The tree of the kept nodes."""
        return Proposal(tuple(self.token_ids), tuple(self.parents), tuple(self.log_probs)).select(self.kept())
