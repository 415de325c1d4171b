"""No prompt is read twice: the target's rows of earlier texts, and the features the drafter needs, by their tokens.

Pages are shared by all requests that begin alike; a hit copies them into the request's slot, which takes milliseconds
for a thousand tokens where reading those would take seconds. The text stays the same to the last bit. Where rows do not
depend on what stands beside them (``TargetInfo.exact_rows``), any page will do, of answers too; elsewhere a page is a
whole prefill chunk, so that what follows a hit is computed in the very chunks that it would have been, and only prompts
are kept. Pages of blocks that a device read (``TargetInfo.stream_block``) are for prompts whose same blocks it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.pages import PageTree
from server.engine.sequence import RunningSequence
from server.targets.target import Target

EXACT_PAGE = 16


@dataclass(frozen=True)
class CachedRows:
    """What a page holds: the target's rows and their features."""

    rows: tuple[Tensor, ...]
    features: Tensor

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(part.numel() * part.element_size() for part in (*self.rows, self.features))


class PrefixCache:
    """The pages, and for each running request the features of its rows so far."""

    def __init__(self, target: Target, prefill_chunk: int, limit_bytes: int) -> None:
        self.target = target
        self.exact = target.info.exact_rows
        self.pages = PageTree(EXACT_PAGE if self.exact else prefill_chunk, limit_bytes)
        self.features: dict[int, list[Tensor]] = {}

    def restore(self, sequence: RunningSequence) -> Tensor | None:
        """Fill an empty slot with what is known of its text, all but the last token at most; its features."""
        text = sequence.token_ids[: sequence.num_readable - 1]
        block, size = self.target.info.stream_block, self.pages.page_size
        streamable = sequence.streamable(block)
        found = self.pages.find(text, sequence.request.cache_salt, streamable)
        if len(found) * size < streamable:  # the device takes up where a block begins
            found = found[: len(found) * size // block * block // size]
        if not found:
            return None
        for page in found:
            self.target.write_rows(sequence.slot, page.content.rows)
        sequence.num_rows = len(found) * size
        sequence.streamed = min(sequence.num_rows, streamable)
        if not sequence.num_output:
            sequence.stats.cached = sequence.num_rows
        return torch.cat([page.content.features for page in found])

    def extend(self, sequence: RunningSequence, features: Tensor) -> None:
        """The features of rows that the target has committed for a request."""
        self.features.setdefault(sequence.slot, []).append(features)

    def keep(self, sequence: RunningSequence) -> None:
        """Keep the pages of a request's rows as they stand."""
        slot, size = sequence.slot, self.pages.page_size
        num_rows = sequence.num_rows if self.exact else min(sequence.num_rows, sequence.num_prompt)
        if num_rows < size:
            return

        def read(start: int) -> tuple[CachedRows, int]:
            features = rows_of(self.features[slot], sequence.num_rows, start, start + size)
            page = CachedRows(self.target.read_rows(slot, start, start + size), features)
            return page, page.num_bytes

        self.pages.add(sequence.token_ids[:num_rows], read, sequence.request.cache_salt, sequence.streamed)

    def release(self, slot: int) -> None:
        """A request has left its slot."""
        self.features.pop(slot, None)

    def check_integrity(self, held: Collection[int]) -> None:
        """Raises ValueError where bytes are miscounted, or features are kept for a slot that nobody holds."""
        self.pages.check_integrity()
        if stray := set(self.features) - set(held):
            raise ValueError(f"features are kept for the slots {sorted(stray)}, which nobody holds")


def rows_of(pieces: Sequence[Tensor], num_rows: int, start: int, stop: int) -> Tensor:
    """A copy of rows start .. stop-1 of tensors that hold ``num_rows`` behind one another; those wanted lie near the
    end, so that is where the search begins."""
    found: list[Tensor] = []
    end = num_rows
    for piece in reversed(pieces):
        begin = end - len(piece)
        if begin < stop:
            found.append(piece[max(start - begin, 0) : stop - begin])
        if begin <= start:
            break
        end = begin
    return torch.cat(found[::-1])
