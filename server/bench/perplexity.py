"""Perplexity of a text under a target in several weight formats: what quantising costs in accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from drafters.proposal import chain
from server.targets.target import Target, TargetError, VerifyRows

SLOT = 0


@dataclass(frozen=True)
class Windows:
    """Windows of ``length`` tokens begin every ``stride``; each token is scored once, in the first window it is in.

    So all but the first window's tokens have at least ``length - stride`` tokens of context. The text's first token
    has none and is not scored.
    """

    length: int = 256
    stride: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.stride < self.length:  # the token before a window's first scored one must lie in it
            raise ValueError(f"windows of {self.length} tokens every {self.stride}; 0 < stride < length is allowed")

    def spans(self, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, first token scored) of each window."""
        scored = 1
        for begin in range(0, max(num_tokens - 1, 1), self.stride):
            end = min(begin + self.length, num_tokens)
            if end > scored:
                yield begin, end, scored
            scored = max(scored, end)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) of ``num_tokens`` tokens; weights: as asked for, held: as held."""

    weights: str
    held: str
    perplexity: float
    num_tokens: int


def perplexity(target: Target, weights: str, token_ids: Sequence[int], windows: Windows) -> Perplexity:
    """Score a text; slot 0 is used and left empty. Errors: TargetError for a text of fewer than two tokens."""
    if len(token_ids) < 2:
        raise TargetError(f"a perplexity needs at least 2 tokens, got {len(token_ids)}")
    total, count = 0.0, 0
    for begin, end, first in windows.spans(len(token_ids)):
        rows = VerifyRows(SLOT, token_ids[begin], chain(token_ids[begin + 1 : end]))
        (verified,) = target.verify([rows])
        # The row before a token predicts it.
        logits = verified.outputs.logits(range(first - begin - 1, end - begin - 1))
        target.release(SLOT)
        wanted = torch.tensor(token_ids[first:end])
        total += float(torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum"))
        count += len(wanted)
    return Perplexity(weights, target.info.weights, math.exp(total / count), count)


def compare_weights(
    token_ids: Sequence[int], formats: Sequence[str], windows: Windows, load: Callable[[str, int], Target]
) -> list[Perplexity]:
    """The same text in each format, one target in memory at a time; ``load`` takes format and capacity."""
    return [perplexity(load(weights, windows.length), weights, token_ids, windows) for weights in formats]
