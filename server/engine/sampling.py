"""From logits to a token: processing, and one uniform number per output position.

The order is: logit bias, repetition, presence and frequency penalties (on logits), the grammar's mask, temperature,
top-k, typical-p, top-p, min-p.
Each of the last three looks at the distribution the step before them left. The draw is the inverse of the cumulative
distribution in token order, at a number that depends on (seed, choice, position) alone, so a seeded text is the same
for any drafter, tree and batch. ``probabilities`` and ``draw`` say what that means, over the whole vocabulary;
``selection`` finds the same token faster wherever rounding cannot change it, which is nearly always.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from server.engine.acceptance import Choose, greedy
from server.engine.request import SamplingParams
from server.engine.selection import select_token
from server.engine.sequence import RunningSequence
from server.targets.target import Verified


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits for one output position."""
    digest = hashlib.blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def forbid(logits: Tensor, sequence: RunningSequence, accepted: Sequence[int]) -> None:
    """Take away, in place, what may not follow: what the grammar has no place for, and an end that comes too early."""
    request = sequence.request
    if sequence.num_output + len(accepted) < request.min_tokens:
        logits[list(request.stop_ids)] = float("-inf")
    if request.grammar is not None:
        output_ids = [*sequence.token_ids[sequence.num_prompt :], *accepted]
        allowed = torch.from_numpy(request.grammar.allowed(output_ids))[: logits.numel()]
        logits[: allowed.numel()].masked_fill_(~allowed, float("-inf"))
        logits[allowed.numel() :] = float("-inf")


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution [vocabulary] in fp64 after temperature (above 0), top-k, typical-p, top-p and min-p."""
    scaled = logits.double() / params.temperature
    if 0 < params.top_k < scaled.numel():
        scaled[scaled < scaled.topk(params.top_k).values[-1]] = float("-inf")
    if params.typical_p < 1:
        scaled[~typical(torch.softmax(scaled, dim=-1), params.typical_p)] = float("-inf")
    probs = torch.softmax(scaled, dim=-1)
    if params.top_p < 1:
        order = scaled.argsort(descending=True, stable=True)
        ordered = probs[order]
        # A token stays while the mass before it is below top-p, so the first one always does.
        dropped = order[ordered.cumsum(0) - ordered >= params.top_p]
        dropped = dropped[dropped != order[0]]
        probs[dropped] = 0
    if params.min_p > 0:
        probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()


def typical(probs: Tensor, mass: float) -> Tensor:
    """[vocabulary] whether a token is kept: those of the surprise nearest to the expected one, until ``mass`` is there.

    Locally typical sampling (Meister et al. 2023, arXiv 2202.00666, section 4).
    """
    surprise = -probs.log()
    entropy = (probs * surprise).nan_to_num(0).sum()
    order = (surprise - entropy).abs().argsort(stable=True)
    ordered = probs[order]
    kept = torch.zeros_like(probs, dtype=torch.bool)
    kept[order[ordered.cumsum(0) - ordered < mass]] = True  # the token that reaches the mass is the last one
    return kept & (probs > 0)


def draw(probs: Tensor, number: float) -> int:
    """The token whose share of [0, 1), in token order, holds ``number``."""
    edges = probs.cumsum(0)
    token_id = int(torch.searchsorted(edges, number * float(edges[-1]), right=True))
    if token_id >= probs.numel():  # rounding at the far end must not leave the support
        token_id = int(probs.nonzero()[-1])
    return token_id


def chooser(sequence: RunningSequence, verified: Verified) -> Choose:
    """The target's own choice at the rows of a request's verify pass."""
    if sequence.request.takes_argmax:
        return greedy(verified.argmax())
    return row_chooser(sequence, verified.logits)


def prompt_chooser(sequence: RunningSequence, logits: Tensor) -> Choose:
    """The target's choice behind the prompt, from the logits [vocabulary] of its last row."""
    return row_chooser(sequence, lambda _: logits)


def row_chooser(sequence: RunningSequence, logits_of: Callable[[int], Tensor]) -> Choose:
    """The choice from whole rows of logits: everything that may change or forbid a token happens here, row by row.

    ``logits_of(row)`` gives the row's logits [vocabulary]; the tokens accepted on the way to the row are its own
    ancestors and count for the penalties.
    """
    request, penalties = sequence.request, sequence.penalties
    params = request.sampling
    untouched = penalties.change_nothing and request.grammar is None and request.min_tokens == 0

    def choose(row: int, accepted: Sequence[int]) -> int:
        logits = logits_of(row)
        if not untouched:
            logits = logits.clone()
            penalties.apply(logits.numpy(), sequence.token_ids, sequence.num_prompt, accepted)
            forbid(logits, sequence, accepted)
        if params.temperature == 0:
            return int(logits.argmax())
        number = uniform(sequence.seed, request.choice, sequence.num_output + len(accepted))
        token_id = select_token(logits, params, number) if params.typical_p == 1 else None
        return draw(probabilities(logits, params), number) if token_id is None else token_id

    return choose
