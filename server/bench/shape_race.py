"""A model's real sizes with random weights, and a drafter of pretended acceptance: what this machine would do.

Everything here is SIMULATED: the weights are random, the drafts are the target's own text, made to fail as often as
asked. What a pass costs is real, and so is a drafter's time where ``blocks`` makes one of random weights. Beside
what is measured stands what the plan's costs predict, from one layer and the head measured in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drafters.dovetail import DovetailDrafter
from drafters.drafter import Drafter, DraftState, Observation
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget, Proposal
from kernels.linear_lowbit.bench import ModelShape
from server.bench.compare import race
from server.bench.contestants import Case, EngineContestant
from server.bench.simulated import SimulatedDrafter
from server.bench.texts import Advance, BenchError
from server.bench.verify_curve import ROWS, PassCosts
from server.bench.whole_model import random_model
from server.engine.ahead import AheadDrafter, ahead_budget
from server.engine.engine import Engine, EngineOptions
from server.placement.cost import measured_ms
from server.placement.devices import Placement
from server.placement.machine import available_bytes, compute_with, measure_machine
from server.placement.shape import TargetShape
from server.targets.native_target import NativeTarget
from server.targets.packed_model import PackedModel
from server.targets.split_target import SplitTarget
from server.targets.upper_layers import Split

PROMPT = 16


@dataclass(frozen=True)
class ShapeOptions:
    """layers: of the shape's, None for all; blocks: of a drafter of random weights whose time is taken, 0 for none;
    place: where it drafts; gpu_layers: the target's last layers that ``place`` computes as well."""

    shape: TargetShape
    weights: str
    acceptance: float
    budget: Budget
    layers: int | None = None
    blocks: int = 0
    place: Placement | None = None
    gpu_layers: int = 0
    max_tokens: int = 48
    repeats: int = 3
    threads: int | None = None


class TimedSimulation(SimulatedDrafter):
    """Pretended drafts, and the time of a real drafter for every one of them."""

    inner: Drafter

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """The inner drafter's trees are thrown away."""
        self.inner.propose(states, budget)
        return super().propose(states, budget)

    def observe(self, batch: Sequence[Observation]) -> None:
        """As the inner drafter would be told."""
        self.inner.observe(batch)

    def release(self, slot: int) -> None:
        """Forget the slot."""
        super().release(slot)
        self.inner.release(slot)


def bench_shape(options: ShapeOptions, advance: Advance) -> dict[str, Any]:
    """Measure plain and simulated decoding in turns. Errors: BenchError where the model does not fit into memory."""
    compute_with(options.threads)
    shape = dataclasses.replace(options.shape, num_layers=options.layers or options.shape.num_layers)
    needed = int(1.1 * shape.target_bytes(options.weights))
    if needed > (free := available_bytes()):
        raise BenchError(
            f"{shape.name} with {shape.num_layers} layers in {options.weights} takes {needed} bytes, {free} are free; "
            "--layers measures fewer of its layers"
        )
    context = PROMPT + options.max_tokens
    deep = ahead_budget(options.budget)
    capacity = context + max(*ROWS, deep.rows, deep.top_k * deep.depth)
    packed = random_model(model_shape(shape), options.weights, capacity)
    torch.set_num_threads(1)
    target = make_target(packed, shape, options, capacity)
    engine = EngineOptions(1, context, options.budget)
    plain = EngineContestant("plain", Engine(target, None, engine))
    case = Case("random", tuple(range(1, PROMPT + 1)), options.max_tokens)
    reference = plain.run(case).token_ids
    drafter = simulated(options, target, case.prompt_ids + reference, capacity)
    ahead = AheadDrafter(drafter)
    drafted = Engine(target, ahead if options.blocks else drafter, engine)
    contestants = [plain, EngineContestant("dovetail", drafted)]
    steps = iter(range(1, 2 * options.repeats + 1))
    parts = PassCosts(target, [PROMPT + options.max_tokens // 2])
    parts.measure()
    found = race(
        contestants, [case], options.repeats, lambda name: advance(name, next(steps), 2 * options.repeats),
        parts.measure,
    )  # fmt: skip
    (costs,) = parts.costs()
    predicted = {rows: measured_ms(costs, shape.num_layers, rows) for rows in ROWS}
    plain_speed, speed = found.median_tokens_per_s("plain"), found.median_tokens_per_s("dovetail")
    length = found.acceptance_length("dovetail")
    clock = drafted.clock
    rows = min(options.budget.rows, max(ROWS))
    drafting_ms = 1e3 * (clock.draft_s + clock.other_s) / max(clock.rounds, 1)
    expected = measured_ms(costs, shape.num_layers, rows)
    total_s = clock.draft_s + clock.verify_s + clock.other_s or 1.0
    return {
        "simulated": "SIMULATED: random weights, pretended acceptance",
        "hardware": measure_machine().json(),
        "shape": dataclasses.asdict(shape), "weights": options.weights, "of_layers": options.shape.num_layers,
        "blocks": options.blocks, "place": None if options.place is None else str(options.place.device),
        "gpu_layers": options.gpu_layers, **dataclasses.asdict(options.budget),
        "plain": {"tokens_per_s": round(plain_speed, 3)},
        "dovetail": {
            "tokens_per_s": round(speed, 3), "acceptance_length": round(length, 3),
            "draft_share": round(clock.draft_s / total_s, 3), "verify_share": round(clock.verify_s / total_s, 3),
            "other_share": round(clock.other_s / total_s, 3),
            "draft_ms": round(1e3 * clock.draft_s / max(clock.rounds, 1), 3),
            "ahead": {"hits": ahead.hits, "misses": ahead.misses, "gain": ahead.trial.gain},
        },
        "speedup": round(speed / plain_speed, 3) if plain_speed else None,
        "verify_ms": parts.verify_ms(),
        "predicted": {
            "verify_ms": {str(rows): round(taken, 3) for rows, taken in predicted.items()},
            "pass_ms": round(costs.pass_ms, 3), "round_ms": round(costs.round_ms, 3),
            "plain_tokens_per_s": round(1e3 / (predicted[1] + costs.round_ms), 3),
            "tokens_per_s": round(length * 1e3 / (expected + drafting_ms), 3),
        },
    }  # fmt: skip


def make_target(packed: PackedModel, shape: TargetShape, options: ShapeOptions, capacity: int) -> NativeTarget:
    """On the CPU, or with its last layers at the place."""
    if not options.gpu_layers or options.place is None:
        return NativeTarget(packed, shape.name, 1, capacity)
    split = Split(shape.num_layers - options.gpu_layers, options.place)
    return SplitTarget(packed, shape.name, 1, capacity, None, split)


def simulated(options: ShapeOptions, target: NativeTarget, text: Sequence[int], capacity: int) -> SimulatedDrafter:
    """With the time of a drafter of random weights, where blocks are asked for."""
    arguments = ([text], options.acceptance, options.budget, target.info.vocab_size)
    if not options.blocks:
        return SimulatedDrafter(*arguments)
    made = TimedSimulation(*arguments)
    made.inner = random_drafter(options, target, capacity)
    made.feature_layers = ("last",)
    return made


def random_drafter(options: ShapeOptions, target: NativeTarget, capacity: int) -> DovetailDrafter:
    """A Dovetail drafter of the shape at its place; random weights take the time of trained ones."""
    shape, place = options.shape, options.place
    assert place is not None
    config = DovetailConfig(
        shape.hidden_size, shape.vocab_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads,
        shape.head_dim, options.blocks,
    )  # fmt: skip
    with torch.device(place.device):
        network = DovetailNetwork(config).to(place.dtype).eval().requires_grad_(False)
    embedding = target.embedding().to(place.device, place.dtype)
    return DovetailDrafter(network, embedding, target.lm_head().to(place.device, place.dtype), 1, capacity)


def model_shape(shape: TargetShape) -> ModelShape:
    """As the kernels' benchmark names it. Errors: BenchError for heads that do not fill the hidden size."""
    if shape.head_dim * shape.num_heads != shape.hidden_size:
        raise BenchError(f"{shape.name}: {shape.num_heads} heads of {shape.head_dim} do not make {shape.hidden_size}")
    return ModelShape(
        shape.hidden_size, shape.intermediate_size, shape.num_layers, shape.num_heads, shape.num_kv_heads,
        shape.vocab_size,
    )  # fmt: skip
