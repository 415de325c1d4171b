"""What rows cost, what drafts are worth, and the choice between them: by simulation, without a model."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drafters.drafter import DraftState, Observation
from drafters.proposal import Budget, Proposal, chain
from server.engine.acceptance import Accepted
from server.engine.calibration import DRAFTER, LOOKUP, Calibration, RequestRecord, drafter_cell, lookup_cell
from server.engine.candidates import NOTHING, Candidates, Draft, choose_rows, learn_unused, merge, sorted_gains
from server.engine.cost import Costs, DraftCost, Spent, VerifyCost, best_count
from server.engine.ledger import Ledger
from server.engine.measure import measured_costs
from server.targets.target import PrefillChunk, VerifyRows

CURVE = {1: 10.0, 2: 11.0, 4: 12.0, 8: 14.0, 16: 26.0, 32: 52.0}


def costs(curve: dict[int, float] = CURVE, overhead_s: float = 0.0) -> Costs:
    return Costs(VerifyCost(curve), DraftCost(1.0, 0.5, 0.01), overhead_s)


def test_the_curve_is_exact_at_its_points_linear_between_and_never_falls() -> None:
    curve = VerifyCost({1: 10.0, 4: 13.0, 8: 12.0})
    assert [curve.seconds(n) for n in (1, 2, 4)] == [10.0, 11.0, 13.0]
    assert all(curve.seconds(n + 1) >= curve.seconds(n) for n in range(1, 40))
    assert VerifyCost(CURVE).seconds(64) == pytest.approx(52 + 32 * 26 / 16)
    assert VerifyCost({1: 10.0}).seconds(11) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="above 0"):
        VerifyCost({})


def test_the_curve_follows_the_load_and_learns_its_shape() -> None:
    curve = VerifyCost(CURVE)
    for _ in range(200):
        for rows in CURVE:
            curve.record(rows, 3 * CURVE[rows])
    assert [curve.seconds(n) for n in CURVE] == pytest.approx([3 * CURVE[n] for n in CURVE], rel=0.02)
    for _ in range(400):  # eight rows turn out dear
        curve.record(1, 30.0)
        curve.record(8, 90.0)
    assert curve.seconds(8) / curve.seconds(1) == pytest.approx(3.0, rel=0.1)
    before = curve.seconds(1)
    curve.record(1, 10**6)  # a pass that was interrupted
    assert curve.seconds(1) < 1.2 * before


@pytest.mark.parametrize("seed", range(20))
def test_the_chosen_number_of_rows_is_the_best_of_all(seed: int) -> None:
    chooser = random.Random(seed)
    slopes = list(itertools.accumulate((chooser.random() for _ in range(64)), initial=5.0))
    rule = costs(dict(enumerate(slopes, 1)), chooser.random())
    gains = sorted((chooser.random() for _ in range(40)), reverse=True)
    num_requests = chooser.randrange(1, 5)
    rule.speedup.record(num_requests, 1 + chooser.random(), 1.0)
    saved = [rule.saved_s(num_requests, sum(gains[:n]), n) for n in range(41)]
    count, saved_s = best_count(rule, num_requests, gains)
    assert saved_s == pytest.approx(max(saved)) == pytest.approx(saved[count])


def test_what_drafting_adds_to_a_pass_is_learnt_where_rounds_with_and_without_it_follow_each_other() -> None:
    chance = random.Random(3)
    curve, plain = VerifyCost({1: 10.0, 8: 12.0}), VerifyCost({1: 10.0, 8: 12.0})
    for number in range(4000):
        drafted, load = number % 40 < 25, 2.0 if 1000 < number < 2000 else 1.0
        taken = load * (13.0 if drafted else 10.0) * chance.uniform(0.9, 1.1)
        curve.record(1, taken, drafted=drafted)
        plain.record(1, load * 10.0 * chance.uniform(0.9, 1.1))
    assert curve.slowed == pytest.approx(1.3, abs=0.07) and plain.slowed == 1.0
    assert curve.slowing_s(1) == pytest.approx(3.0, abs=1.0)


def test_a_ledger_charges_the_drafter_for_the_passes_it_slows() -> None:
    ledger, rule = Ledger(), Costs(VerifyCost({1: 1.0, 2: 1.0}), DraftCost(0.0, 0.0, 0.0))
    rule.verify.slowed = 1.4
    draft = Draft((drafter_cell(1, -1.0),))
    for _ in range(40):  # a third of the drafts is accepted: pays, but for what they slow
        for accepted in (Accepted((0, 1), (5, 7)), Accepted((0,), (7,)), Accepted((0,), (7,))):
            ledger.drafted(DRAFTER, 1e-6)
            ledger.verified(Candidates(chain([1]), (draft,), (0.5,)), accepted)
            ledger.close(rule, Spent(1, 2, len(accepted.token_ids), 1e-6, 1.0, 0.0))
    assert not ledger.may_draft(DRAFTER) and ledger.may_draft(LOOKUP)


def test_a_token_saves_what_one_takes_of_late() -> None:
    rule = costs(overhead_s=2.0)
    assert rule.token_s(1) == 12.0 and rule.token_s(4) == 3.5
    assert rule.saved_s(1, 0.75, 3, draft_s=1.0) == pytest.approx(0.75 * 12 - 2 - 1)
    for _ in range(500):  # three tokens for each plain one, at twice the time
        rule.record(Spent(1, 4, 3, 10.0, 12.0, 2.0))
    assert rule.token_s(1) == pytest.approx(8.0, rel=1e-3)
    assert rule.saved_s(1, 0.5, 3) == pytest.approx(2.0, rel=1e-2) and rule.saved_s(1, 0.5, 3, 3.0) < 0
    assert rule.token_s(4) == 3.5  # of four requests nothing is known yet
    for _ in range(500):
        rule.record(Spent(1, 4, 1, 10.0, 12.0, 2.0))
    assert rule.token_s(1) == pytest.approx(12.0)  # plain decoding is always to be had


def test_no_row_is_taken_where_rows_are_dear_and_more_where_they_are_cheap() -> None:
    gains = [0.6**n for n in range(1, 12)]
    dear, cheap = costs({1: 10.0, 2: 20.0}), costs({1: 10.0, 2: 10.1})
    assert best_count(dear, 1, gains)[0] == 0
    assert best_count(cheap, 1, gains)[0] > 6
    sizes = [best_count(costs({1: 10.0, 2: 10.0 + slope}), 1, gains)[0] for slope in (0.1, 0.5, 1, 2, 5, 10)]
    assert sizes == sorted(sizes, reverse=True)


def test_drafting_costs_grow_with_what_rounds_showed() -> None:
    draft = DraftCost(1.0, 0.5, 0.01)
    assert draft.seconds(1, 3) == 3.0
    draft.record(4, 3, 20, 6.2)  # a part of which went into showing it twenty positions
    assert draft.seconds(4, 1) == pytest.approx(4.0)
    draft.record(4, 3, 200, 60.0)  # a long pause lies behind it
    assert draft.seconds(4, 1) == pytest.approx(4.0)
    assert draft.seconds(1, 3) == 3.0


def path_of(candidates: Candidates, tokens: Sequence[int]) -> Accepted:
    """The path of a tree that a text takes."""
    rows, token_ids, row = [0], list[int](), 0
    for token_id in tokens:
        token_ids.append(token_id)
        below = [c for c in candidates.tree.children[row] if candidates.tree.token_ids[c - 1] == token_id]
        if not below:
            break
        row = below[0]
        rows.append(row)
    return Accepted(tuple(rows), tuple(token_ids))


class Warming:
    """Target and drafter in one, by a clock of their own: what ran last is in the cache, and twice as fast."""

    name, feature_layers = "warming", ()
    info = SimpleNamespace(vocab_size=9)

    def __init__(self) -> None:
        self.now = 0.0
        self.last = ""

    def run(self, what: str, seconds: float) -> None:
        self.now += seconds * (0.5 if self.last == what else 1.0)
        self.last = what

    def prefill(self, chunk: PrefillChunk) -> SimpleNamespace:
        return SimpleNamespace(features=torch.zeros(len(chunk.token_ids), 2))

    def verify(self, rows: Sequence[VerifyRows]) -> list[SimpleNamespace]:
        self.run("target", 0.01)
        return [SimpleNamespace(argmax=lambda: [0])]

    def observe(self, batch: Sequence[Observation]) -> None:
        self.run("drafter", 0.0004 + 0.0001 * sum(len(o.next_ids) for o in batch))

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        self.now += 0.001 * (budget.depth + 1)
        return [Proposal() for _ in states]

    def release(self, slot: int) -> None:
        self.last = ""


def test_a_drafter_is_measured_as_it_runs_behind_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Warming()
    monkeypatch.setattr("server.engine.measure.time", SimpleNamespace(perf_counter=lambda: both.now))
    found = measured_costs(both, both, Budget(8, 2, 6), 8).draft  # type: ignore[arg-type]
    assert found.level_s == pytest.approx(0.001)
    assert found.fixed_s + found.row_s == pytest.approx(0.0005), "its weights are read anew in every round"


def test_stages_share_a_tree_and_no_node_outranks_its_parent() -> None:
    calibration, record = Calibration(), RequestRecord()
    tree = Proposal((5, 6, 7), (None, None, 0), (-0.1, -2.0, -0.2))
    merged = merge(tree, (5, 8, 9), 3, calibration, record)
    assert merged.tree.token_ids == (5, 6, 7, 8, 9)
    assert merged.tree.parents == (None, None, 0, 0, 3)
    assert [len(draft.cells) for draft in merged.drafts] == [2, 1, 1, 1, 1]
    for node, parent in enumerate(merged.tree.parents):
        assert parent is None or merged.gains[node] < merged.gains[parent]
    assert merge(Proposal(), (), 0, calibration, record) == NOTHING
    best = merged.best(2)
    assert [best.tree.token_ids[0], len(best.tree)] == [5, 2]


@pytest.mark.parametrize("seed", range(10))
def test_rows_go_to_the_requests_whose_drafts_are_worth_most(seed: int) -> None:
    chooser = random.Random(seed)
    calibration = Calibration()
    several = []
    for _ in range(5):
        parents = [None, *(chooser.choice([None, *range(i)]) for i in range(1, 8))]
        tree = Proposal(tuple(range(8)), tuple(parents), tuple(-chooser.random() for _ in range(8)))
        several.append(merge(tree, (), 0, calibration, RequestRecord()))
    chosen = choose_rows(several, 11)
    assert sum(len(c.tree) for c in chosen) == 11
    assert sorted_gains(chosen) == sorted_gains(several)[:11]
    assert choose_rows(several, 0) == [NOTHING] * 5
    assert choose_rows(several, 40) == several


def test_worth_is_learnt_for_each_stage_and_each_request_and_fades() -> None:
    calibration, good, bad = Calibration(), RequestRecord(), RequestRecord()
    cell, prior = drafter_cell(1, -0.05)
    for _ in range(40):
        calibration.round += 1
        calibration.add(cell, prior, True, good)
        calibration.add(cell, prior, False, bad)
    assert calibration.worth(cell, prior, RequestRecord()) == pytest.approx(0.5, abs=0.1)
    assert calibration.worth(cell, prior, good) > 2 * calibration.worth(cell, prior, bad)
    copied, copied_prior = lookup_cell(1, 3)
    assert calibration.worth(copied, copied_prior, bad) == copied_prior  # another stage
    assert {cell.stage, copied.stage} == {DRAFTER, LOOKUP}
    calibration.round += 5000
    assert calibration.worth(cell, prior, RequestRecord()) == pytest.approx(prior, abs=0.01)


def test_the_depth_a_tree_is_followed_to_is_learnt_from_what_was_tried() -> None:
    calibration, record = Calibration(), RequestRecord()
    for _ in range(300):
        calibration.round += 1
        tree = merge(chain([1, 2, 3], [-0.1] * 3), (), 0, calibration, record)
        calibration.add_levels(tree.followed(path_of(tree, [1, 2, 9])))
    assert [round(level.mean(0.5, calibration.round), 1) for level in calibration.levels] == [1.0, 1.0, 0.0]
    assert calibration.expected_depth(3) == pytest.approx(2.0, abs=0.1)
    lookup_only = merge(Proposal(), (1, 2), 2, calibration, record)
    assert lookup_only.followed(path_of(lookup_only, [1, 2])) == []


def simulate(
    accept: float, rounds: int, lookup: float, num_requests: int = 1, level_s: float = 0.5
) -> tuple[float, int]:
    """Seconds a token in a world where a drafter's and a lookup's drafts are accepted that often; drafted rounds."""
    chooser = random.Random(1)
    rule, calibration = costs(overhead_s=0.2), Calibration()
    rule.draft.level_s = level_s
    records = [RequestRecord() for _ in range(num_requests)]
    seconds, tokens, drafted = 0.0, 0, 0
    for _ in range(rounds):
        calibration.round += 1
        alone = [merge(Proposal(), (1, 2, 3, 4), 2, calibration, r) if lookup else NOTHING for r in records]
        count, best_s = best_count(rule, num_requests, sorted_gains(alone))
        depths = {
            depth: rule.saved_s(
                num_requests, num_requests * calibration.expected_depth(depth + 1), num_requests * (depth + 1),
                rule.draft.seconds(num_requests, depth),
            )
            for depth in range(6)
        }  # fmt: skip
        best = max(depths, key=lambda depth: depths[depth])
        draft_s = 0.0
        if depths[best] > best_s:
            drafted += 1
            draft_s = rule.draft.seconds(num_requests, best)
            ids = range(10, 11 + best)
            tree = chain(tuple(ids), [-0.1] * (best + 1))
            alone = [merge(tree, (1, 2, 3, 4) if lookup else (), 2, calibration, r) for r in records]
            count, _ = best_count(rule, num_requests, sorted_gains(alone))
        chosen = choose_rows(alone, count)
        learn_unused(calibration, alone, chosen)
        seconds += draft_s + 0.2 + rule.verify.seconds(num_requests + count)
        before = tokens
        for candidates, record in zip(chosen, records, strict=True):
            start, chance = (1, lookup) if chooser.random() < 0.5 and lookup else (10, accept)
            text = [start + i if chooser.random() < chance else 99 for i in range(8)]
            accepted = path_of(candidates, text)
            tokens += len(accepted.rows)
            for draft, right in candidates.tried(accepted):
                for cell, prior in draft.cells:
                    calibration.add(cell, prior, right, record)
            calibration.add_levels(candidates.followed(accepted))
        pass_s = rule.verify.seconds(num_requests + count)
        rule.record(Spent(num_requests, num_requests + count, tokens - before, draft_s, pass_s, 0.2))
    return seconds / tokens, drafted


@pytest.mark.parametrize("num_requests", [1, 2, 4, 8])
@pytest.mark.parametrize("level_s", [0.1, 0.5, 3.0])
def test_a_useless_drafter_costs_little(num_requests: int, level_s: float) -> None:
    plain = 10.2 if num_requests == 1 else VerifyCost(CURVE).seconds(num_requests) + 0.2
    spent, _ = simulate(0.0, 4000, 0.0, num_requests, level_s)
    assert spent < 1.03 * plain / num_requests


def test_useless_lookups_cost_little_and_good_drafts_pay() -> None:
    assert simulate(0.0, 4000, 1e-9)[0] < 10.2 * 1.03
    assert simulate(0.8, 2000, 0.0)[0] < 10.2 / 2
    assert simulate(0.0, 2000, 0.95, level_s=5.0)[0] < 10.2 / 1.5


def test_costs_are_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.engine import measure

    calls = []

    def measured(*arguments: object) -> Costs:
        calls.append(arguments)
        return costs()

    monkeypatch.setattr(measure, "measured_costs", measured)
    file = tmp_path / "cache" / "costs.json"
    first = measure.remembered_costs(file, "this machine", None, None, None, 9)  # type: ignore[arg-type]
    again = measure.remembered_costs(file, "this machine", None, None, None, 9)  # type: ignore[arg-type]
    assert again.verify.points == first.verify.points == CURVE
    assert (again.draft.fixed_s, again.draft.level_s, again.draft.row_s) == (1.0, 0.5, 0.01)
    measure.remembered_costs(file, "another", None, None, None, 9)  # type: ignore[arg-type]
    assert len(calls) == 2
    for damaged in ("not JSON", "[1]", '{"this machine": {"verify": {"1": -3}}}'):
        file.write_text(damaged)
        assert measure.remembered_costs(file, "this machine", None, None, None, 9).verify.points == CURVE  # type: ignore[arg-type]


def rounds_tried(ledger: Ledger, rule: Costs, num_accepted: int, count: int = 4000) -> tuple[int, float]:
    """Rounds of one request in which a drafter of four drafts and 0.2 s took part, and seconds lost by all of them."""
    draft = Draft((drafter_cell(1, -1.0),))
    tree = chain([1, 2, 3, 4])
    tried, lost_s = 0, 0.0
    for _ in range(count):
        if ledger.may_draft(DRAFTER):
            tried += 1
            ledger.drafted(DRAFTER, 0.2)
            rows = tuple(range(num_accepted + 1))
            ledger.verified(Candidates(tree, (draft,) * 4, (0.5,) * 4), Accepted(rows, tuple(range(len(rows)))))
            lost_s += 0.2 + rule.verify.seconds(5) - (1 + num_accepted) * rule.verify.seconds(1)
            ledger.close(rule, Spent(1, 5, 1 + num_accepted, 0.2, rule.verify.seconds(5), 0.0))
        else:
            ledger.close(rule, Spent(1, 1, 1, 0.0, rule.verify.seconds(1), 0.0))
    return tried, lost_s


def test_a_stage_that_never_brings_anything_costs_a_hundredth_of_the_time_and_its_credit() -> None:
    rule = Costs(VerifyCost({1: 1.0, 5: 1.5}), DraftCost(0.2, 0.0, 0.0))
    tried, lost_s = rounds_tried(Ledger(), rule, num_accepted=0)
    assert lost_s <= 0.01 * 4000 * 1.02 + 4 + 1
    assert 20 < tried < 80
    always, gained_s = rounds_tried(Ledger(), rule, num_accepted=2)
    assert (always, gained_s < 0) == (4000, True)


def test_a_ledger_asks_nobody_to_pay_for_what_both_stages_drafted() -> None:
    ledger, rule = Ledger(), Costs(VerifyCost({1: 1.0, 2: 9.0}), DraftCost(0.0, 0.0, 0.0))
    both = Draft((drafter_cell(1, -1.0), lookup_cell(1, 2)))
    for _ in range(50):
        ledger.verified(Candidates(chain([1]), (both,), (0.5,)), Accepted((0,), (7,)))
        ledger.close(rule, Spent(1, 2, 1, 0.0, 9.0, 0.0))
    assert ledger.may_draft(DRAFTER) and ledger.may_draft(LOOKUP)
    copied = Draft((lookup_cell(1, 2),))
    for _ in range(3):
        ledger.verified(Candidates(chain([1]), (copied,), (0.5,)), Accepted((0,), (7,)))
        ledger.close(rule, Spent(1, 2, 1, 0.0, 9.0, 0.0))
    assert ledger.may_draft(DRAFTER) and not ledger.may_draft(LOOKUP)
