"""Drafting while the target verifies: the plain loop's texts, the next tree at hand, off where it loses."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from doubles import OracleDrafter, tiny_llama
from drafters.checkpoint import save_drafter
from drafters.drafter import Drafter, DraftState, Observation
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget, Proposal
from server.engine.ahead import (
    LEAST_GAIN,
    SETTLED_ROUNDS,
    TRIAL_ROUNDS,
    TRIALS,
    AheadDrafter,
    Trial,
    ahead_budget,
    best_nodes,
    subtree,
)
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.launch import load_drafter
from server.placement.devices import on_cpu
from server.targets.context import DrafterRoom
from server.targets.torch_target import TorchTarget

PROMPTS = ([1, 2, 3, 4, 5], [9], [30, 31, 32, 30, 31], [5, 4, 3])
SAMPLING = [SamplingParams(temperature=0), SamplingParams(temperature=1.1, top_p=0.95, seed=3)]
BUDGET = Budget(8, 2, 3)
TOKENS = 20


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    return save_model(tiny_llama(), "ahead")


@pytest.fixture(scope="module")
def target(folder: Path) -> TorchTarget:
    return TorchTarget.load(folder, "fp32", 2, 120)


def run(target: TorchTarget, drafter: Drafter | None, sampling: SamplingParams) -> list[tuple[int, ...]]:
    engine = Engine(target, drafter, EngineOptions(2, 64, BUDGET, prefill_chunk=4))
    found = generate(engine, [Request(f"r{i}", p, TOKENS, sampling) for i, p in enumerate(PROMPTS)])
    engine.check_integrity()
    return [found[f"r{i}"].token_ids for i in range(len(PROMPTS))]


class Always(Trial):
    """Drafts ahead in every round, and notes whether rounds were measured."""

    def __init__(self) -> None:
        super().__init__(ahead=True)

    def record(self, tokens: int, seconds: float) -> None:
        self.rounds += 1


def ahead(drafter: Drafter) -> AheadDrafter:
    made = AheadDrafter(drafter)
    made.trial = Always()
    return made


class Forgetful(OracleDrafter):
    """Right for the most part; every fifth call fails, in the background or not."""

    calls = 0

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        self.calls += 1
        if self.calls % 5 == 0:
            raise RuntimeError("no memory")
        return super().propose(states, budget)


@pytest.mark.parametrize("kind", ["oracle", "wrong", "forgetful", "dovetail"])
@pytest.mark.parametrize("mode", [0, 1])
def test_the_text_is_that_of_the_plain_loop(
    target: TorchTarget, folder: Path, tmp_path: Path, kind: str, mode: int
) -> None:
    want = run(target, None, SAMPLING[mode])
    texts = [[*p, *t] for p, t in zip(PROMPTS, want, strict=True)]
    drafter: Drafter | None
    if kind == "dovetail":
        torch.manual_seed(0)
        save_drafter(DovetailNetwork(DovetailConfig(64, 67, 96, 4, 2, 16)), tmp_path)
        drafter = load_drafter(target, folder, str(tmp_path), on_cpu(), DrafterRoom(2, 120, 240, 1e9))
    else:
        drafter = {"oracle": OracleDrafter, "wrong": lambda t, v: OracleDrafter(t, v, wrong=True),
                   "forgetful": Forgetful}[kind](texts, 67)  # fmt: skip
    assert drafter is not None
    drafts = ahead(drafter)
    assert run(target, drafts, SAMPLING[mode]) == want
    assert drafts.trial.rounds > 0
    if kind == "oracle":
        assert drafts.hits > 2 * drafts.misses, "most trees were there before they were needed"
    if kind == "wrong":
        assert drafts.hits == 0


def test_a_tree_that_was_grown_ahead_is_what_hangs_below_the_accepted_path() -> None:
    text = list(range(1, 40))
    drafter = ahead(OracleDrafter([text], 67))
    first = drafter.propose([DraftState(0, text[:3])], BUDGET)[0]
    assert first.token_ids[0] == 4
    drafter.observe([Observation(0, torch.zeros(3, 4), text[3:6])])
    second = drafter.propose([DraftState(0, text[:6])], BUDGET)[0]
    assert drafter.hits == 1 and second.token_ids[0] == 7 and max(second.depths) == BUDGET.depth + 1
    assert len(second) <= BUDGET.rows - 1
    third = drafter.propose([DraftState(0, [*text[:6], 60])], BUDGET)[0]
    assert (drafter.hits, drafter.misses) == (1, 2) and len(third) > 0, "the text went elsewhere"
    drafter.release(0)
    assert not drafter.grown and not drafter.waiting


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 8)), max_size=9), st.lists(st.integers(0, 3), max_size=4))
def test_a_subtree_keeps_every_path_below_and_no_other(nodes: list[tuple[int, int]], path: list[int]) -> None:
    seen: set[tuple[int | None, int]] = set()
    token_ids, parents = list[int](), list[int | None]()
    for token_id, parent in nodes:
        above = None if parent < 0 or parent >= len(token_ids) else parent
        if (above, token_id) not in seen:  # siblings differ
            seen.add((above, token_id))
            token_ids.append(token_id)
            parents.append(above)
    tree = Proposal(tuple(token_ids), tuple(parents), tuple(-0.1 * i for i in range(len(token_ids))))
    below = subtree(tree, path)
    texts = {tuple(tree.token_ids[row - 1] for row in tree.path(row)[1:]) for row in range(tree.num_rows)}
    if tuple(path) not in texts:
        assert below is None
        return
    assert below is not None
    want = {text[len(path) :] for text in texts if text[: len(path)] == tuple(path)}
    assert {tuple(below.token_ids[row - 1] for row in below.path(row)[1:]) for row in range(below.num_rows)} == want
    assert best_nodes(below, 2).num_rows == min(3, below.num_rows)


@pytest.mark.parametrize(("gain", "stays"), [(0.8, False), (1.0, False), (LEAST_GAIN + 0.02, True)])
def test_it_stays_where_it_is_measured_to_pay_and_is_tried_again_after_long(gain: float, stays: bool) -> None:
    trial = Trial()
    for _ in range(2 * TRIALS * TRIAL_ROUNDS):
        assert not trial.settled
        trial.record(3, 1.0 / gain if trial.ahead else 1.0)
    assert trial.settled and trial.ahead is stays and trial.gain == pytest.approx(gain)
    ways = set[bool]()
    for _ in range(SETTLED_ROUNDS):
        ways.add(trial.ahead)
        trial.record(3, 1.0)
    assert ways == {stays} and not trial.settled


def test_luck_with_the_drafts_is_not_taken_for_a_gain() -> None:
    """Tokens of a round vary by more than its time: what a few rounds show may be chance."""
    stays = 0
    for seed in range(40):
        chance, trial = random.Random(seed), Trial()
        while not trial.settled:
            trial.record(chance.choice([1, 1, 2, 5]), 1.06 if trial.ahead else 1.0)
        stays += trial.ahead
    assert stays <= 4


def test_deep_trees_fit_the_slots_of_those_who_grow_them() -> None:
    assert ahead_budget(Budget(8, 2, 6)) == Budget(32, 2, 14)
