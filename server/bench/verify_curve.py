"""T(n): how long the target takes to verify n rows, measured, and as the costs of plans predict it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from drafters.proposal import Budget, chain
from kernels.linear_lowbit.bench import ModelShape
from server.bench.contestants import GREEDY
from server.bench.whole_model import random_model
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request
from server.placement.cost import MeasuredCosts
from server.placement.probe import LayerProbe, milliseconds
from server.targets.native_target import NativeTarget
from server.targets.target import PrefillChunk, Target, VerifyRows

ROWS = (1, 2, 4, 8, 16)
CONTEXT = 64
REPEATS = 9
# Of passes of one row before those that are measured. What a large cache keeps of the weights grows from pass to pass:
# behind other work one row of SmolLM2 took 7.3 ms, ten passes later 6.2, thirty later 5.5. A text begins as cold.
WARMING_S = 0.05
TOY = ModelShape(64, 128, 1, 4, 4, 256)  # its layer and head take no time, so what its rounds take is everybody's
TOY_TOKENS = 5


def verify_ms(target: Target, rows: Sequence[int] = ROWS, context: int = CONTEXT) -> dict[str, float]:
    """Median milliseconds of a verify pass with its arg-max, for each number of rows, behind ``context`` tokens.

    The numbers of rows take turns, so that other load on the machine bends the curve as little as may be. Slot 0 is
    used and left empty.
    """
    return rounded(medians(list(turns(target, rows, context))))


class PassCosts:
    """T(n) of a target and, in the same turns, the costs that a plan for this machine is made of.

    Those are a layer's (of the first, the middle and the last one), the head's, and a round's of a model of next to
    nothing, which finds the caches as a pass over the target leaves them. Take turns with whatever the costs are to
    predict, so that other load falls on both alike. What a second device computes of the target is not in them.
    """

    def __init__(self, target: NativeTarget, contexts: Sequence[int] = (CONTEXT,), rows: Sequence[int] = ROWS) -> None:
        """T(n) is measured behind the first of ``contexts``, the parts behind each."""
        self.target, self.contexts, self.rows = target, contexts, rows
        layers, count = target.stack.layers, len(target.stack)
        some = (layers[0], layers[count // 2], layers[-1])
        self.probe = LayerProbe(some, target.packed_head, count, max(contexts), max(rows))
        toy = NativeTarget(random_model(TOY, "int8", CONTEXT), "toy", 1, CONTEXT)
        self.toy = Engine(toy, None, EngineOptions(1, CONTEXT - 1, Budget(1, 1, 0)))
        self.passes: list[dict[int, float]] = []
        self.rounds: list[tuple[float, float]] = []
        self.parts: list[list[dict[int, tuple[float, float]]]] = [[] for _ in contexts]

    def measure(self, num_turns: int = 2) -> None:
        """Some turns more; slot 0 of the target must be free, and is afterwards."""
        for turn in turns(self.target, self.rows, self.contexts[0], num_turns):
            self.passes.append(turn)
            warm_up(lambda: self.probe.times(self.rows[0], self.contexts[0]))
            for context, found in zip(self.contexts, self.parts, strict=True):
                found.append({n: self.probe.times(n, context) for n in self.rows})
            self.rounds += rounds_behind(self.toy, lambda: self.probe.times(self.rows[0], self.contexts[-1]))

    def verify_ms(self) -> dict[str, float]:
        """T(n): medians of the turns so far."""
        return rounded(medians(self.passes))

    def costs(self) -> list[MeasuredCosts]:
        """The parts' medians, for each context."""
        pass_ms = statistics.median(verify for verify, _ in self.rounds)
        round_ms = statistics.median(beside for _, beside in self.rounds)
        return [
            MeasuredCosts(
                medians([{n: layer_ms for n, (layer_ms, _) in turn.items()} for turn in found]),
                medians([{n: head_ms for n, (_, head_ms) in turn.items()} for turn in found]),
                pass_ms, round_ms,
            ) for found in self.parts
        ]  # fmt: skip


def rounds_behind(engine: Engine, between: Callable[[], object]) -> Iterator[tuple[float, float]]:
    """Milliseconds of one text's rounds in their verify pass and beside it; ``between`` is called before each."""
    engine.submit(Request("toy", (1, 2), TOY_TOKENS, GREEDY))
    engine.step()  # the prompt
    while engine.scheduler.has_work:
        between()
        before_s = engine.clock.verify_s
        taken_ms = milliseconds(engine.step)
        verify_ms = 1e3 * (engine.clock.verify_s - before_s)
        yield verify_ms, taken_ms - verify_ms


def turns(target: Target, rows: Sequence[int], context: int, repeats: int = REPEATS) -> Iterator[dict[int, float]]:
    """Milliseconds of a pass over each number of rows, several times; each turn warms up first."""
    token_ids = [i % target.info.vocab_size for i in range(context + max(rows))]
    asked = {n: [VerifyRows(0, token_ids[context], chain(token_ids[context + 1 : context + n]))] for n in rows}

    def time_pass(num_rows: int) -> float:
        return milliseconds(lambda: target.verify(asked[num_rows])[0].argmax())

    target.prefill(PrefillChunk(0, token_ids[:context]))
    try:
        for _ in range(repeats):
            warm_up(lambda: time_pass(rows[0]))
            yield {num_rows: time_pass(num_rows) for num_rows in rows}
    finally:
        target.release(0)


def warm_up(work: Callable[[], object]) -> None:
    """Do it until WARMING_S have gone by."""
    started = time.perf_counter()
    while time.perf_counter() - started < WARMING_S:
        work()


def medians(found: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Of each number of rows."""
    return {rows: statistics.median(turn[rows] for turn in found) for rows in found[0]}


def rounded(times: Mapping[int, float]) -> dict[str, float]:
    """As reports have them."""
    return {str(rows): round(taken, 3) for rows, taken in times.items()}
