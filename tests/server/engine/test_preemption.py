"""Too little room for everybody: requests wait, are read again and say what they would have said alone."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from doubles import OracleDrafter, tiny_llama
from drafters.drafter import DraftState, Observation
from drafters.proposal import Budget, Proposal
from kernels import native
from server.engine.completion import Completion, Completions, generate, step
from server.engine.engine import Engine, EngineOptions
from server.engine.request import EngineError, FinishReason, Request, SamplingParams
from server.targets.native_target import NativeTarget
from server.targets.torch_target import TorchTarget

GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.1, top_p=0.9, frequency_penalty=0.4, seed=11)
BUDGET = Budget(8, 2, 3)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def target(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> TorchTarget:
    folder = save_model(tiny_llama(), f"preemption-{request.param}")
    if request.param == "fp32":
        return TorchTarget.load(folder, "fp32", 4, 140)
    if native.library() is None:
        pytest.skip("the native kernels are not built")
    return NativeTarget.load(folder, "bf16", 4, 140)


class Unreliable(OracleDrafter):
    """Knows the texts; now and then it fails, in one of its calls."""

    def __init__(self, texts: Sequence[Sequence[int]], chance: random.Random) -> None:
        super().__init__(texts, 67)
        self.chance = chance

    def fail(self) -> None:
        if self.chance.random() < 0.05:
            raise RuntimeError("the device is gone")

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        self.fail()
        return super().propose(states, budget)

    def observe(self, batch: Sequence[Observation]) -> None:
        self.fail()


def requests_of(chance: random.Random, count: int) -> list[Request]:
    systems = [[chance.randrange(67) for _ in range(size)] for size in (0, 40, 70)]
    return [
        Request(
            f"r{i}", [*chance.choice(systems), *(chance.randrange(67) for _ in range(chance.randint(1, 12)))],
            chance.randint(1, 20), chance.choice([GREEDY, SEEDED]), choice=i, priority=chance.choice([0, 0, 1]),
        )
        for i in range(count)
    ]  # fmt: skip


def alone(target: TorchTarget, requests: Sequence[Request]) -> dict[str, list[int]]:
    engine = Engine(target, None, EngineOptions(1, 120, BUDGET))
    return {r.request_id: generate(engine, [r])[r.request_id].token_ids for r in requests}


@pytest.mark.parametrize(("sampling", "cache_bytes"), [(GREEDY, 10**7), (SEEDED, 0)], ids=["greedy", "seeded"])
def test_a_request_that_had_to_wait_says_the_same(
    target: TorchTarget, sampling: SamplingParams, cache_bytes: int
) -> None:
    requests = [Request(f"r{i}", [(i + 3 * k) % 67 for k in range(8)], 100, sampling, choice=i) for i in range(4)]
    want = alone(target, requests)
    known = [[*r.prompt_ids, *want[r.request_id]] for r in requests]
    options = EngineOptions(4, 120, BUDGET, cache_bytes=cache_bytes, pool_rows=300)
    engine = Engine(target, OracleDrafter(known, 67), options)
    preempted: list[str] = []
    preempt = engine.scheduler.preempt
    engine.scheduler.preempt = lambda s: (preempted.append(s.request_id), preempt(s))[1]  # type: ignore[func-returns-value, method-assign]
    results = generate(engine, requests)
    assert {name: result.token_ids for name, result in results.items()} == want
    assert preempted
    assert "r0" not in preempted, "the most urgent one never waits for the others"
    engine.check_integrity()


def test_a_better_priority_runs_at_once_and_the_other_goes_on_afterwards(target: TorchTarget) -> None:
    requests = [Request("usual", [1, 2, 3], 30, SEEDED), Request("urgent", [4, 5], 5, GREEDY, priority=-1)]
    want = alone(target, requests)
    engine = Engine(target, None, EngineOptions(1, 120, BUDGET))
    completions = Completions([])
    ended: list[Completion] = []
    for number, request in enumerate(requests):
        completions.add(Completion(request))
        engine.submit(request)
        for _ in range(4 if number == 0 else 100):
            ended += step(engine, completions)
    assert [c.request.request_id for c in ended] == ["urgent", "usual"]
    assert {c.request.request_id: c.token_ids for c in ended} == want


def test_a_pool_smaller_than_one_request_is_refused(target: TorchTarget) -> None:
    with pytest.raises(EngineError, match="a pool of 120 rows holds no request of 128"):
        Engine(target, None, EngineOptions(2, 120, BUDGET, pool_rows=120))


def soak(target: TorchTarget, seed: int, count: int) -> None:
    """Requests come and are cancelled at random, the drafter fails, cache and rows are too few; nothing is lost."""
    chance = random.Random(seed)
    requests = requests_of(chance, count)
    want = alone(target, requests)
    drafter = Unreliable([[*r.prompt_ids, *want[r.request_id]] for r in requests], chance)
    engine = Engine(target, drafter, EngineOptions(4, 120, BUDGET, lookup=True, cache_bytes=60_000, pool_rows=260))
    moments = iter(range(10**9))
    engine.drafting.now = lambda: next(moments) / 5
    completions, coming, drafted = Completions([]), list(reversed(requests)), 0
    while coming or completions.num_open:
        while coming and chance.random() < 0.4:
            completions.add(Completion(coming[-1]))
            engine.submit(coming.pop())
        if completions.num_open and chance.random() < 0.04:
            for event in engine.cancel(chance.choice(sorted(completions.by_id))):
                completions.take(event)
        for done in step(engine, completions):
            assert done.finished.reason is not FinishReason.FAILED
            assert done.token_ids == want[done.request.request_id]
            drafted += sum(done.drafted)
        engine.check_integrity()
        assert {s.slot for s in engine.scheduler.running.values()} >= {
            slot for slot, length in enumerate(target.slots.lengths) if length
        }
    assert drafted > count
    assert target.slots.lengths == [0] * 4
    assert engine.scheduler.free_rows == 260
    assert sorted(engine.scheduler.free_slots) == [0, 1, 2, 3]


def test_random_requests_lose_no_page_slot_or_row(target: TorchTarget) -> None:
    soak(target, 1, 40)
    assert not any(target.slots.lengths)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["bf16"], indirect=True)
def test_five_hundred_requests_lose_no_page_slot_or_row(target: TorchTarget) -> None:
    soak(target, 2, 500)
    assert not any(target.slots.lengths)
