"""The native drafter against the torch network and the Python growth of its trees."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafters.checkpoint import save_drafter
from drafters.dovetail import DovetailDrafter
from drafters.drafter import DraftState, Observation
from drafters.eagle import EagleConfig, EagleNetwork
from drafters.native import NativeDrafter, NotNative, load_native
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget, Proposal, TreeGrowth
from kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
VOCABULARY, CAPACITY = 300, 256
CONFIG = DovetailConfig(64, VOCABULARY, 96, 4, 2, 16)
BATCHES = {1: [2], 4: [0, 1, 2, 3]}


def create_network(**changes: object) -> DovetailNetwork:
    torch.manual_seed(1)
    network = DovetailNetwork(replace(CONFIG, **changes)).eval().requires_grad_(False)  # type: ignore[arg-type]
    for name, parameter in network.named_parameters():
        parameter.mul_(2.0 if parameter.ndim == 2 else 1.0)  # away from a drafter that ignores its past
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms other than 1, biases other than 0
        assert parameter.isfinite().all(), name
    return network


def create_pair(
    bits: int = 32, dtype: torch.dtype = torch.float32, **changes: object
) -> list[DovetailDrafter | NativeDrafter]:
    network = create_network(**changes)
    embedding, lm_head = torch.randn(VOCABULARY, 64).to(dtype), 0.3 * torch.randn(VOCABULARY, 64)
    return [
        DovetailDrafter(network, embedding.float(), lm_head, 4, CAPACITY),
        NativeDrafter(network, embedding, lm_head, bits, 4, CAPACITY),
    ]


def observation(slot: int, count: int, seed: int = 0) -> Observation:
    generator = torch.Generator().manual_seed(100 * seed + slot)
    token_ids = torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
    return Observation(slot, torch.randn(count, 64, generator=generator), token_ids)


def states(slots: list[int]) -> list[DraftState]:
    return [DraftState(slot, []) for slot in slots]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("fusion", ["dgf", "linear"])
def test_features_and_trees_equal_those_of_the_torch_network(fusion: str, num_blocks: int, batch: int) -> None:
    pair = create_pair(fusion=fusion, num_blocks=num_blocks, qkv_bias=True)
    slots = BATCHES[batch]
    for round_number, count in enumerate((70, 3, 1, 66)):
        proposals = []
        for drafter in pair:
            drafter.observe([observation(slot, count + slot, round_number) for slot in slots])
            proposals.append(drafter.propose(states(slots), Budget(16, 4, 5)))
        torch.testing.assert_close(pair[1].last_outputs, pair[0].last_outputs, rtol=1e-4, atol=1e-5)
        for want, got in zip(*proposals, strict=True):
            assert (got.token_ids, got.parents) == (want.token_ids, want.parents)
            assert got.log_probs == pytest.approx(want.log_probs, abs=1e-3)
            assert max(got.depths) > 2


@pytest.mark.parametrize(
    "budget", [Budget(9, 1, 7), Budget(40, 3, 4), Budget(2, 4, 3), Budget(8, 6, 0), Budget(500, 400, 1)]
)
def test_every_shape_of_tree(budget: Budget) -> None:
    pair = create_pair()
    trees = []
    for drafter in pair:
        drafter.observe([observation(0, 9), observation(3, 12)])
        trees.append(drafter.propose(states([0, 3]), budget))
    for want, got in zip(*trees, strict=True):
        assert (got.token_ids[:40], got.parents[:40]) == (want.token_ids[:40], want.parents[:40])
        assert len(got) == len(want)


def test_a_draft_vocabulary_and_a_bf16_embedding() -> None:
    ids = torch.randperm(VOCABULARY)[:50].sort().values
    network = create_network(draft_vocab_size=50)
    assert network.draft_ids is not None
    network.draft_ids.copy_(ids)
    embedding, lm_head = torch.randn(VOCABULARY, 64).bfloat16(), 0.3 * torch.randn(VOCABULARY, 64)
    trees = []
    for drafter in (
        DovetailDrafter(network, embedding.float(), lm_head, 2, CAPACITY),
        NativeDrafter(network, embedding, lm_head, 32, 2, CAPACITY),
    ):
        drafter.observe([observation(0, 9)])
        trees += drafter.propose(states([0]), Budget())
    assert trees[0].token_ids == trees[1].token_ids
    assert set(trees[1].token_ids) <= set(ids.tolist())


@pytest.mark.parametrize("bias", [-2.0, 0.5])
@pytest.mark.parametrize("draft_vocab_size", [None, 50])
def test_trees_grow_by_the_confidence(draft_vocab_size: int | None, bias: float) -> None:
    network = create_network(confidence=True, draft_vocab_size=draft_vocab_size)
    assert network.confidence_proj is not None
    network.confidence_proj.weight.normal_(0, 0.3)
    network.confidence_proj.bias.fill_(bias)
    plain = create_network(draft_vocab_size=draft_vocab_size)
    plain.load_state_dict({name: t for name, t in network.state_dict().items() if "confidence" not in name})
    # Tied, the head is the embedding; small, since 1 - p of a certain drafter is mostly rounding.
    embedding = 0.1 * torch.randn(VOCABULARY, 64)
    trees = []
    for its_network, create in ((network, DovetailDrafter), (plain, DovetailDrafter), (network, NativeDrafter)):
        sizes = (32, 2, CAPACITY) if create is NativeDrafter else (2, CAPACITY)
        drafter = create(its_network, embedding, embedding, *sizes)
        drafter.observe([observation(0, 9), observation(1, 12)])
        trees.append(drafter.propose(states([0, 1]), Budget(16, 4, 4)))
    for want, got in zip(trees[0], trees[2], strict=True):
        assert (got.token_ids, got.parents) == (want.token_ids, want.parents)
        assert got.log_probs == pytest.approx(want.log_probs, abs=1e-3)
    assert [tree.log_probs for tree in trees[0]] != [tree.log_probs for tree in trees[1]]


def test_three_feature_layers_are_projected_as_the_torch_network_does() -> None:
    pair = create_pair(features="low+mid+high")
    observed = replace(observation(1, 5), features=torch.randn(5, 192, generator=torch.Generator().manual_seed(3)))
    budget = Budget(8, 3, 2)
    for drafter in pair:
        drafter.observe([observed])
    torch.testing.assert_close(pair[1].last_outputs[1], pair[0].last_outputs[1], rtol=1e-3, atol=1e-4)
    plain, fast = (drafter.propose(states([1]), budget)[0] for drafter in pair)
    assert fast.token_ids == plain.token_ids


@pytest.mark.parametrize(("bits", "bound"), [(16, 0.02), (8, 0.03)])
def test_low_precision_stays_near(bits: int, bound: float) -> None:
    exact, low = create_pair(bits)
    for drafter in (exact, low):
        drafter.observe([observation(0, 40)])
    assert (low.last_outputs - exact.last_outputs).norm() < bound * exact.last_outputs.norm()
    (proposal,) = low.propose(states([0]), Budget())
    assert len(proposal) == 15
    assert all(value <= 0.0 for value in proposal.log_probs)


@pytest.mark.parametrize("bits", [32, 8])
def test_pieces_neighbours_and_drafting_change_no_bit(bits: int) -> None:
    _, drafter = create_pair(bits, num_blocks=2)
    whole = observation(0, 150)
    drafter.observe([whole, observation(2, 5)])
    start = 0
    for count in (5, 1, 80, 64):
        part = Observation(1, whole.features[start : start + count], whole.next_ids[start : start + count])
        drafter.observe([part])
        drafter.propose(states([1]), Budget())
        start += count
    assert torch.equal(drafter.last_outputs[0], drafter.last_outputs[1])
    assert torch.equal(drafter.slots.keys[:, 0, :, :150], drafter.slots.keys[:, 1, :, :150])
    together = drafter.propose(states([0, 1, 2]), Budget())
    assert together[0] == together[1] == drafter.propose(states([1]), Budget())[0]


def test_dropped_rows_are_never_read() -> None:
    _, drafter = create_pair()
    drafter.observe([observation(0, 6)])
    want = drafter.propose(states([0]), Budget())
    drafter.slots.keys[:, 0, :, 6:] = float("nan")
    drafter.slots.values[:, 0, :, 6:] = float("nan")
    assert drafter.propose(states([0]), Budget()) == want


def test_equal_scores_go_to_the_shallower_then_the_earlier_node() -> None:
    network = create_network()
    drafter = NativeDrafter(network, torch.randn(VOCABULARY, 64), torch.zeros(VOCABULARY, 64), 32, 1, CAPACITY)
    drafter.observe([observation(0, 3)])
    budget = Budget(9, 4, 2)
    (got,) = drafter.propose(states([0]), budget)
    growth = TreeGrowth(budget)
    level: list[tuple[int | None, list[int], list[float]]] = [(None, [0, 1, 2, 3], [got.log_probs[0]] * 4)]
    for _ in range(budget.depth + 1):
        growth.add(level)
        level = [(node, [0, 1, 2, 3], [got.log_probs[0]] * 4) for node in growth.beam()]
    assert got == growth.proposal()


def test_a_head_that_gives_no_number_drafts_without_harm() -> None:
    network = create_network()
    drafter = NativeDrafter(network, torch.full((VOCABULARY, 64), float("nan")), torch.randn(VOCABULARY, 64), 32, 1, 64)
    drafter.observe([observation(0, 3)])
    (proposal,) = drafter.propose(states([0]), Budget())
    assert all(0 <= token_id < VOCABULARY for token_id in proposal.token_ids)


def test_a_slot_nearly_full_drafts_shallower_and_a_full_one_still_one_level() -> None:
    network = create_network()
    drafter = NativeDrafter(network, torch.randn(VOCABULARY, 64), torch.randn(VOCABULARY, 64), 32, 2, 8)
    drafter.observe([observation(0, 6)])
    assert max(drafter.propose(states([0]), Budget(20, 2, 5))[0].depths) == 2
    drafter.observe([observation(0, 2)])
    assert max(drafter.propose(states([0]), Budget(20, 2, 5))[0].depths) == 1


def test_slots_that_saw_the_same_draft_the_same_until_they_are_released() -> None:
    _, drafter = create_pair()
    seen = observation(0, 6)
    drafter.observe([seen, Observation(1, seen.features, seen.next_ids)])
    first, second = drafter.propose(states([0, 1]), Budget())
    assert first == second
    drafter.release(0)
    assert drafter.propose(states([0, 1]), Budget()) == [Proposal(), second]


def test_what_has_no_native_form_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = torch.randn(VOCABULARY, 64)
    eagle = EagleNetwork(EagleConfig(64, VOCABULARY, 96, 4, 2, 16))
    with pytest.raises(NotNative, match="EagleNetwork has no native form"):
        NativeDrafter(eagle, embedding, embedding, 32, 1, 8)
    with pytest.raises(NotNative, match=r"heads of 8; .* multiples of 32 and of 16"):
        NativeDrafter(create_network(head_dim=8), embedding, embedding, 8, 1, 8)
    save_drafter(create_network(), tmp_path)
    assert load_native(tmp_path, embedding, embedding, 1, 8).name == "dovetail"
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(NotNative, match="not built"):
        load_native(tmp_path, embedding, embedding, 1, 8)
