"""Many requests at once: tokens per second of several streams, waits, and trees by cost beside fixed ones.

Everything runs in one process on one loaded target. Contestants take turns, who begins rotates, and a contestant is
compared with plain decoding of the same turn, so that heat and other load fall on both; figures are medians of turns.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from drafters.drafter import Drafter
from drafters.native import NativeDrafter
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget
from server.bench.compare import race
from server.bench.contestants import GREEDY, EngineContestant
from server.bench.texts import Texts
from server.engine.cost import Costs
from server.engine.engine import Engine, EngineOptions
from server.engine.measure import CONTEXT, measured_costs
from server.engine.request import Event, FinishedEvent, FinishReason, Request, TokensEvent
from server.targets.target import PrefillChunk, Prefilled, Target

PLAIN, DOVETAIL, LOOKUP, USELESS = "plain", "dovetail", "lookup", "useless drafter"
CACHE_BYTES = 512 * 2**20
FIXED_ROWS = (2, 4, 8, 16, 32)
HEAD_DIM = 64
SPARE = 8  # tokens that a stream may get while one of the others begins

Engines = dict[str, Engine]
Progress = Callable[[str], None]
Prompts = Sequence[Sequence[int]]


class StreamsError(RuntimeError):
    """A measurement that gave nothing to measure; the message says which."""


@dataclass(frozen=True)
class Setup:
    """What all contestants share: the target, slots and context, and the largest tree of rows by cost."""

    target: Target
    max_seqs: int
    context: int
    budget: Budget

    def engine(self, drafter: Drafter | None, *, lookup: bool, by_cost: bool = True, rows: int | None = None) -> Engine:
        """An engine of its own; ``rows``: the size of its trees, where that is not the budget's."""
        budget = self.budget if rows is None else self.tree(rows)
        options = EngineOptions(self.max_seqs, self.context, budget, lookup=lookup, cache_bytes=CACHE_BYTES)
        return Engine(self.target, drafter, options, self.costs(drafter) if by_cost else None)

    def tree(self, rows: int) -> Budget:
        """Trees of so many rows, no deeper than rows allow."""
        return dataclasses.replace(self.budget, rows=rows, depth=min(max(rows - 2, 0), self.budget.depth))

    def costs(self, drafter: Drafter | None) -> Costs:
        """Measured now: what an earlier run remembers was another machine's load."""
        return copy.deepcopy(measured_costs(self.target, drafter, self.budget, self.context - CONTEXT - 1))


def requests_for(prompts: Prompts, max_tokens: int, name: str = "s") -> list[Request]:
    """Greedy requests that go on to their end."""
    return [Request(f"{name}{i}", prompt, max_tokens, GREEDY) for i, prompt in enumerate(prompts)]


def run_steps(engine: Engine) -> Iterator[tuple[float, list[Event]]]:
    """Every step with the moment at which it ended. Errors: StreamsError where a request failed."""
    while engine.scheduler.has_work:
        events = engine.step()
        for event in events:
            if isinstance(event, FinishedEvent) and event.reason is FinishReason.FAILED:
                raise StreamsError(f"request {event.request_id} failed: {event.error}")
        yield time.perf_counter(), events


def decode_run(engine: Engine, requests: Sequence[Request]) -> tuple[int, float]:
    """Tokens of all streams together and their seconds, from when the last has begun until one ends or all have had
    enough."""
    enough = sum(request.max_tokens for request in requests) - SPARE * len(requests) ** 2
    for request in requests:
        engine.submit(request)
    begun, count = set[str](), 0
    started = ended = 0.0
    for now, events in run_steps(engine):
        if started:
            count += sum(len(event.token_ids) for event in events if isinstance(event, TokensEvent))
            ended = now
        begun |= {event.request_id for event in events}
        if not started and len(begun) == len(requests):
            started = now
        if count >= enough or any(isinstance(event, FinishedEvent) for event in events):
            break
    for request in requests:
        engine.cancel(request.request_id)
    if not count:
        raise StreamsError("a stream ended before all had begun; take more tokens a stream")
    return count, ended - started


def decode_speed(engine: Engine, prompts: Prompts, num_streams: int, max_tokens: int) -> float:
    """Tokens per second over all prompts, so many streams at a time; prompts that fill no group are left out."""
    runs = [
        decode_run(engine, requests_for(prompts[first : first + num_streams], max_tokens + SPARE * num_streams))
        for first in range(0, len(prompts) - num_streams + 1, num_streams)
    ]
    return sum(count for count, _ in runs) / sum(seconds for _, seconds in runs)


def decode_report(
    engines: Engines, prompts: Prompts, counts: Sequence[int], max_tokens: int, turns: int, progress: Progress
) -> dict[str, object]:
    """``{contestant: {streams: {tokens_per_s, of_plain}}}``; ``prompts`` hold one for each of the most streams.

    Every number of streams decodes the same texts.
    """
    names = list(engines)
    speeds: dict[str, dict[int, list[float]]] = {name: {count: [] for count in counts} for name in engines}
    for engine in engines.values():
        first_token_s(engine, requests_for(prompts, 2))  # the prompts are known from here on
    for turn in range(turns + 1):
        for count in counts:
            for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
                speed = decode_speed(engines[name], prompts, count, max_tokens)
                if turn:  # the first shows what drafts are worth
                    speeds[name][count].append(speed)
                progress(f"{name}, {count} streams")
    return {
        name: {
            str(count): {
                "tokens_per_s": round(statistics.median(taken), 1),
                "of_plain": round(statistics.median(ratios(taken, speeds[PLAIN][count])), 3),
            }
            for count, taken in by_count.items()
        }
        for name, by_count in speeds.items()
    }


def ratios(taken: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [one / other for one, other in zip(taken, plain, strict=True)]


def first_token_s(engine: Engine, requests: Sequence[Request], *, all_first: bool = False) -> float:
    """Seconds from submission to the first token, or to everybody's first; then the requests run to their end."""
    started = time.perf_counter()
    for request in requests:
        engine.submit(request)
    begun = set[str]()
    taken = 0.0
    for now, events in run_steps(engine):
        begun |= {event.request_id for event in events if isinstance(event, TokensEvent)}
        if not taken and (len(begun) == len(requests) if all_first else begun):
            taken = now - started
    return taken


def answer_of(engine: Engine, request: Request) -> tuple[float, list[int]]:
    """Seconds to the first token of a request alone, and its text."""
    token_ids: list[int] = []
    started, first_s = time.perf_counter(), 0.0
    engine.submit(request)
    for now, events in run_steps(engine):
        first_s = first_s or now - started
        for event in events:
            token_ids += event.token_ids if isinstance(event, TokensEvent) else ()
            if isinstance(event, TokensEvent) and len(token_ids) == len(event.token_ids):
                first_s = now - started
    return first_s, token_ids


def second_turn_report(
    engine: Engine, prompt: Sequence[int], next_turn: Sequence[int], turns: int
) -> dict[str, object]:
    """Time to first token of a chat's first turn and of its second; chats differ from their first token on."""
    first, second = list[float](), list[float]()
    for turn in range(turns):
        chat = [turn + 1, *prompt]
        first_s, answer = answer_of(engine, Request(f"first{turn}", chat, 32, GREEDY))
        second_s, _ = answer_of(engine, Request(f"second{turn}", [*chat, *answer, *next_turn], 8, GREEDY))
        first.append(first_s)
        second.append(second_s)
    return {
        "prompt_tokens": len(prompt) + 1,
        "new_tokens": len(next_turn),
        "first_ms": round(1e3 * statistics.median(first), 1),
        "second_ms": round(1e3 * statistics.median(second), 1),
        "ratio": round(statistics.median(ratios(second, first)), 4),
    }


def choices_report(engine: Engine, prompt: Sequence[int], turns: int, num_choices: int = 4) -> dict[str, object]:
    """What several choices of one prompt cost beside one: prompt tokens read, and the time until all have begun."""
    target = engine.target
    prefill, rows = target.prefill, list[int]()

    def counted(chunk: PrefillChunk) -> Prefilled:
        rows.append(len(chunk.token_ids))
        return prefill(chunk)

    taken: dict[int, list[float]] = {1: [], num_choices: []}
    read: dict[int, int] = {}
    target.prefill = counted  # type: ignore[method-assign]
    try:
        for turn in range(turns):
            for number, count in enumerate(taken):
                own = [turn * len(taken) + number + 1, *prompt]
                requests = [
                    dataclasses.replace(request, choice=i)
                    for i, request in enumerate(requests_for([own] * count, 2, f"{turn}-{count}-"))
                ]
                rows.clear()
                taken[count].append(first_token_s(engine, requests, all_first=True))
                read[count] = sum(rows)
    finally:
        target.prefill = prefill  # type: ignore[method-assign]
    return {
        "choices": num_choices,
        "prompt_tokens": len(prompt) + 1,
        "tokens_read": read[num_choices],
        "one_ms": round(1e3 * statistics.median(taken[1]), 1),
        "all_ms": round(1e3 * statistics.median(taken[num_choices]), 1),
        "ratio": round(statistics.median(ratios(taken[num_choices], taken[1])), 3),
    }


def gap_report(engine: Engine, stream: Sequence[int], prompt: Sequence[int], turns: int) -> dict[str, object]:
    """A stream's longest gap between events while a long prompt is read, and its usual gap before that."""
    usual, longest, first = list[float](), list[float](), list[float]()
    for turn in range(turns):
        engine.submit(Request(f"stream{turn}", stream, engine.options.context_length - len(stream), GREEDY))
        last = arrived = 0.0
        before, during = list[float](), list[float]()
        for now, events in run_steps(engine):
            ids = {event.request_id for event in events if isinstance(event, TokensEvent)}
            if arrived and f"prompt{turn}" in ids:
                first.append(now - arrived)
                break
            if f"stream{turn}" in ids:
                if last:
                    (during if arrived else before).append(now - last)
                last = now
            if len(before) == 30 and not arrived:
                own = [turn + 1, *prompt]
                engine.submit(Request(f"prompt{turn}", own, 2, GREEDY))
                arrived = now
        engine.cancel(f"stream{turn}")
        engine.cancel(f"prompt{turn}")
        usual.append(statistics.median(before))
        longest.append(max(during))
    return {
        "prompt_tokens": len(prompt) + 1,
        "usual_gap_ms": round(1e3 * statistics.median(usual), 1),
        "longest_gap_ms": round(1e3 * statistics.median(longest), 1),
        "longest_of_all_ms": round(1e3 * max(longest), 1),
        "beyond_usual_ms": round(1e3 * statistics.median(o - u for o, u in zip(longest, usual, strict=True)), 1),
        "first_token_ms": round(1e3 * statistics.median(first), 1),
    }


def useless_drafter(target: Target, num_slots: int, capacity: int) -> Drafter:
    """A drafter of random weights, which costs what a trained one costs and is never right. Errors: NotNative."""
    info = target.info
    heads = max(info.hidden_size // HEAD_DIM, 1)
    config = DovetailConfig(info.hidden_size, info.vocab_size, 2 * info.hidden_size, heads, heads, HEAD_DIM)
    torch.manual_seed(0)
    drafter = NativeDrafter(DovetailNetwork(config), target.embedding(), target.lm_head(), 8, num_slots, capacity)
    drafter.name = USELESS
    return drafter


def contestants(setup: Setup, drafter: Drafter | None, useless: Drafter) -> Engines:
    """Plain decoding, what is served, lookup alone where it is not the same, and a drafter that never helps."""
    engines = {PLAIN: setup.engine(None, lookup=False, by_cost=False), DOVETAIL: setup.engine(drafter, lookup=True)}
    if drafter is not None:
        engines[LOOKUP] = setup.engine(None, lookup=True)
    return engines | {USELESS: setup.engine(useless, lookup=False)}


def trees_report(
    setup: Setup, drafter: Drafter | None, texts: Texts, repeats: int, progress: Progress
) -> dict[str, object]:
    """Rows by cost, fixed trees of several sizes and plain decoding, one text at a time."""
    engines = {PLAIN: setup.engine(None, lookup=False, by_cost=False), DOVETAIL: setup.engine(drafter, lookup=True)}
    fixed = {f"{rows} rows": setup.engine(drafter, lookup=True, by_cost=False, rows=rows) for rows in FIXED_ROWS}
    runners = [EngineContestant(name, engine) for name, engine in (engines | fixed).items()]
    result = race(runners, texts.cases, repeats, progress)
    speeds = {name: result.median_tokens_per_s(name) for name in result.runs}
    best = max(fixed, key=lambda name: speeds[name])
    return {
        "texts": texts.json(),
        "tokens_per_s": {name: round(speed, 1) for name, speed in speeds.items()},
        "acceptance_length": {name: round(result.acceptance_length(name), 3) for name in result.runs},
        "best_fixed": best,
        "of_best_fixed": round(speeds[DOVETAIL] / speeds[best], 3),
        "of_plain": round(speeds[DOVETAIL] / speeds[PLAIN], 3),
        "equal_texts": sum(result.num_equal(name, texts.references)[0] for name in result.runs),
        "texts_written": sum(result.num_equal(name, texts.references)[1] for name in result.runs),
    }
