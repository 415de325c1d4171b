"""The drafter's cache and its trees, against a slow drafter that starts from scratch for every node."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from drafters.dovetail import DovetailDrafter
from drafters.drafter import DrafterError, DraftState, Observation
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget, Proposal
from kernels.tree_attention import SlotError

CONFIG = DovetailConfig(32, 40, 48, 4, 2, 8, num_blocks=2)
CAPACITY = 64


def create(num_blocks: int = 2, num_slots: int = 4, capacity: int = CAPACITY, fusion: str = "dgf") -> DovetailDrafter:
    torch.manual_seed(1)
    config = replace(CONFIG, num_blocks=num_blocks, fusion=fusion)
    network = DovetailNetwork(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(2.0 if parameter.ndim == 2 else 1.0)  # away from a drafter that ignores its past
    embedding, lm_head = torch.randn(40, 32), 0.2 * torch.randn(40, 32)
    return DovetailDrafter(network, embedding, lm_head, num_slots, capacity)


def pairs(count: int, seed: int) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 40, (count,), generator=generator).tolist()
    return torch.randn(count, 32, generator=generator), token_ids


def observe(drafter: DovetailDrafter, slot: int, count: int, seed: int) -> None:
    drafter.observe([Observation(slot, *pairs(count, seed))])


def from_scratch(drafter: DovetailDrafter, features: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    """Outputs of all positions by one plain causal pass over the whole sequence."""
    embedded = functional.embedding(torch.tensor(token_ids), drafter.embedding)
    return drafter.network.forward_causal(features[None], embedded[None])[0]


def slow_children(drafter: DovetailDrafter, output: torch.Tensor, top_k: int) -> list[tuple[int, float]]:
    log_probs = torch.log_softmax((output @ drafter.lm_head.T).double(), dim=-1)
    values, ids = log_probs.topk(top_k)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def slow_tree(
    drafter: DovetailDrafter, features: torch.Tensor, token_ids: list[int], budget: Budget
) -> dict[tuple[int, ...], float]:
    """Token paths of the best nodes and their scores, every node drafted by a run over its whole past."""
    output = from_scratch(drafter, features, token_ids)[-1]
    pool: dict[tuple[int, ...], float] = {(): 0.0}
    beam = [((), features, token_ids, output)]
    for _ in range(budget.depth + 1):
        level = []
        for path, path_features, path_ids, output in beam:
            for token_id, log_prob in slow_children(drafter, output, budget.top_k):
                child = (*path, token_id)
                pool[child] = pool[path] + log_prob
                level.append((child, torch.cat((path_features, output[None])), [*path_ids, token_id]))
        level = sorted(level, key=lambda node: -pool[node[0]])[: budget.top_k]
        beam = [(p, f, t, from_scratch(drafter, f, t)[-1]) for p, f, t in level]
    del pool[()]
    return dict(sorted(pool.items(), key=lambda item: -item[1])[: budget.rows - 1])


def assert_same_tree(got: Proposal, want: Proposal) -> None:
    """Equal nodes; the scores of a batch differ from those of one request by rounding."""
    assert (got.token_ids, got.parents) == (want.token_ids, want.parents)
    assert got.log_probs == pytest.approx(want.log_probs, abs=1e-4)


def token_paths(proposal: Proposal) -> dict[tuple[int, ...], float]:
    """Token path and cumulative score of every node."""
    paths: list[tuple[int, ...]] = []
    scores: list[float] = []
    for token_id, parent, log_prob in zip(proposal.token_ids, proposal.parents, proposal.log_probs, strict=True):
        paths.append((token_id,) if parent is None else (*paths[parent], token_id))
        scores.append(log_prob if parent is None else scores[parent] + log_prob)
    return dict(zip(paths, scores, strict=True))


@pytest.mark.parametrize(("num_blocks", "fusion"), [(1, "dgf"), (3, "dgf"), (1, "linear")])
def test_extending_at_once_piecewise_or_from_scratch_is_the_same(num_blocks: int, fusion: str) -> None:
    drafter = create(num_blocks, fusion=fusion)
    features, token_ids = pairs(12, 0)
    drafter.observe([Observation(0, features, token_ids)])
    start = 0
    for count in (5, 1, 4, 2):
        drafter.observe([Observation(1, features[start : start + count], token_ids[start : start + count])])
        start += count
    torch.testing.assert_close(drafter.last_outputs[0], drafter.last_outputs[1])
    torch.testing.assert_close(drafter.last_outputs[0], from_scratch(drafter, features, token_ids)[-1])
    features[0] += 1.0  # the past must matter, or the above says little
    assert not torch.allclose(drafter.last_outputs[0], from_scratch(drafter, features, token_ids)[-1], atol=1e-3)
    torch.testing.assert_close(drafter.slots.keys[:, 0, :, :12], drafter.slots.keys[:, 1, :, :12])


@pytest.mark.parametrize("budget", [Budget(9, 1, 7), Budget(16, 4, 3), Budget(40, 3, 4), Budget(2, 4, 3)])
def test_trees_equal_those_drafted_from_scratch(budget: Budget) -> None:
    drafter = create()
    features, token_ids = pairs(9, 3)
    drafter.observe([Observation(2, features, token_ids)])
    (proposal,) = drafter.propose([DraftState(2, token_ids)], budget)
    want = slow_tree(drafter, features, token_ids, budget)
    got = token_paths(proposal)
    assert got.keys() == want.keys()
    for path, score in want.items():
        assert got[path] == pytest.approx(score, abs=1e-4)


def test_requests_together_equal_each_alone() -> None:
    together, alone = create(), create()
    budget, counts = Budget(12, 3, 4), {0: 3, 1: 11, 3: 7}
    together.observe([Observation(slot, *pairs(count, slot)) for slot, count in counts.items()])
    got = together.propose([DraftState(slot, []) for slot in counts], budget)
    for proposal, (slot, count) in zip(got, counts.items(), strict=True):
        observe(alone, slot, count, slot)
        (want,) = alone.propose([DraftState(slot, [])], budget)
        assert_same_tree(proposal, want)


def test_drafting_leaves_the_committed_rows_alone() -> None:
    drafted, plain = create(), create()
    for drafter in (drafted, plain):
        observe(drafter, 0, 6, 0)
    drafted.propose([DraftState(0, [])], Budget())
    assert drafted.slots.lengths == plain.slots.lengths
    for drafter in (drafted, plain):
        observe(drafter, 0, 3, 1)
    assert torch.equal(drafted.last_outputs[0], plain.last_outputs[0])
    assert torch.equal(drafted.slots.keys[:, 0, :, :9], plain.slots.keys[:, 0, :, :9])


def test_dropped_rows_are_never_read() -> None:
    drafter = create()
    observe(drafter, 0, 6, 0)
    want = drafter.propose([DraftState(0, [])], Budget())
    drafter.slots.keys[:, 0, :, 6:] = float("nan")
    drafter.slots.values[:, 0, :, 6:] = float("nan")
    assert drafter.propose([DraftState(0, [])], Budget()) == want


def test_a_released_slot_starts_anew() -> None:
    drafter = create()
    observe(drafter, 0, 6, 0)
    drafter.release(0)
    assert drafter.propose([DraftState(0, [])], Budget()) == [Proposal()]
    observe(drafter, 0, 4, 5)
    observe(drafter, 1, 4, 5)
    first, second = drafter.propose([DraftState(0, []), DraftState(1, [])], Budget())
    assert_same_tree(first, second)


def test_a_slot_nearly_full_drafts_shallower_and_a_full_one_still_one_level() -> None:
    drafter = create(capacity=8)
    observe(drafter, 0, 6, 0)
    (proposal,) = drafter.propose([DraftState(0, [])], Budget(20, 2, 5))
    assert max(proposal.depths) == 2
    observe(drafter, 0, 2, 1)
    (proposal,) = drafter.propose([DraftState(0, [])], Budget(20, 2, 5))
    assert max(proposal.depths) == 1
    with pytest.raises(SlotError, match="holds 8 rows; 9"):
        observe(drafter, 0, 1, 2)


def test_one_row_means_no_draft_and_nothing_observed_means_nothing_changes() -> None:
    drafter = create()
    drafter.observe([Observation(0, torch.empty(0, 32), [])])
    assert drafter.propose([DraftState(0, [])], Budget()) == [Proposal()]
    observe(drafter, 0, 3, 0)
    assert drafter.propose([DraftState(0, [])], Budget(rows=1)) == [Proposal()]


def test_one_slot_twice_in_a_batch_is_refused() -> None:
    with pytest.raises(DrafterError, match="observed twice"):
        create().observe([Observation(0, *pairs(2, 0)), Observation(0, *pairs(1, 1))])


def test_more_children_than_words() -> None:
    drafter = create()
    observe(drafter, 0, 3, 0)
    (proposal,) = drafter.propose([DraftState(0, [])], Budget(rows=100, top_k=60, depth=0))
    assert sorted(proposal.token_ids) == list(range(40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_drafts_with_fp32_scores(dtype: torch.dtype) -> None:
    exact = create()
    network = DovetailNetwork(exact.network.config)
    network.load_state_dict(exact.network.state_dict())
    drafter = DovetailDrafter(network.to(dtype), exact.embedding.to(dtype), exact.lm_head.to(dtype), 2, CAPACITY)
    for each in (drafter, exact):
        observe(each, 0, 9, 0)
    torch.testing.assert_close(drafter.last_outputs[0].float(), exact.last_outputs[0], atol=0.3, rtol=0.1)
    (proposal,) = drafter.propose([DraftState(0, [])], Budget())
    assert len(proposal) == 15
    assert all(value <= 0.0 for value in proposal.log_probs)
