"""One run of ``dovetail eval drafter``: drafters of one target, in several tree sizes, in turns with plain decoding."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drafters.drafter import Drafter
from drafters.ngram import NGramDrafter
from drafters.proposal import Budget
from server.bench.compare import race, repeated_4gram_share
from server.bench.contestants import GREEDY, Case, EngineContestant, Timed
from server.bench.draft_cost import draft_step_ms
from server.bench.outcomes import NUM_BINS, Level, RecordingDrafter, acceptance_per_depth, calibration
from server.bench.prompts import Prompt
from server.bench.report import PLAIN, speed_json
from server.bench.texts import Advance, BenchError, generate_references
from server.engine.engine import Engine, EngineOptions
from server.engine.request import SamplingParams
from server.placement.machine import measure_machine
from server.targets.target import Target
from server.text import TextCodec

NGRAM = "n-gram"


@dataclass(frozen=True)
class DrafterEvalOptions:
    """grid: the tree sizes to measure each drafter with; max_tokens: length of a text; repeats: times that everyone
    generates everything; ignore_eos: every text goes on to max_tokens; sampling: how the texts are chosen, seeded where
    they are sampled, so that every contestant writes the same."""

    suite: str
    grid: tuple[Budget, ...] = field(default_factory=lambda: (Budget(),))
    max_tokens: int = 128
    repeats: int = 3
    ignore_eos: bool = True
    sampling: SamplingParams = GREEDY

    def __post_init__(self) -> None:
        if not self.grid or len(set(self.grid)) < len(self.grid):
            raise BenchError("the grid needs at least one tree size, and none of them twice")
        if any(budget.rows < 2 for budget in self.grid):
            raise BenchError("a tree of 1 row is the root alone and drafts nothing; give at least 2 rows")
        if self.max_tokens < 2 or self.repeats < 1:
            raise BenchError(f"max tokens {self.max_tokens}, repeats {self.repeats}; need at least 2 and 1")
        if self.sampling.temperature > 0 and self.sampling.seed is None:
            raise BenchError("sampled texts can be compared only with a seed")


def parse_grid(text: str) -> tuple[Budget, ...]:
    """``4x5x16,1x4x5``: top-k x depth x rows of each tree size. Errors: BenchError naming the part that is wrong."""
    grid = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", part)
        if match is None:
            raise BenchError(f"{part!r} is no tree size; write top-k x depth x rows, as in 4x5x16")
        top_k, depth, rows = map(int, match.groups())
        try:
            grid.append(Budget(rows, top_k, depth))
        except ValueError as error:
            raise BenchError(f"{part.strip()!r}: {error}") from error
    return tuple(grid)


def grid_name(budget: Budget) -> str:
    """The tree size as ``parse_grid`` reads it."""
    return f"{budget.top_k}x{budget.depth}x{budget.rows}"


class DrafterContestant(EngineContestant):
    """One drafter with one tree size; it remembers what became of every draft."""

    def __init__(self, label: str, target: Target, drafter: Drafter, options: EngineOptions, sampling: SamplingParams):
        self.recording = RecordingDrafter(drafter)
        self.levels: list[Level] = []
        super().__init__(f"{label} {grid_name(options.budget)}", Engine(target, self.recording, options), sampling)

    def run(self, case: Case) -> Timed:
        """One text. The target gives the features of whoever drafts now."""
        self.engine.target.select_features(self.recording.feature_layers or ("last",))
        timed = super().run(case)
        # The last token of a full text is never drafted for, so its position is not one to judge by.
        self.levels += self.recording.take_levels(case.prompt_ids + timed.token_ids[: case.max_tokens - 1])
        return timed


def evaluate_drafters(
    target: Target,
    drafters: Mapping[str, Drafter],
    context_length: int,
    codec: TextCodec,
    prompts: Sequence[Prompt],
    options: DrafterEvalOptions,
    advance: Advance,
) -> dict[str, Any]:
    """Measure each drafter (by its label) with every tree size, all in turns with plain decoding on the same texts.

    Trees are fixed: what is measured is the drafter, also where it does not pay. The n-gram drafter stands beside, in
    the first tree size. Ctrl-C ends the race early and reports what was measured. Errors: BenchError where no text can
    be generated; EngineError where the engine fails on one.
    """
    setups = {budget: EngineOptions(1, context_length, budget) for budget in options.grid}
    first = options.grid[0]
    plain = EngineContestant(PLAIN, Engine(target, None, setups[first]), options.sampling)
    texts = generate_references(plain, codec, prompts, options.max_tokens, options.ignore_eos, advance)
    by_drafter = {
        label: [DrafterContestant(label, target, drafter, setups[budget], options.sampling) for budget in options.grid]
        for label, drafter in drafters.items()
    }
    ngram = DrafterContestant(NGRAM, target, NGramDrafter(), setups[first], options.sampling)
    contestants = [plain, ngram, *(one for several in by_drafter.values() for one in several)]
    num_runs = options.repeats * len(contestants) * len(texts.cases)
    done = iter(range(1, num_runs + 1))
    result = race(contestants, texts.cases, options.repeats, lambda name: advance(name, next(done), num_runs))
    plain_speed = result.median_tokens_per_s(PLAIN)

    def figures(contestant: DrafterContestant) -> dict[str, Any]:
        speed = speed_json(result, contestant.name, texts.references)
        return {
            "top_k": contestant.engine.options.budget.top_k,
            "depth": contestant.engine.options.budget.depth,
            "rows": contestant.engine.options.budget.rows,
            "acceptance_length": round(result.acceptance_length(contestant.name), 3),
            **speed,
            "speedup": round(speed["tokens_per_s"] / plain_speed, 3) if plain_speed else None,
            **cost_json(contestant),
            "acceptance_per_depth": acceptance_per_depth(contestant.levels),
            "calibration": calibration(contestant.levels),
        }

    return {
        "hardware": measure_machine().json(),
        "target": dataclasses.asdict(target.info),
        "conditions": {
            "suite": options.suite,
            **texts.json(),
            "max_tokens": options.max_tokens,
            "ignore_eos": options.ignore_eos,
            "repeats": options.repeats,
            "interrupted": result.interrupted,
            "temperature": options.sampling.temperature,
            "seed": options.sampling.seed,
            "trees": "fixed",
            "calibration_bins": NUM_BINS,
        },
        "plain": speed_json(result, PLAIN, texts.references),
        "ngram": figures(ngram),
        "repeated_4gram_share": round(repeated_4gram_share(texts.references), 3),
        "drafters": [
            {"drafter": label, "name": drafters[label].name, "settings": [figures(one) for one in several]}
            for label, several in by_drafter.items()
        ],
    }


def cost_json(contestant: DrafterContestant) -> dict[str, Any]:
    """Where a round's time went (medians are not kept: the clock sums over the race), and the cost of a draft step."""
    clock, engine = contestant.engine.clock, contestant.engine
    rounds = max(clock.rounds, 1)
    return {
        "rows_per_round": round(clock.rows / rounds, 2),
        "draft_ms_per_round": round(clock.draft_s / rounds * 1e3, 3),
        "verify_ms_per_round": round(clock.verify_s / rounds * 1e3, 3),
        "draft_ms_per_step": draft_step_ms(engine.target, contestant.recording.drafter, engine.options.budget),
    }
