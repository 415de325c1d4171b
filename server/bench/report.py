"""One run of ``dovetail bench``: what is measured, in which order, and the JSON it gives."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafters.drafter import Drafter
from drafters.ngram import NGramDrafter
from server.bench.compare import Race, acceptance_length, race, repeated_4gram_share
from server.bench.contestants import (
    GREEDY,
    LLAMA_CPP,
    LLAMA_CPP_LOOKUP,
    Case,
    EngineContestant,
    Timed,
    TransformersPeer,
    create_peers,
)
from server.bench.prompts import Prompt
from server.bench.simulated import SimulatedDrafter
from server.bench.texts import Advance, BenchError, Texts, generate_references
from server.bench.verify_curve import CONTEXT, PassCosts, verify_ms
from server.engine.cost import Costs, DraftCost, VerifyCost
from server.engine.engine import Engine, RoundClock
from server.engine.request import SamplingParams
from server.placement.cost import MeasuredCosts, measured_ms
from server.placement.machine import measure_machine
from server.targets.native_target import NativeTarget
from server.text import TextCodec

PLAIN, LOOKUP, DOVETAIL = "plain", "lookup", "dovetail"
PEERS = (TransformersPeer.name, LLAMA_CPP)
OPPONENTS = (*PEERS, LLAMA_CPP_LOOKUP, LOOKUP)


@dataclass(frozen=True)
class BenchOptions:
    """max_tokens: longest text; repeats: times that everyone generates everything; peers: names out of
    ``OPPONENTS``, of which ``lookup`` is this engine without a drafter, with chains copied from the text itself;
    simulate_acceptance: an acceptance length to pretend instead of drafting; ignore_eos: every text goes on to
    max_tokens, so that all have the same length, whatever the model would rather do; sampling: how tokens are chosen,
    seeded where they are sampled; chat: a text prompt is a user's turn in the model's chat template."""

    suite: str
    max_tokens: int = 128
    repeats: int = 3
    peers: Sequence[str] = PEERS
    simulate_acceptance: float | None = None
    ignore_eos: bool = True
    sampling: SamplingParams = GREEDY
    chat: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.peers) - set(OPPONENTS)
        if unknown:
            raise BenchError(f"unknown peer {', '.join(sorted(unknown))}; known are {PLAIN}, {', '.join(OPPONENTS)}")
        if self.sampling.temperature > 0 and self.sampling.seed is None:
            raise BenchError("sampled texts can be compared only with a seed")
        if self.max_tokens < 2 or self.repeats < 1:
            raise BenchError(f"max tokens {self.max_tokens}, repeats {self.repeats}; need at least 2 and 1")


def measure(
    engine: Engine, folder: Path, codec: TextCodec, prompts: Sequence[Prompt], options: BenchOptions, advance: Advance
) -> dict[str, Any]:
    """Run the whole benchmark with the engine's target and drafter; ``folder`` holds the target, for the peers.

    Errors: BenchError where nothing can be compared; EngineError where the engine fails on a prompt.
    """
    if engine.drafting.drafter is None and not engine.options.lookup and options.simulate_acceptance is None:
        raise BenchError("there is no drafter to compare with plain decoding; name one with --drafter")
    sampling = options.sampling
    bare = Engine(engine.target, None, dataclasses.replace(engine.options, lookup=False))
    plain = EngineContestant(PLAIN, bare, sampling)
    if options.chat:
        prompts = [prompt.as_chat() for prompt in prompts]
    texts = generate_references(plain, codec, prompts, options.max_tokens, options.ignore_eos, advance)
    hardware = measure_machine()
    parts: PassCosts | None = None
    if isinstance(engine.target, NativeTarget):
        parts = PassCosts(engine.target, [CONTEXT, mean_context(texts)])
        parts.measure()
    ngram = ngram_runs(engine, texts.cases, sampling, advance)
    drafter = engine.drafting.drafter
    if options.simulate_acceptance is not None:
        drafter = simulated_drafter(engine, texts, options.simulate_acceptance)
    drafted = {DOVETAIL: Engine(engine.target, drafter, engine.options, engine.drafting.costs)}
    if LOOKUP in options.peers:
        drafted[LOOKUP] = lookup_engine(engine)
    context, weights = engine.options.context_length, engine.target.info.weights
    others = [name for name in options.peers if name != LOOKUP]
    peers, skipped = create_peers(others, folder, weights, context, sampling)
    contestants = [plain, *(EngineContestant(name, one, sampling) for name, one in drafted.items()), *peers]
    num_runs = options.repeats * len(contestants) * len(texts.cases)
    done = iter(range(1, num_runs + 1))
    result = race(
        contestants, texts.cases, options.repeats, lambda name: advance(name, next(done), num_runs),
        (lambda: None) if parts is None else parts.measure,
    )  # fmt: skip
    report: dict[str, Any] = {
        "hardware": hardware.json(),
        "target": dataclasses.asdict(engine.target.info),
        "drafter": drafter_json(drafter, engine),
        "conditions": conditions_json(options, texts, result),
    }
    report |= speeds_json(result, {name: one.clock for name, one in drafted.items()}, texts.references)
    report["peers"] = {peer.name: peer_json(result, peer.name, texts.references, sampling) for peer in peers}
    report["peers"] |= {name: {"skipped": reason} for name, reason in skipped.items()}
    report |= {
        "verify_ms": verify_ms(engine.target) if parts is None else parts.verify_ms(),
        "predicted": predicted_json(
            [] if parts is None else parts.costs(), drafted[DOVETAIL], report[DOVETAIL]["acceptance_length"]
        ),
        "repeated_4gram_share": round(repeated_4gram_share(texts.references), 3),
        "ngram_acceptance_length": round(acceptance_length(ngram), 3),
    }
    return report


def lookup_engine(engine: Engine) -> Engine:
    """The engine without its drafter, looking up; its rows are chosen by costs of its own where the other's are."""
    costs = engine.drafting.costs
    if costs is not None:
        costs = Costs(VerifyCost(costs.verify.points), DraftCost(0.0, 0.0, 0.0), costs.overhead_s)
    return Engine(engine.target, None, dataclasses.replace(engine.options, lookup=True), costs)


def mean_context(texts: Texts) -> int:
    """Positions behind the root, in the middle of an answer."""
    return round(
        statistics.mean(len(c.prompt_ids) + len(r) / 2 for c, r in zip(texts.cases, texts.references, strict=True))
    )


def predicted_json(costs: Sequence[MeasuredCosts], drafted: Engine, acceptance: float) -> dict[str, Any] | None:
    """What a plan for this machine expects of the target, beside what was measured; None for other engines' targets.

    ``costs``: behind the context of T(n), and behind that of the texts. How many rows the engine that drafts chose, its
    acceptance length and what it took beside its passes are taken as they were.
    """
    if not costs:
        return None
    count, clock = drafted.target.info.num_layers, drafted.clock
    curve, texts = costs
    passes_ms = sum(number * measured_ms(texts, count, rows) for rows, number in drafted.counts.rounds_of.items())
    total_ms = passes_ms + 1e3 * (clock.draft_s + clock.other_s)
    return {
        "verify_ms": {str(rows): round(measured_ms(curve, count, rows), 3) for rows in curve.layer_ms},
        "pass_ms": round(curve.pass_ms, 3),
        "round_ms": round(curve.round_ms, 3),
        "plain_tokens_per_s": round(1e3 / (measured_ms(texts, count, 1) + texts.round_ms), 3),
        "tokens_per_s": round(1e3 * acceptance * clock.rounds / max(total_ms, 1e-9), 3),
    }


def ngram_runs(engine: Engine, cases: Sequence[Case], sampling: SamplingParams, advance: Advance) -> list[Timed]:
    """What the weightless n-gram drafter reaches on these texts, with fixed trees of the same budget."""
    options = dataclasses.replace(engine.options, lookup=False)
    contestant = EngineContestant("n-gram", Engine(engine.target, NGramDrafter(), options), sampling)
    runs = []
    for number, case in enumerate(cases, start=1):
        runs.append(contestant.run(case))
        advance("n-gram drafter", number, len(cases))
    return runs


def simulated_drafter(engine: Engine, texts: Texts, length: float) -> SimulatedDrafter:
    """A drafter that knows these texts and fails as often as ``length`` says."""
    known = [case.prompt_ids + answer for case, answer in zip(texts.cases, texts.references, strict=True)]
    return SimulatedDrafter(known, length, engine.options.budget, engine.target.info.vocab_size)


def speeds_json(result: Race, clocks: Mapping[str, RoundClock], references: Sequence[Sequence[int]]) -> dict[str, Any]:
    """``plain``, ``dovetail``, ``speedup`` and, where it took part, ``lookup``; ``clocks`` are over the whole race."""
    plain = result.median_tokens_per_s(PLAIN)
    return {
        "plain": speed_json(result, PLAIN, references),
        **{name: drafted_json(result, name, clock, references) for name, clock in clocks.items()},
        "speedup": round(result.median_tokens_per_s(DOVETAIL) / plain, 3) if plain else None,
    }


def drafted_json(result: Race, name: str, clock: RoundClock, references: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The figures of an engine that drafts, and where its rounds' time went."""
    total_s = (clock.draft_s + clock.verify_s + clock.other_s) or 1.0
    return speed_json(result, name, references) | {
        "acceptance_length": round(result.acceptance_length(name), 3),
        "draft_share": round(clock.draft_s / total_s, 3),
        "verify_share": round(clock.verify_s / total_s, 3),
        "other_share": round(clock.other_s / total_s, 3),
        "rows_per_round": round(clock.rows / max(clock.rounds, 1), 2),
    }


def peer_json(result: Race, name: str, references: Sequence[Sequence[int]], sampling: SamplingParams) -> dict[str, Any]:
    """Another engine's figures. It samples by numbers of its own, so only greedy texts can be the same."""
    figures = speed_json(result, name, references)
    return figures if sampling.temperature == 0 else figures | {"equal_texts": None}


def speed_json(result: Race, name: str, references: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One contestant's figures. ``equal_texts`` of ``texts`` were the target's own, token for token."""
    num_equal, num_texts = result.num_equal(name, references)
    return {
        "tokens_per_s": round(result.median_tokens_per_s(name), 2),
        "repeats_tokens_per_s": [round(speed, 2) for speed in result.tokens_per_s(name)],
        "equal_texts": num_equal,
        "texts": num_texts,
    }


def drafter_json(drafter: Drafter | None, engine: Engine) -> dict[str, Any]:
    """The drafter and how large its trees may be."""
    return {"name": None if drafter is None else drafter.name} | dataclasses.asdict(engine.options.budget)


def conditions_json(options: BenchOptions, texts: Texts, result: Race) -> dict[str, Any]:
    """What was generated."""
    return {
        "suite": options.suite,
        **texts.json(),
        "max_tokens": options.max_tokens,
        "ignore_eos": options.ignore_eos,
        "repeats": options.repeats,
        "interrupted": result.interrupted,
        "temperature": options.sampling.temperature,
        "seed": options.sampling.seed,
        "chat": options.chat,
    }
