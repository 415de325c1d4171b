"""A token tree in llama.cpp's terms: every leaf is a sequence, and a row belongs to those of all leaves below it.

Slot s owns the sequence id s, which holds its committed rows and, of a tree, the branch to its first leaf. The other
ids are lent to the other leaves for one pass.
"""

from __future__ import annotations

from collections.abc import Sequence


class SequenceIds:
    """The ids above the slots' own. Errors: ValueError where more are wanted than the library has."""

    def __init__(self, num_slots: int, limit: int) -> None:
        self.free = list(range(limit - 1, num_slots - 1, -1))

    def lend(self, count: int) -> list[int]:
        """``count`` ids nobody uses."""
        if count > len(self.free):
            raise ValueError(
                f"{count} more branches of drafts are asked for, llama.cpp has {len(self.free)} sequence ids left; "
                "a smaller --rows or --max-seqs needs fewer"
            )
        return [self.free.pop() for _ in range(count)]

    def take_back(self, ids: Sequence[int]) -> None:
        """They are free again."""
        self.free += ids


def leaves_below(row_parents: Sequence[int]) -> list[list[int]]:
    """For each row of a tree, root first, the numbers of the leaves at or below it; leaves count by their row.

    row_parents[i] is smaller than i, -1 for the root.
    """
    inner = set(row_parents)
    below: list[list[int]] = [[] for _ in row_parents]
    leaves = [row for row in range(len(row_parents)) if row not in inner]
    for number, row in enumerate(leaves):
        while row >= 0:
            below[row].append(number)
            row = row_parents[row]
    return below
