"""A draw without sorting the vocabulary: the token of ``sampling.draw(sampling.probabilities(...))``, or no answer.

Only the likeliest tokens are looked for, as many as top-k and top-p keep. The masses computed here and there differ by
rounding alone, by less than ``rounding`` of the whole (below); where a cut or the number drawn lies that close to an
edge, the textbook's way must decide, which happens about once in 10^10 draws. So the token is always the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from server.engine.request import SamplingParams

Array = np.ndarray[Any, np.dtype[Any]]

FIRST_PART = 256  # likeliest tokens looked at first; top-p keeps fewer as a rule
GROWTH = 8
BLOCK = 512


def select_token(logits: Tensor, params: SamplingParams, number: float) -> int | None:
    """The token that ``number`` in [0, 1) draws from logits [vocabulary] fp32 on the CPU; None where rounding decides.

    ``params.temperature`` is above 0.
    """
    values: Array = logits.numpy()
    peak = float(logits.max())
    if not np.isfinite(peak / params.temperature):
        return None
    slack = rounding(values.size)
    ids: Array | None = None
    if 0 < params.top_k < values.size:
        ids = likeliest(values, params.top_k)
        kept = logits[ids]
    else:
        kept = logits
    weights: Array = kept.double().div_(params.temperature).sub_(peak / params.temperature).exp_().numpy()
    if params.top_p < 1:
        inside = nucleus(kept.numpy(), weights, params.top_p, slack)
        if inside is None:
            return None
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    if params.min_p > 0:
        inside = np.flatnonzero(weights >= params.min_p - slack)
        if np.any(weights[inside] <= params.min_p + slack):
            return None
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    place = place_of(weights, number, slack)
    return place if ids is None or place is None else int(ids[place])


def rounding(vocab_size: int) -> float:
    """The most by which two sums of these weights, in any order, may differ as a share of the whole.

    Each of n additions in fp64 is off by at most 2^-53 of what it gives, and an exponential by a few of these units
    (Higham, Accuracy and Stability of Numerical Algorithms, 4.2); twice that, for either side.
    """
    return (4 * vocab_size + 256) * 2.0**-53


def likeliest(values: Array, count: int) -> Array:
    """Places of the ``count`` greatest values and of all that equal the last of them, in rising order."""
    threshold = np.partition(values, values.size - count)[values.size - count]
    return np.flatnonzero(values >= threshold)


def nucleus(values: Array, weights: Array, top_p: float, slack: float) -> Array | None:
    """Places, rising, of the likeliest tokens with the mass ``top_p``: one stays while the mass before it is below.

    Equal logits are taken by their places. None where rounding could move the cut.
    """
    total = float(weights.sum())
    count = FIRST_PART
    while True:
        whole = count >= values.size
        part = np.arange(values.size) if whole else likeliest(values, count)
        order = part[np.argsort(-values[part], kind="stable")]
        before = np.concatenate([[0.0], weights[order].cumsum()]) / total
        cut = min(max(1, int(np.searchsorted(before, top_p, side="left"))), order.size)
        if cut < order.size or whole:
            break
        count *= GROWTH
    if cut > 1 and before[cut - 1] >= top_p - slack:
        return None
    if cut < order.size and before[cut] <= top_p + slack:
        return None
    return np.sort(order[:cut])


def place_of(weights: Array, number: float, slack: float) -> int | None:
    """The place whose share of the whole, in order, holds ``number``; None where rounding could move it.

    Two levels of sums, since a running sum over a whole vocabulary takes longer than everything else here.
    """
    blocks = np.add.reduceat(weights, np.arange(0, weights.size, BLOCK)).cumsum()
    total = float(blocks[-1])
    goal = number * total
    block = min(int(np.searchsorted(blocks, goal, side="right")), blocks.size - 1)
    start = float(blocks[block - 1]) if block else 0.0
    edges = weights[block * BLOCK : (block + 1) * BLOCK].cumsum() + start
    place = int(np.searchsorted(edges, goal, side="right"))
    if place == edges.size or edges[place] - goal <= slack * total:
        return None
    below = float(edges[place - 1]) if place else start
    if (block or place) and goal - below <= slack * total:
        return None
    return block * BLOCK + place
