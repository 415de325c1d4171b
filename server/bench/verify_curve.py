"""T(n): how long the target takes to verify n rows, measured, and as the costs of plans predict it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from drafters.proposal import Budget, chain
from kernels.linear_lowbit.bench import ModelShape
from server.bench.contestants import Case, EngineContestant
from server.bench.whole_model import random_model
from server.engine.engine import Engine, EngineOptions
from server.placement.cost import MeasuredCosts
from server.placement.probe import LayerProbe, milliseconds
from server.targets.native_target import NativeTarget
from server.targets.target import PrefillChunk, Target, VerifyRows

ROWS = (1, 2, 4, 8, 16)
CONTEXT = 64
REPEATS = 9
TOY = ModelShape(64, 128, 1, 4, 4, 256)  # its layer and head take no time, so what its rounds take is everybody's
TOY_TOKENS = 32


def verify_ms(target: Target, rows: Sequence[int] = ROWS, context: int = CONTEXT) -> dict[str, float]:
    """Median milliseconds of a verify pass with its arg-max, for each number of rows, behind ``context`` tokens.

    The numbers of rows take turns, so that other load on the machine bends the curve as little as may be. Slot 0 is
    used and left empty.
    """
    return rounded(medians(list(turns(target, rows, context))))


def verify_beside_costs(
    target: NativeTarget, contexts: Sequence[int] = (CONTEXT,), rows: Sequence[int] = ROWS
) -> tuple[dict[str, float], list[MeasuredCosts]]:
    """The same behind the first of ``contexts``, and for each of them the costs that a plan for this machine is made
    of, measured between its turns: the first, the middle and the last layer, the head, and a model of next to nothing.

    What a second device computes of the target is not in them.
    """
    layers, count = target.stack.layers, len(target.stack)
    some = (layers[0], layers[count // 2], layers[-1])
    probe = LayerProbe(some, target.packed_head, count, max(contexts), max(rows))
    toy = NativeTarget(random_model(TOY, "int8", CONTEXT), "toy", 1, CONTEXT)
    engine = EngineContestant("toy", Engine(toy, None, EngineOptions(1, CONTEXT - 1, Budget(1, 1, 0))))
    case = Case("toy", (1, 2), TOY_TOKENS)
    passes, toy_passes, rounds = list[dict[int, float]](), list[dict[int, float]](), list[float]()
    of_parts: list[list[dict[int, tuple[float, float]]]] = [[] for _ in contexts]
    for turn in turns(target, rows, contexts[0]):
        passes.append(turn)
        probe.times(rows[0], contexts[0])  # what is in the caches now is not the probe's
        for context, found in zip(contexts, of_parts, strict=True):
            found.append({n: probe.times(n, context) for n in rows})
        rounds.append(1e3 * engine.run(case).seconds / (TOY_TOKENS - 1))
        toy_passes += turns(toy, (1,), 2, 3)
    pass_ms = medians(toy_passes)[1]
    round_ms = max(statistics.median(rounds) - pass_ms, 0.0)
    costs = [
        MeasuredCosts(
            medians([{n: layer_ms for n, (layer_ms, _) in turn.items()} for turn in found]),
            medians([{n: head_ms for n, (_, head_ms) in turn.items()} for turn in found]),
            pass_ms, round_ms,
        ) for found in of_parts
    ]  # fmt: skip
    return rounded(medians(passes)), costs


def turns(target: Target, rows: Sequence[int], context: int, repeats: int = REPEATS) -> Iterator[dict[int, float]]:
    """Milliseconds of a pass over each number of rows, several times; each turn warms up first."""
    token_ids = [i % target.info.vocab_size for i in range(context + max(rows))]
    asked = {n: [VerifyRows(0, token_ids[context], chain(token_ids[context + 1 : context + n]))] for n in rows}

    def time_pass(num_rows: int) -> float:
        return milliseconds(lambda: target.verify(asked[num_rows])[0].argmax())

    target.prefill(PrefillChunk(0, token_ids[:context]))
    try:
        for _ in range(repeats):
            time_pass(rows[0])
            yield {num_rows: time_pass(num_rows) for num_rows in rows}
    finally:
        target.release(0)


def medians(found: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Of each number of rows."""
    return {rows: statistics.median(turn[rows] for turn in found) for rows in found[0]}


def rounded(times: Mapping[int, float]) -> dict[str, float]:
    """As reports have them."""
    return {str(rows): round(taken, 3) for rows, taken in times.items()}
