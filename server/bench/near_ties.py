"""Where a target's rows are equal up to rounding: how far they move, and whether a text may part from its twin there.

The same row in other company is summed in another order; where activations are rounded (to 8 bits by llama.cpp, to bf16
by torch) a last bit becomes a step. Two texts may then part where the choice was close. Everything here is in logits.
Let no difference of two logits move by more than t. The greedy choice turns only between tokens less than t apart. A
seeded one is the token whose share of the cumulative distribution holds a number: the odds of each edge, a sum of
exp(logit / temperature) over another, change by a factor of at most exp(t / temperature), and so do those of the mass
before a token, by which top-p keeps it. So distances on the scale of log-odds, times the temperature, compare with t.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drafters.proposal import Proposal
from server.engine.request import SamplingParams
from server.engine.sampling import probabilities
from server.targets.target import PrefillChunk, Target, TargetInfo, VerifyRows

TIE_FP32 = 1e-4
TIE_ROUNDED = 1.0  # SmolLM2-135M's rows in llama.cpp move by 0.18 at the median, by 0.71 at most of 272
SLOT, EIGHT, BEST = 0, 8, 10
TEXTS, READ, TOKENS = 6, 16, 32  # of ``movement_json``: texts, tokens read before any is judged, tokens judged


def near_tie(info: TargetInfo) -> float:
    """The distance in logits below which a parting is a near-tie; 0, so none is, where rows are exact."""
    if info.exact_rows:
        return 0.0
    return TIE_FP32 if info.weights == "fp32" else TIE_ROUNDED


def movement_json(target: Target, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a near-tie is for ``target``, and how far its rows move, measured on the first texts long enough."""
    long = [text for text in texts if len(text) >= READ + TOKENS][:TEXTS]
    moved = [each for text in long for each in row_movement(target, text[: READ + TOKENS], READ)]
    figures = {"median": round(statistics.median(moved), 6), "largest": round(max(moved), 6)} if moved else {}
    return {"below": near_tie(target.info), "rows": len(moved), "movement": figures}


def row_movement(target: Target, token_ids: Sequence[int], start: int) -> list[float]:
    """For each token from ``start`` on: how far its logits move between passes of one row and of eight.

    That is the most by which the best token's lead over one of the next nine changes. The rows before it came in
    passes of the same size, as in serving, so what they add up to is in it.
    """
    alone, together = (logits_in_passes(target, token_ids, start, rows) for rows in (1, EIGHT))
    best = alone.topk(BEST).indices
    leads = [logits.gather(1, best[:, :1]) - logits.gather(1, best[:, 1:]) for logits in (alone, together)]
    moved: list[float] = (leads[0] - leads[1]).abs().amax(dim=1).tolist()
    return moved


def logits_in_passes(target: Target, token_ids: Sequence[int], start: int, rows: int) -> Tensor:
    """[tokens from start on, vocabulary] read in chains of ``rows``, each kept."""
    target.prefill(PrefillChunk(SLOT, token_ids[:start]))
    found = []
    for first in range(start, len(token_ids), rows):
        root_id, *drafts = token_ids[first : first + rows]
        parents = tuple(place - 1 if place else None for place in range(len(drafts)))
        chain = Proposal(tuple(drafts), parents, (0.0,) * len(drafts))
        (verified,) = target.verify([VerifyRows(SLOT, root_id, chain)])
        found += [verified.logits(row) for row in range(chain.num_rows)]
        target.keep(SLOT, range(chain.num_rows))
    target.release(SLOT)
    return torch.stack(found)


def seeded_gap(logits: Tensor, params: SamplingParams, number: float, token_id: int, tie: float) -> float | None:
    """How far ``number`` is from the share of ``token_id``, in logits; None where top-p drops the token by far."""
    gaps = []
    for top_p in {params.top_p, *(moved_share(params.top_p, by / params.temperature) for by in (-tie, tie))}:
        probs = probabilities(logits, dataclasses.replace(params, top_p=top_p))
        if probs[token_id] > 0:
            end = float(probs[: token_id + 1].sum())
            outside = max(log_odds(end - float(probs[token_id])) - log_odds(number), log_odds(number) - log_odds(end))
            gaps.append(max(outside, 0.0) * params.temperature)
    return min(gaps, default=None)


def moved_share(share: float, by: float) -> float:
    """``share`` moved on the scale of log-odds; 1 stays 1."""
    return 1 / (1 + math.exp(-log_odds(share) - by))


def log_odds(share: float) -> float:
    """Infinite at both ends, where no edge moves; beyond them is rounding."""
    if share <= 0:
        return -math.inf
    return math.inf if share >= 1 else math.log(share / (1 - share))
