"""From logits to a token: processing, and one uniform number per output position.

The order is: logit bias, repetition, presence and frequency penalties (on logits), the grammar's mask, temperature,
top-k, top-p, min-p.
Top-p and min-p look at the distribution the step before them left. The draw is the inverse of the cumulative
distribution in token order, at a number that depends on (seed, choice, position) alone, so a seeded text is the same
for any drafter, tree and batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from server.engine.acceptance import Choose, greedy
from server.engine.request import SamplingParams
from server.engine.sequence import RunningSequence
from server.targets.target import Verified


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits for one output position."""
    digest = hashlib.blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def penalise(
    logits: Tensor, params: SamplingParams, output_counts: Mapping[int, int], prompt_ids: Sequence[int]
) -> Tensor:
    """Logit bias and penalties; ``output_counts`` holds the tokens generated before this position.

    Presence and frequency count generated tokens (OpenAI's definition); the repetition penalty divides positive and
    multiplies negative logits of every token seen in prompt or output (CTRL, Keskar et al. 2019).
    """
    logits = logits.clone()
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*output_counts, *prompt_ids}), device=logits.device)
        values = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if output_counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(output_counts), device=logits.device)
        counts = torch.tensor(list(output_counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


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
    """The distribution [vocabulary] in fp64 after temperature (above 0), top-k, top-p and min-p."""
    scaled = logits.double() / params.temperature
    if 0 < params.top_k < scaled.numel():
        scaled[scaled < scaled.topk(params.top_k).values[-1]] = float("-inf")
    probs = torch.softmax(scaled, dim=-1)
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        # A token stays while the mass before it is below top-p, so the first one always does.
        dropped = order[ordered.cumsum(0) - ordered >= params.top_p]
        dropped = dropped[dropped != order[0]]
        probs[dropped] = 0
    if params.min_p > 0:
        probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()


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
    params = sequence.request.sampling

    def choose(row: int, accepted: Sequence[int]) -> int:
        counts = sequence.output_counts
        if accepted:
            counts = counts.copy()
            counts.update(accepted)
        logits = penalise(logits_of(row), params, counts, sequence.request.prompt_ids)
        forbid(logits, sequence, accepted)
        if params.temperature == 0:
            return int(logits.argmax())
        position = sequence.num_output + len(accepted)
        return draw(probabilities(logits, params), uniform(sequence.seed, sequence.request.choice, position))

    return choose
