"""Which drafted tokens stay: pure functions, no forward pass, no state.

The children of every node are a deterministic function of the committed text (a top-k tree, an n-gram chain), so one
rule serves greedy and sampled decoding and is lossless for both (SpecExec's rule; rule D of the project's reference):
draw the target's own next token at the current node; while it is one of the node's children, descend and draw again;
the first token that is no child is the bonus token and ends the round. With greedy decoding "draw" is the arg-max.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from drafters.proposal import Proposal

Choose = Callable[[int, Sequence[int]], int]
"""(row, tokens accepted on the way to it) -> the target's token after that row."""


@dataclass(frozen=True)
class Accepted:
    """rows: the root and the accepted nodes in path order; token_ids: the accepted drafts, then the bonus token."""

    rows: tuple[int, ...]
    token_ids: tuple[int, ...]

    @property
    def num_drafts(self) -> int:
        """Drafted tokens kept."""
        return len(self.rows) - 1


def accept(proposal: Proposal, choose: Choose) -> Accepted:
    """Walk the tree along the target's own choices."""
    rows, token_ids = [0], list[int]()
    while True:
        token_id = choose(rows[-1], token_ids)
        token_ids.append(token_id)
        child = child_with(proposal, rows[-1], token_id)
        if child is None:
            return Accepted(tuple(rows), tuple(token_ids))
        rows.append(child)


def child_with(proposal: Proposal, row: int, token_id: int) -> int | None:
    """The row of the child of ``row`` that holds ``token_id``."""
    return next((child for child in proposal.children[row] if proposal.token_ids[child - 1] == token_id), None)


def greedy(argmax: Sequence[int]) -> Choose:
    """Choose by the arg-max of each row, counted from the request's root."""
    return lambda row, _: argmax[row]
