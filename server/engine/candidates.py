"""The drafts of one request with what each is worth: the stages' trees merged into one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from drafters.proposal import Proposal
from server.engine.acceptance import Accepted
from server.engine.calibration import DRAFTER, Calibration, Cell, RequestRecord, drafter_cell, forced_cell, lookup_cell


@dataclass(frozen=True)
class Draft:
    """A node's cells, one for each stage that drafted it, each with its prior."""

    cells: tuple[tuple[Cell, float], ...]

    def is_from(self, stage: str) -> bool:
        """Whether this stage drafted it."""
        return any(cell.stage == stage for cell, _ in self.cells)


@dataclass(frozen=True)
class Candidates:
    """One request's tree before its rows are chosen.

    drafts[i] belongs to node i; gains[i] is the probability that it is accepted: at most its parent's.
    """

    tree: Proposal
    drafts: tuple[Draft, ...] = ()
    gains: tuple[float, ...] = ()

    def ranked(self) -> list[int]:
        """Nodes by falling gain; a parent always before its children."""
        return sorted(range(len(self.tree)), key=lambda node: (-self.gains[node], self.tree.depths[node], node))

    def select(self, nodes: Sequence[int]) -> Candidates:
        """Only these nodes. Errors: ProposalError where one is there without its parent."""
        kept = sorted(nodes)
        return Candidates(
            self.tree.select(kept), tuple(self.drafts[i] for i in kept), tuple(self.gains[i] for i in kept)
        )

    def best(self, count: int) -> Candidates:
        """The ``count`` nodes worth most, which are closed under ancestors."""
        return self if len(self.tree) <= count else self.select(self.ranked()[:count])

    def followed(self, accepted: Accepted) -> list[bool]:
        """For each level that a drafter's tree offered on the accepted path, whether one of its nodes was accepted."""
        path, followed = set(accepted.rows), list[bool]()
        for row in accepted.rows:
            children = [c for c in self.tree.children[row] if self.drafts[c - 1].is_from(DRAFTER)]
            if not children:
                break
            followed.append(any(child in path for child in children))
        return followed

    @property
    def best_draft(self) -> float:
        """What the likeliest first token of the drafter is worth; 0 where it drafted none."""
        first = [c - 1 for c in self.tree.children[0] if self.drafts[c - 1].is_from(DRAFTER)]
        return max((self.gains[node] for node in first), default=0.0)

    def tried(self, accepted: Accepted) -> Iterator[tuple[Draft, bool]]:
        """The nodes whose parent was accepted, and whether they were accepted themselves."""
        path = set(accepted.rows)
        for row in accepted.rows:
            for child in self.tree.children[row]:
                yield self.drafts[child - 1], child in path


NOTHING = Candidates(Proposal())


def sorted_gains(candidates: Sequence[Candidates]) -> list[float]:
    """The gains of all requests' nodes, falling."""
    return sorted((gain for c in candidates for gain in c.gains), reverse=True)


def merge(
    tree: Proposal,
    copied: Sequence[int],
    match_length: int,
    calibration: Calibration,
    record: RequestRecord,
    forced: Sequence[int] = (),
) -> Candidates:
    """A drafter's tree, a chain copied from the text and one that a grammar forces, with the calibrated worth of each.

    Nodes that several have are one node, worth the best of them.
    """
    token_ids, parents = list(tree.token_ids), list(tree.parents)
    log_probs = list(tree.log_probs)
    cells = [[drafter_cell(depth, value)] for depth, value in zip(tree.depths, tree.log_probs, strict=True)]
    places = {(parent, token_id): node for node, (parent, token_id) in enumerate(zip(parents, token_ids, strict=True))}
    copied_cells = [lookup_cell(depth, match_length) for depth in range(1, len(copied) + 1)]
    forced_cells = [forced_cell(depth) for depth in range(1, len(forced) + 1)]
    for chain, own_cells in ((copied, copied_cells), (forced, forced_cells)):
        parent: int | None = None
        for token_id, cell in zip(chain, own_cells, strict=True):
            node = places.get((parent, token_id))
            if node is None:
                node = places[parent, token_id] = len(token_ids)
                token_ids.append(token_id)
                parents.append(parent)
                log_probs.append(0.0)
                cells.append([])
            cells[node].append(cell)
            parent = node
    gains: list[float] = []
    for above, own in zip(parents, cells, strict=True):
        worth = max(calibration.worth(cell, prior, record) for cell, prior in own)
        gains.append(worth * (1.0 if above is None else gains[above]))
    merged = Proposal(tuple(token_ids), tuple(parents), tuple(log_probs))
    return Candidates(merged, tuple(Draft(tuple(own)) for own in cells), tuple(gains))


def possible(tree: Proposal, follows: Callable[[Sequence[int]], int]) -> list[int]:
    """The nodes whose whole path may follow; ``follows`` says how many of a path's tokens do, from the first."""
    depth_of: dict[int, int] = {}  # how far the path of each node goes on
    kept: list[int] = []
    for node in reversed(range(len(tree))):
        if node not in depth_of:
            path = path_to(tree, node)
            count = follows([tree.token_ids[i] for i in path])
            depth_of |= dict.fromkeys(path, count)
        if tree.depths[node] <= depth_of[node]:
            kept.append(node)
    return kept


def path_to(tree: Proposal, node: int) -> list[int]:
    """The nodes from the first level down to this one."""
    path: list[int] = []
    at: int | None = node
    while at is not None:
        path.append(at)
        at = tree.parents[at]
    return path[::-1]


def learn_unused(calibration: Calibration, found: Sequence[Candidates], chosen: Sequence[Candidates]) -> None:
    """A drafter whose drafts are not worth a row is judged by what they are worth, else it would be asked for ever."""
    for before, after in zip(found, chosen, strict=True):
        if before.best_draft > 0 and after.best_draft == 0:
            calibration.add_levels([before.best_draft])


def choose_rows(candidates: Sequence[Candidates], num_nodes: int) -> list[Candidates]:
    """The ``num_nodes`` best nodes of all requests together, given back to each request."""
    ranked = sorted(
        (-c.gains[node], c.tree.depths[node], number, node)
        for number, c in enumerate(candidates)
        for node in range(len(c.tree))
    )
    chosen: list[list[int]] = [[] for _ in candidates]
    for _, _, number, node in ranked[:num_nodes]:
        chosen[number].append(node)
    return [c if len(nodes) == len(c.tree) else c.select(nodes) for c, nodes in zip(candidates, chosen, strict=True)]
