"""Log-probabilities that are told: of the tokens that were committed, and of a prompt's own tokens.

They are those of the target's raw logits, so they are the same whatever is drafted and however the text is sampled.
A prompt's rows are looked at some at a time: memory stays that of a few rows of the vocabulary however long it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.request import PromptEvent, Ranked
from server.engine.sequence import RunningSequence
from server.targets.target import Prefilled

ROWS_AT_ONCE = 32
LEAST = -9999.0  # JSON has no infinity


def rank(logits: Tensor, token_ids: Sequence[int], num_top: int) -> tuple[Ranked, ...]:
    """logits [n, vocabulary] and the n tokens that came -> how likely each was, with the ``num_top`` likeliest."""
    log_probs = torch.log_softmax(logits.float(), dim=-1).clamp_(min=LEAST)
    own = log_probs.gather(1, torch.tensor(token_ids).unsqueeze(1))
    places = ((log_probs > own).sum(dim=-1) + 1).tolist()
    top = log_probs.topk(min(num_top, log_probs.shape[1]), dim=-1)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return tuple(map(Ranked, token_ids, own[:, 0].tolist(), places, tops))


def rank_prompt(sequence: RunningSequence, start: int, result: Prefilled) -> list[PromptEvent]:
    """What a chunk that begins at prompt position ``start`` says of the tokens behind its rows, where that is asked.

    A prompt that had to be read again says nothing twice.
    """
    num_top = sequence.request.prompt_logprobs
    begin, end = max(start, sequence.num_ranked), min(start + len(result.last), sequence.num_prompt - 1)
    if num_top is None or begin >= end:
        return []
    ranked: list[Ranked] = []
    for row in range(begin, end, ROWS_AT_ONCE):
        token_ids = sequence.request.prompt_ids[row + 1 : min(row + ROWS_AT_ONCE, end) + 1]
        ranked += rank(result.logits_of(range(row - start, row - start + len(token_ids))), token_ids, num_top)
    sequence.num_ranked = end
    return [PromptEvent(sequence.request_id, tuple(ranked))]
