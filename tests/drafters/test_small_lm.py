"""A language model as drafter: its trees against plain forward passes, its slots."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from doubles import tiny_llama, tiny_qwen3
from drafters import small_lm
from drafters.drafter import DraftState
from drafters.proposal import Budget, Proposal
from drafters.small_lm import SmallLMDrafter
from server.targets.torch_target import TorchTarget

MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen3}


@pytest.fixture(scope="module", params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> Path:
    return save_model(MODELS[request.param](), request.param)


def load(folder: Path, vocab_size: int = 67, capacity: int = 64) -> SmallLMDrafter:
    return SmallLMDrafter(TorchTarget.load(folder, "fp32", 3, capacity), vocab_size)


def plain_log_probs(folder: Path, token_ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0, -1].log_softmax(-1)


def assert_true_tree(folder: Path, text: list[int], proposal: Proposal) -> None:
    """Every node's log-probability is the model's own, given the node's path; children come best first."""
    assert len(proposal) > 0
    for row in range(proposal.num_rows):
        if not proposal.children[row]:
            continue
        path = [proposal.token_ids[i - 1] for i in proposal.path(row)[1:]]
        log_probs = plain_log_probs(folder, text + path)
        for rank, child in enumerate(proposal.children[row]):
            token_id = proposal.token_ids[child - 1]
            assert token_id == int(log_probs.topk(4).indices[rank])
            assert proposal.log_probs[child - 1] == pytest.approx(float(log_probs[token_id]), abs=1e-4)


def test_trees_of_several_requests_are_the_models_own_at_every_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_lm, "MAX_PASS_ROWS", 4)  # so the longer prompt is caught up with in pieces
    drafter = load(folder)
    texts = {0: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 2: [30, 31]}
    budget = Budget(rows=8, top_k=3, depth=2)
    for proposal, text in zip(
        drafter.propose([DraftState(s, t) for s, t in texts.items()], budget), texts.values(), strict=True
    ):
        assert_true_tree(folder, text, proposal)
    for text in texts.values():
        text += [12, 13, 14]
    drafter.slots.keys[:, :, :, 11:] = float("nan")  # drafted rows must not be taken for committed ones
    for proposal, text in zip(
        drafter.propose([DraftState(s, t) for s, t in texts.items()], budget), texts.values(), strict=True
    ):
        assert_true_tree(folder, text, proposal)


def test_release_leaves_no_trace_of_another_text(folder: Path) -> None:
    drafter = load(folder)
    budget = Budget(rows=4, top_k=2, depth=1)
    drafter.propose([DraftState(0, [1, 2, 3, 4, 5, 6])], budget)
    drafter.propose([DraftState(1, [1, 2, 3, 4])], budget)
    drafter.release(0)
    for slot, text in ((0, [9, 8, 7, 6, 5, 4, 3]), (1, [1, 2, 3, 4, 40, 41])):
        (proposal,) = drafter.propose([DraftState(slot, text)], budget)
        assert_true_tree(folder, text, proposal)


def test_nothing_is_proposed_beyond_the_models_positions_or_in_one_row(folder: Path) -> None:
    drafter = load(folder, capacity=8)
    assert drafter.propose([DraftState(0, list(range(8)))], Budget(16, 2, 3)) == [Proposal()]
    (near_the_end,) = drafter.propose([DraftState(0, list(range(7)))], Budget(16, 1, 3))
    assert len(near_the_end) == 2  # one row was left to expand
    assert drafter.propose([DraftState(1, [1])], Budget(1, 2, 3)) == [Proposal()]


def test_ids_the_target_lacks_are_not_drafted(folder: Path) -> None:
    drafter = load(folder, vocab_size=5)
    (proposal,) = drafter.propose([DraftState(0, [1, 2, 3])], Budget(16, 4, 2))
    assert set(proposal.token_ids) <= set(range(5))
