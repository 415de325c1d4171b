"""Serving changes no text: everything that serving does at once, against one plain request at a time."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from doubles import OracleDrafter, tiny_llama
from drafters.drafter import DraftState, Observation
from drafters.proposal import Budget, Proposal
from kernels import native
from server.engine import acceptance
from server.engine.completion import Completion, Completions, generate, step
from server.engine.cost import Costs, DraftCost, VerifyCost
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.engine.sequence import RunningSequence
from server.targets.native_target import NativeTarget, load_target
from server.targets.torch_target import TorchTarget

VOCAB, NUM_TOKENS, CONTEXT, SLOTS = 67, 24, 96, 3
LATE, URGENT = 8, -1  # the step before which the last request comes, and its priority
SYSTEM = [(7 * i) % VOCAB for i in range(35)]
MODES = {
    "greedy": SamplingParams(temperature=0),
    "seeded": SamplingParams(temperature=1.0, top_p=0.95, seed=7),
    "penalised": SamplingParams(temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.3, top_k=30, seed=3),
}


class TwinDrafter(OracleDrafter):
    """Below a wrong token, which comes first and is called likelier, the same tokens are drafted as below the true one.

    Whoever takes a child of the wrong branch, or keeps its row, goes on from another text. Its second call fails.
    """

    name = "twins"

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        super().__init__(texts, VOCAB)
        self.calls = 0
        self.most_shown = 0

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("the device is gone")
        return super().propose(states, budget)

    def grow(self, prefix: list[int], budget: Budget) -> Proposal:
        token_ids: list[int] = []
        parents: list[int | None] = []
        level: list[int | None] = [None]
        for _ in range(budget.depth + 1):
            true = self.next_token(prefix)
            if true is None:
                break
            prefix = [*prefix, true]
            pairs = [(parent, token_id) for parent in level for token_id in ((true + 1) % VOCAB, true)]
            level = list(range(len(token_ids), len(token_ids) + len(pairs)))
            parents += [parent for parent, _ in pairs]
            token_ids += [token_id for _, token_id in pairs]
        return Proposal(tuple(token_ids), tuple(parents), tuple(-0.1 - node % 2 for node in range(len(token_ids))))

    def observe(self, batch: Sequence[Observation]) -> None:
        self.most_shown = max(self.most_shown, *(len(seen.next_ids) for seen in batch))


def changing_costs() -> Costs:
    """Rows are nearly free for some rounds and dear for the next ones, in which the drafter is shown nothing."""
    costs = Costs(VerifyCost({1: 1.0}), DraftCost(0.1, 0.1, 0.001))
    rounds = itertools.count()

    def record(*_: object, **__: object) -> None:
        slope = 100.0 if next(rounds) % 10 in (4, 5, 6) else 0.001
        costs.verify = VerifyCost({1: 1.0, 2: 1.0 + slope})

    costs.record = record  # type: ignore[method-assign]
    costs.draft.record = lambda *_: None  # type: ignore[method-assign]
    record()
    return costs


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    config = tiny_llama().config
    config.intermediate_size, config.head_dim, config.max_position_embeddings = 160, 32, 128
    torch.manual_seed(1)
    return save_model(type(tiny_llama())(config).eval(), "lossless")


@pytest.fixture(scope="module", params=["torch", "fp32", "bf16", "int8", "int4"])
def target(request: pytest.FixtureRequest, folder: Path) -> TorchTarget:
    if request.param == "torch":
        return TorchTarget.load(folder, "fp32", SLOTS, CONTEXT + 16)
    if native.library() is None:
        pytest.skip("the native kernels are not built")
    return NativeTarget.load(folder, request.param, SLOTS, CONTEXT + 16)


def requests() -> list[Request]:
    """Three ways to choose, prompts that begin alike, one asked twice, and an urgent one that fills its context."""
    tails = ([1], [2, 3, 4, 2, 3, 4, 2], [9] * 5)
    made = [
        Request(f"{mode} {i}", [*SYSTEM, *tail], NUM_TOKENS, params)
        for mode, params in MODES.items()
        for i, tail in enumerate(tails)
    ]
    made.append(Request("again", [*SYSTEM, 1], NUM_TOKENS, MODES["seeded"]))
    room = CONTEXT - len(SYSTEM) - 1
    made.append(Request("full", [*SYSTEM, 5], room, MODES["seeded"], choice=1, priority=URGENT))
    return made


def served(target: TorchTarget, drafter: TwinDrafter) -> tuple[dict[str, Completion], set[str]]:
    """Every request's text as it is served, and the states that drafting was in."""
    pool_rows = 2 * CONTEXT  # the urgent one has no room beside three others, so somebody has to give way
    options = EngineOptions(SLOTS, CONTEXT, Budget(20, 2, 2), 16, lookup=True, cache_bytes=10**8, pool_rows=pool_rows)
    engine = Engine(target, drafter, options, changing_costs())
    preempt = engine.scheduler.preempt
    gave_way: list[str] = []

    def noted(sequence: RunningSequence) -> int:
        gave_way.append(sequence.request_id)
        return preempt(sequence)

    engine.scheduler.preempt = noted  # type: ignore[method-assign]
    times = itertools.count()
    engine.drafting.now = lambda: next(times) / 40
    completions = Completions(Completion(request) for request in requests())
    results, states = dict(completions.by_id), set[str]()
    for request in requests()[:-1]:
        engine.submit(request)
    for number in itertools.count():
        if number == LATE:
            engine.submit(requests()[-1])
        if not completions.num_open:
            break
        step(engine, completions)
        states.add(engine.drafting.status.state)
    engine.check_integrity()
    assert gave_way, "nobody had to give way"
    return results, states


@pytest.fixture(scope="module")
def plain(target: TorchTarget) -> dict[str, list[int]]:
    engine = Engine(target, None, EngineOptions(1, CONTEXT))
    return {r.request_id: generate(engine, [r])[r.request_id].token_ids for r in requests()}


def twins(plain: dict[str, list[int]]) -> TwinDrafter:
    return TwinDrafter([[*r.prompt_ids, *plain[r.request_id]] for r in requests()])


def test_serving_changes_no_text(target: TorchTarget, plain: dict[str, list[int]]) -> None:
    drafter = twins(plain)
    results, states = served(target, drafter)
    assert {name: result.token_ids for name, result in results.items()} == plain
    stats = [result.finished.stats for result in results.values()]
    assert sum(s.accepted for s in stats) > 2 * NUM_TOKENS  # there was something to get wrong
    assert sum(s.drafted for s in stats) > sum(s.accepted for s in stats)
    assert sum(s.cached for s in stats) >= 32 * 8
    assert states == {"on", "failed", "unprofitable"}
    assert drafter.most_shown > NUM_TOKENS  # it had fallen behind


def test_a_wrong_child_is_seen(
    target: TorchTarget, plain: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: the first node with the token, anywhere a level deeper, is not good enough."""

    def anywhere(proposal: Proposal, row: int, token_id: int) -> int | None:
        depth = 1 + (proposal.depths[row - 1] if row else 0)
        rows = range(1, proposal.num_rows)
        return next(
            (r for r in rows if proposal.depths[r - 1] == depth and proposal.token_ids[r - 1] == token_id), None
        )

    monkeypatch.setattr(acceptance, "child_with", anywhere)
    results, _ = served(target, twins(plain))
    assert sum(result.token_ids != plain[name] for name, result in results.items()) > 3


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 16, "factor": 4.0,
}  # fmt: skip
LIKE_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "initializer_range": 0.3,
}  # fmt: skip
ENDING = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3)
    ),
    "longrope": lambda: LlamaForCausalLM(
        LlamaConfig(**LIKE_LLAMA, max_position_embeddings=64, rope_parameters=LONGROPE)
    ),
    "dynamic": lambda: LlamaForCausalLM(
        LlamaConfig(
            **LIKE_LLAMA,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        )
    ),
}


@pytest.mark.parametrize("kind", ENDING)
def test_neighbours_near_the_contexts_end_change_no_text(kind: str, save_model: Callable[..., Path]) -> None:
    """Texts that fill every position the model has, beside short ones: where positions or angles are a whole pass's."""
    torch.manual_seed(2)
    target = load_target(save_model(ENDING[kind]().eval(), kind), "fp32", 3, 64 + 24)  # type: ignore[arg-type]
    greedy, seeded = MODES["greedy"], MODES["seeded"]
    asked = [
        Request("to the end", [7, 8, 9, 10], 60, greedy),
        Request("long", [(3 * i) % VOCAB for i in range(40)], 24, seeded),
        Request("short", [7, 8, 9], 6, seeded),
        Request("last position", [(5 * i) % VOCAB for i in range(63)], 1, greedy),
        Request("two more", [(5 * i) % VOCAB for i in range(62)], 2, greedy),
    ]
    alone = Engine(target, None, EngineOptions(1, 64))
    plain = {r.request_id: generate(alone, [r])[r.request_id].token_ids for r in asked}
    texts = [[*r.prompt_ids, *plain[r.request_id]] for r in asked]
    engine = Engine(target, OracleDrafter(texts, VOCAB), EngineOptions(3, 64, Budget(24, 2, 7), 16, lookup=True))
    results = generate(engine, asked)
    assert {name: result.token_ids for name, result in results.items()} == plain
    assert results["to the end"].finished.stats.acceptance_length > 4
