"""The engine's promise: the text is the target's own, whatever drafts, however many requests run beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from doubles import OracleDrafter, tiny_llama
from drafters.drafter import Drafter, DraftState, Observation
from drafters.proposal import Budget, Proposal, chain
from server.engine.completion import Completion, Completions, generate, step
from server.engine.cost import Costs, DraftCost, VerifyCost
from server.engine.engine import Engine, EngineOptions
from server.engine.request import (
    ContextTooLong,
    EngineError,
    FinishedEvent,
    FinishReason,
    Request,
    SamplingParams,
    TokensEvent,
)
from server.targets.target import Verified, VerifyRows
from server.targets.torch_target import TorchTarget

PROMPTS = ([1, 2, 3, 4, 5], [9], [30, 31, 32, 30, 31, 32, 30], [5, 4, 3, 2, 1, 0, 66])
NUM_TOKENS = 24
BUDGETS = {"1x1": Budget(16, 1, 1), "4x3": Budget(16, 4, 3), "10x7": Budget(40, 10, 7)}
SAMPLED = SamplingParams(temperature=1.2, top_p=0.95, top_k=40, frequency_penalty=0.3, seed=7)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def target(model: torch.nn.Module, save_model: Callable[..., Path]) -> TorchTarget:
    return TorchTarget.load(save_model(model, "engine"), "fp32", num_slots=4, capacity=160)


def run(
    target: TorchTarget,
    drafter: Drafter | None,
    sampling: SamplingParams,
    batch: int = 4,
    budget: Budget | None = None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    costs: Costs | None = None,
    **more: object,
) -> list[Completion]:
    options = EngineOptions(batch, 120, budget or Budget(), prefill_chunk=3, lookup=costs is not None)
    engine = Engine(target, drafter, options, costs)
    requests = [Request(f"r{i}", p, NUM_TOKENS, sampling, **more) for i, p in enumerate(prompts)]  # type: ignore[arg-type]
    results = generate(engine, requests)
    engine.check_integrity()
    assert not engine.scheduler.has_work
    assert target.slots.lengths == [0] * 4
    return [results[f"r{i}"] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def plain(target: TorchTarget) -> dict[str, list[list[int]]]:
    """Texts of plain decoding, one request at a time."""
    return {
        name: [list(run(target, None, params, 1, prompts=[p])[0].token_ids) for p in PROMPTS]
        for name, params in (("greedy", GREEDY), ("sampled", SAMPLED))
    }


def test_plain_greedy_equals_transformers_generate(model: torch.nn.Module, plain: dict[str, list[list[int]]]) -> None:
    for prompt, text in zip(PROMPTS, plain["greedy"], strict=True):
        want = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NUM_TOKENS,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert want[0, len(prompt) :].tolist() == text


class RandomDrafter(OracleDrafter):
    """Proposes random trees."""

    name = "random"

    def grow(self, prefix: list[int], budget: Budget) -> Proposal:
        generator = torch.Generator().manual_seed(sum(prefix) + len(prefix))
        rows = int(torch.randint(0, budget.rows, (), generator=generator))
        parents = [None, *(int(torch.randint(0, i, (), generator=generator)) for i in range(1, rows))][:rows]
        tokens = torch.randint(0, self.vocab_size, (rows,), generator=generator).tolist()
        return Proposal(tuple(tokens), tuple(parents), (-1.0,) * rows)


def drafter_named(name: str, plain_texts: Sequence[Sequence[int]]) -> Drafter | None:
    texts = [[*p, *t] for p, t in zip(PROMPTS, plain_texts, strict=True)]
    if name == "none":
        return None
    if name == "random":
        return RandomDrafter(texts, 67)
    return OracleDrafter(texts, 67, wrong=name == "wrong")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("shape", BUDGETS)
@pytest.mark.parametrize("name", ["oracle", "wrong", "random", "none"])
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_text_does_not_depend_on_drafter_tree_or_batch(
    target: TorchTarget, plain: dict[str, list[list[int]]], mode: str, name: str, shape: str, batch: int
) -> None:
    params = GREEDY if mode == "greedy" else SAMPLED
    results = run(target, drafter_named(name, plain[mode]), params, batch, BUDGETS[shape])
    assert [list(r.token_ids) for r in results] == plain[mode]
    for result in results:
        stats = result.finished.stats
        assert result.finished.reason == FinishReason.LENGTH
        assert sum(result.drafted) == stats.accepted
        assert stats.committed == NUM_TOKENS - 1  # the first token comes from the prefill
        if name in ("wrong", "none"):
            assert stats.acceptance_length == 1
        if name == "oracle":
            depth = BUDGETS[shape].depth
            assert stats.rounds == -(-(NUM_TOKENS - 1) // (depth + 2))


@pytest.mark.parametrize("slope", [1e-9, 0.3, 100.0], ids=["rows are free", "rows cost", "rows are dear"])
@pytest.mark.parametrize("name", ["oracle", "wrong", "random", "none"])
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_text_is_the_targets_with_rows_by_cost_and_lookup(
    target: TorchTarget, plain: dict[str, list[list[int]]], mode: str, name: str, slope: float
) -> None:
    costs = Costs(VerifyCost({1: 1.0, 2: 1.0 + slope}), DraftCost(0.1, 0.1, 0.001))
    costs.record = lambda *_, **__: None  # type: ignore[method-assign]
    costs.draft.record = lambda *_: None  # type: ignore[method-assign]
    params = GREEDY if mode == "greedy" else SAMPLED
    results = run(target, drafter_named(name, plain[mode]), params, budget=Budget(16, 4, 3), costs=costs)
    assert [list(r.token_ids) for r in results] == plain[mode]
    drafted = sum(r.finished.stats.drafted for r in results)
    assert drafted == 0 if slope > 1 else drafted > 0 or slope > 0.1


def test_no_request_gets_rows_beyond_its_own_end(
    target: TorchTarget, plain: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour with much left to say must not lengthen the trees of one that is nearly done."""
    whole, limits = target.verify, [3, 40]
    prompts = [PROMPTS[0], PROMPTS[3]]

    def verify(rows: Sequence[VerifyRows]) -> list[Verified]:
        for part in rows:
            row = target.slots.lengths[part.slot] + max(part.proposal.depths, default=0)
            assert row < len(prompts[part.slot]) + limits[part.slot] - 1
        return whole(rows)

    monkeypatch.setattr(target, "verify", verify)
    drafter = drafter_named("oracle", plain["greedy"])
    engine = Engine(target, drafter, EngineOptions(2, 120, Budget(40, 10, 7), lookup=True))
    requests = [Request(str(i), p, n, GREEDY) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
    results = generate(engine, requests)
    assert list(results["0"].token_ids) == plain["greedy"][0][:3]


def test_a_stop_token_inside_an_accepted_block_ends_the_text_there(
    target: TorchTarget, plain: dict[str, list[list[int]]]
) -> None:
    text = plain["greedy"][0]
    stop = text[6]
    (result,) = run(target, drafter_named("oracle", plain["greedy"]), GREEDY, prompts=PROMPTS[:1], stop_ids={stop})
    assert list(result.token_ids) == text[: text.index(stop) + 1]
    assert result.finished.reason == FinishReason.STOP


@pytest.mark.parametrize("limit", range(1, 9))
def test_max_tokens_is_exact_inside_an_accepted_block(
    target: TorchTarget, plain: dict[str, list[list[int]]], limit: int
) -> None:
    engine = Engine(target, drafter_named("oracle", plain["greedy"]), EngineOptions(4, 120, Budget(40, 10, 7)))
    results = generate(engine, [Request("r", PROMPTS[0], limit, GREEDY)])
    assert list(results["r"].token_ids) == plain["greedy"][0][:limit]


def test_choices_of_one_seed_differ_and_repeat(target: TorchTarget) -> None:
    def texts(choice: int) -> tuple[int, ...]:
        engine = Engine(target, None, EngineOptions(4, 120))
        return generate(engine, [Request("r", [1, 2], 16, SAMPLED, choice=choice)])["r"].token_ids

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)


def test_requests_may_opt_out_of_drafting(target: TorchTarget, plain: dict[str, list[list[int]]]) -> None:
    results = run(target, drafter_named("oracle", plain["greedy"]), GREEDY, draft=False)
    assert [list(r.token_ids) for r in results] == plain["greedy"]
    assert all(r.finished.stats.drafted == 0 for r in results)


def test_figures_are_what_the_requests_say_of_themselves(
    target: TorchTarget, plain: dict[str, list[list[int]]]
) -> None:
    drafter = drafter_named("oracle", plain["greedy"])
    engine = Engine(target, drafter, EngineOptions(2, 120, BUDGETS["4x3"], 3, cache_bytes=2**20))
    done = generate(engine, [Request(f"r{i}", PROMPTS[2], NUM_TOKENS, GREEDY) for i in range(3)])
    figures, stats = engine.figures(), [each.finished.stats for each in done.values()]
    counts = figures.counts
    assert counts.output_tokens == 3 * NUM_TOKENS == counts.pass_tokens + 3
    assert (counts.drafted, sum(figures.accepted_at)) == (sum(s.drafted for s in stats), sum(s.accepted for s in stats))
    assert counts.passes == sum(s.rounds for s in stats) >= sum(counts.rounds_of.values()) == engine.clock.rounds
    assert counts.prompt_tokens == 3 * len(PROMPTS[2]) and counts.cached_tokens == sum(s.cached for s in stats) > 0
    assert list(figures.accepted_at) == sorted(figures.accepted_at, reverse=True)
    assert figures.kv_rows == 0 < figures.kv_capacity and figures.cache_bytes > 0
    assert all(seconds > 0 for seconds in figures.seconds.values())


def test_cancel_frees_the_slot_in_every_state(target: TorchTarget) -> None:
    engine = Engine(target, None, EngineOptions(max_seqs=2, context_length=120, prefill_chunk=2))
    for name in ("prefilling", "decoding", "waiting"):
        engine.submit(Request(name, [1, 2, 3, 4], 50, GREEDY))
    engine.step()
    for name in ("waiting", "prefilling", "decoding"):
        (event,) = engine.cancel(name)
        assert isinstance(event, FinishedEvent)
        assert event.reason == FinishReason.CANCELLED
        engine.check_integrity()
        engine.step()
    assert engine.cancel("decoding") == []
    assert not engine.scheduler.has_work
    assert len(engine.scheduler.free_slots) == 2


class FailingDrafter(OracleDrafter):
    """Knows the text, and fails in one of its calls, in one way."""

    def __init__(self, texts: Sequence[Sequence[int]], way: str, call: int) -> None:
        super().__init__(texts, 67)
        self.way = way
        self.calls_left = call
        self.shown: dict[int, list[int]] = {}

    def is_due(self, way: str) -> bool:
        self.calls_left -= way == self.way
        return way == self.way and self.calls_left == 0

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        for state in states:
            assert self.shown[state.slot] == list(state.token_ids[1:])  # it has seen everything, once and in order
        trees = super().propose(states, budget)
        if self.is_due("propose"):
            raise RuntimeError("the device is gone")
        if self.is_due("nan"):
            trees[0] = Proposal(trees[0].token_ids, trees[0].parents, (float("nan"),) * len(trees[0]))
        if self.is_due("unknown token"):
            trees[0] = chain([99])
        if self.is_due("too few"):
            trees.pop()
        return trees

    def observe(self, batch: Sequence[Observation]) -> None:
        if self.is_due("observe"):
            raise MemoryError("no memory is left")
        for seen in batch:
            self.shown.setdefault(seen.slot, []).extend(seen.next_ids)

    def release(self, slot: int) -> None:
        self.shown.pop(slot, None)


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("way", ["propose", "observe", "nan", "unknown token", "too few"])
def test_a_drafter_that_fails_costs_speed_and_nothing_else(
    target: TorchTarget, plain: dict[str, list[list[int]]], way: str, call: int
) -> None:
    texts = [[*p, *t] for p, t in zip(PROMPTS, plain["sampled"], strict=True)]
    drafter = FailingDrafter(texts, way, call)
    engine = Engine(target, drafter, EngineOptions(4, 120, Budget(4, 1, 1), prefill_chunk=3))
    times = iter(range(10**6))
    engine.drafting.now = lambda: next(times) / 20  # a second is a few rounds
    requests = [Request(f"r{i}", prompt, NUM_TOKENS, SAMPLED) for i, prompt in enumerate(PROMPTS)]
    for request in requests:
        engine.submit(request)
    states = set()
    completions = Completions(Completion(request) for request in requests)
    results = dict(completions.by_id)
    while completions.num_open:
        step(engine, completions)
        states.add(engine.drafting.status.state)
    assert [list(results[r.request_id].token_ids) for r in requests] == plain["sampled"]
    assert {"on", "failed"} == states
    assert engine.drafting.status.state == "on"  # it was tried again, and works
    assert sum(sum(r.drafted) for r in results.values()) > NUM_TOKENS
    engine.check_integrity()


def test_a_drafter_that_stays_broken_is_named_and_tried_ever_more_rarely(target: TorchTarget) -> None:
    class Broken(OracleDrafter):
        calls = 0

        def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
            self.calls += 1
            raise RuntimeError("the device is gone")

    drafter = Broken([], 67)
    engine = Engine(target, drafter, EngineOptions(1, 200))
    times = iter(range(10**6))
    engine.drafting.now = lambda: next(times) / 10
    result = generate(engine, [Request("a", [1], 100, GREEDY)])["a"]
    assert result.finished.reason == FinishReason.LENGTH
    assert 2 <= drafter.calls <= 6
    assert engine.drafting.status.state == "failed"
    assert "the device is gone; tried again in" in engine.drafting.status.reason


def test_a_request_without_drafting_is_never_shown_to_the_drafter(target: TorchTarget) -> None:
    class Unwanted(OracleDrafter):
        def observe(self, batch: Sequence[Observation]) -> None:
            assert {seen.slot for seen in batch} == {0}

    engine = Engine(target, Unwanted([], 67), EngineOptions(2, 120))
    results = generate(engine, [Request("a", [1, 2], 8, GREEDY), Request("b", [3, 4], 8, GREEDY, draft=False)])
    assert engine.drafting.status.state == "on"
    assert results["b"].finished.stats.drafted == 0 < results["a"].finished.stats.drafted


@pytest.mark.parametrize("draft", [False, True])
def test_an_error_in_one_request_fails_that_one_alone(
    target: TorchTarget, plain: dict[str, list[list[int]]], draft: bool
) -> None:
    """A bias for a token that does not exist breaks the choice; a prompt with one breaks the target's own pass."""
    broken = [
        Request("bias", [1, 2], 8, SamplingParams(temperature=0, logit_bias={10**6: 1.0})),
        Request("prompt", [1, 10**6], 8, GREEDY),
    ]
    good = [Request(f"r{i}", prompt, NUM_TOKENS, GREEDY) for i, prompt in enumerate(PROMPTS)]
    drafter = drafter_named("oracle", plain["greedy"]) if draft else None
    results = generate(Engine(target, drafter, EngineOptions(4, 120)), [*broken, *good])
    assert [list(results[r.request_id].token_ids) for r in good] == plain["greedy"]
    for request in broken:
        assert results[request.request_id].finished.reason == FinishReason.FAILED
        assert "IndexError" in str(results[request.request_id].finished.error)
    assert target.slots.lengths == [0] * 4


def test_a_pass_that_fails_runs_again_without_the_request_that_broke_it(
    target: TorchTarget, plain: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose row the target cannot run, in the middle of its text, ends alone."""
    whole = target.verify
    poisoned: list[int] = []

    def verify(rows: Sequence[VerifyRows]) -> list[Verified]:
        if any(part.slot == 1 for part in rows) and len(poisoned) < 100:
            poisoned.append(len(rows))
            if len(poisoned) > 3:
                raise RuntimeError("row 1 is broken")
        return whole(rows)

    monkeypatch.setattr(target, "verify", verify)
    results = run(target, None, GREEDY)
    (failed,) = [i for i, r in enumerate(results) if r.finished.reason is FinishReason.FAILED]
    assert "row 1 is broken" in str(results[failed].finished.error)
    assert [list(r.token_ids) for i, r in enumerate(results) if i != failed] == [
        text for i, text in enumerate(plain["greedy"]) if i != failed
    ]


def test_what_cannot_run_is_refused_before_it_is_queued(target: TorchTarget) -> None:
    engine = Engine(target, None, EngineOptions(2, 32))
    with pytest.raises(ContextTooLong, match=r"32 tokens.*30 tokens.*3 were"):
        engine.submit(Request("a", list(range(30)), 3, GREEDY))
    with pytest.raises(EngineError, match="0 prompt tokens"):
        engine.submit(Request("a", [], 3, GREEDY))
    assert generate(engine, [Request("b", list(range(31)), 1, GREEDY)])["b"].finished.reason == FinishReason.LENGTH


class Recorder(OracleDrafter):
    """Writes down what it is shown."""

    def __init__(self) -> None:
        super().__init__([], 67)
        self.shown: dict[int, list[tuple[torch.Tensor, list[int]]]] = {}

    def observe(self, batch: Sequence[Observation]) -> None:
        for seen in batch:
            self.shown.setdefault(seen.slot, []).append((seen.features, list(seen.next_ids)))


def test_the_drafter_sees_every_position_once_in_order_with_its_true_feature(
    model: torch.nn.Module, target: TorchTarget, plain: dict[str, list[list[int]]]
) -> None:
    recorder = Recorder()
    (result,) = run(target, recorder, GREEDY, prompts=PROMPTS[:1])
    assert list(result.token_ids) == plain["greedy"][0]
    features = torch.cat([f for f, _ in recorder.shown[0]])
    next_ids = [t for _, ids in recorder.shown[0] for t in ids]
    text = [*PROMPTS[0], *plain["greedy"][0]]
    assert next_ids == text[1 : len(next_ids) + 1]
    with torch.inference_mode():
        want = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(features, want[: len(features)], atol=1e-5, rtol=1e-4)


def test_tokens_arrive_in_one_event_a_round_and_say_which_were_drafts(
    target: TorchTarget, plain: dict[str, list[list[int]]]
) -> None:
    engine = Engine(target, drafter_named("oracle", plain["greedy"]), EngineOptions(1, 120, Budget(16, 2, 3)))
    engine.submit(Request("r", PROMPTS[1], 12, GREEDY))
    bursts = []
    while engine.scheduler.has_work:
        bursts += [e for e in engine.step() if isinstance(e, TokensEvent)]
    assert [len(b.token_ids) for b in bursts] == [1, 5, 5, 1]
    assert bursts[1].drafted == (True, True, True, True, False)
