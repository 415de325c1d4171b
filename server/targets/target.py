"""What the engine asks of a target: prefill, verify, keep, release, and rows out and in again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from drafters.proposal import Proposal

if TYPE_CHECKING:
    from torch import Tensor


class TargetError(ValueError):
    """A target cannot be loaded or asked for what it cannot give; the message names the file or the argument."""


@dataclass(frozen=True)
class TargetInfo:
    """What others need to know about a target.

    context_length: positions its weights allow; num_parameters: tied weights counted once; feature_layers: the
    features it can give, each as wide as ``hidden_size``: ``last``, the vector the LM head consumes, and EAGLE-3's
    ``low``, ``mid`` and ``high``, where there are layers enough; exact_rows: a row is the same to the last bit whatever
    runs beside it and in whatever pieces the text came; stream_block: a prompt's whole blocks of so many positions are
    read by a device, to be given as one chunk each, 0 where none are.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    num_parameters: int
    weights: str
    feature_layers: tuple[str, ...] = ("last",)
    exact_rows: bool = False
    stream_block: int = 0


@dataclass(frozen=True)
class PrefillChunk:
    """Consecutive prompt tokens of one request, appended after the slot's committed rows."""

    slot: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class VerifyRows:
    """The rows of one request in a verify pass: the root, then the proposal's nodes."""

    slot: int
    root_id: int
    proposal: Proposal


class RowOutputs(Protocol):
    """What a verify pass gives for all its rows, numbered through all requests in the order they were given."""

    features: Tensor
    """[rows, feature width], the selected features."""

    def argmax(self) -> list[int]:
        """The target's greedy next token after each row; computed once."""
        ...

    def logits(self, row_ids: Sequence[int]) -> Tensor:
        """[len(row_ids), vocabulary] fp32 on the CPU; computed for the rows asked."""
        ...


@dataclass(frozen=True)
class Verified:
    """One request's share of a verify pass; its rows count from its root, which is row 0."""

    outputs: RowOutputs
    first_row: int
    num_rows: int

    def argmax(self) -> list[int]:
        """The target's greedy next token after each of the request's rows."""
        return self.outputs.argmax()[self.first_row : self.first_row + self.num_rows]

    def logits(self, row: int) -> Tensor:
        """[vocabulary] fp32 after one row."""
        return self.outputs.logits([self.first_row + row])[0]

    def features(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), feature width] of these rows."""
        first = self.first_row
        if all(row == place for place, row in enumerate(rows)):  # plain rounds and followed chains: no gather
            return self.outputs.features[first : first + len(rows)].clone()
        return self.outputs.features[[first + row for row in rows]]


def share_out(outputs: RowOutputs, rows: Sequence[VerifyRows]) -> list[Verified]:
    """Each request's share of a pass over ``rows``."""
    counts = [part.proposal.num_rows for part in rows]
    firsts = itertools.accumulate(counts[:-1], initial=0)
    return [Verified(outputs, first, count) for first, count in zip(firsts, counts, strict=True)]


@dataclass(frozen=True)
class Prefilled:
    """features [n, feature width] and last [n, hidden] of every row of the chunk.

    last: the vectors that the LM head consumes; logits_of: rows of the chunk -> [rows, vocabulary] fp32, computed for
    those alone; only to be asked before the target's next pass.
    """

    features: Tensor
    last: Tensor
    logits_of: Callable[[Sequence[int]], Tensor]

    @property
    def logits(self) -> Tensor:
        """[vocabulary] fp32 after the last row."""
        return self.logits_of([len(self.last) - 1])[0]


class Target(Protocol):
    """The model whose distribution is served. One thread calls it."""

    info: TargetInfo

    def select_features(self, layers: Sequence[str]) -> None:
        """What ``features`` hold from now on: these of ``info.feature_layers``, side by side in this order.

        Until it is called they hold ``last``. Errors: TargetError for a layer the target cannot give.
        """
        ...

    def prefill(self, chunk: PrefillChunk) -> Prefilled:
        """Run and commit prompt rows."""
        ...

    def verify(self, rows: Sequence[VerifyRows]) -> list[Verified]:
        """One forward pass over all rows of all requests, shared out to them; commits nothing until ``keep``."""
        ...

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        """Commit these rows of the slot's last verify pass (0 is the root), in path order; drop the others."""
        ...

    def read_rows(self, slot: int, start: int, stop: int) -> tuple[Tensor, ...]:
        """Copies of committed rows start .. stop-1 of a slot, as ``write_rows`` takes them."""
        ...

    def write_rows(self, slot: int, rows: Sequence[Tensor]) -> None:
        """Commit rows that ``read_rows`` gave behind those a slot has; they must be of the same positions."""
        ...

    def release(self, slot: int) -> None:
        """Empty a slot."""
        ...

    def embedding(self) -> Tensor:
        """[vocabulary, hidden] input embedding; frozen."""
        ...

    def lm_head(self) -> Tensor:
        """[vocabulary, hidden] output projection; the same tensor as ``embedding()`` where they are tied."""
        ...
