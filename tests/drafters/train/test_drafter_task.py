"""Drafter training: alignment against the drafter at work, frozen parts, a run from recipe to a drafter that loads."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from drafters.dovetail import DovetailDrafter, load_drafter
from drafters.drafter import DrafterError, DraftState, Observation
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget
from drafters.train.drafter_task import DrafterTask, train_drafter
from drafters.train.feature_source import DataOptions, FeatureSource, OnTheFlySource, packed_windows
from drafters.train.options import LossOptions
from kernels.training import RecipeError

VOCAB, HIDDEN = 24, 16


class TinyTarget:
    """A target whose feature is a fixed mix of the current and the last token: learnable in a few steps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.mix = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5

    def features(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedded = functional.embedding(token_ids, self.embedding)
        before = functional.pad(embedded[:, :-1], (0, 0, 1, 0))
        return torch.tanh(embedded @ self.mix + 0.3 * before)


def create_source(data: DataOptions, layers: Sequence[str]) -> FeatureSource:
    target = TinyTarget()
    load = partial(packed_windows, data, VOCAB)
    return OnTheFlySource(target.features, target.embedding, target.embedding, "tiny", load)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, VOCAB, 2000).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", ids)
    return {
        "drafter": {"intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1},
        "data": {
            "target": "tiny", "tokens": str(tmp_path / "tokens.npy"), "window_length": 16, "held_out_share": 0.1,
        },
        "training": {
            "output": str(tmp_path / "run"), "steps": 12, "batch_size": 8, "learning_rate": 1e-2, "save_every": 6,
            "evaluate_every": 6, "log_every": 3,
        },
    }  # fmt: skip


def no_samples() -> Any:
    return [], None


def create_task(loss: LossOptions) -> DrafterTask:
    torch.manual_seed(0)
    target = TinyTarget()
    source = OnTheFlySource(target.features, target.embedding, target.embedding, "tiny", no_samples)
    return DrafterTask(DovetailNetwork(DovetailConfig(HIDDEN, VOCAB, 32, 2, 1, 8, num_blocks=2)), source, loss)


def test_training_predicts_what_the_drafter_at_work_predicts() -> None:
    task = create_task(LossOptions(cross_entropy_weight=0.5)).eval()
    drafter = DovetailDrafter(task.network, task.embedding, task.lm_head, 1, 16)
    token_ids = torch.randint(0, VOCAB, (1, 9))
    mask = torch.tensor([[0.0, 1, 1, 0, 1, 1, 0, 1, 1]])
    features = TinyTarget().features(token_ids)
    regression, entropy, agreed = 0.0, 0.0, 0.0
    for i in range(8):
        drafter.observe([Observation(0, features[0, i : i + 1], token_ids[0, i + 1 : i + 2].tolist())])
        output, wanted = drafter.last_outputs[0], features[0, i + 1]
        draft, target = output @ task.lm_head.T, wanted @ task.lm_head.T
        regression += mask[0, i].item() * functional.smooth_l1_loss(output, wanted).item()
        entropy -= mask[0, i].item() * (target.softmax(-1) * draft.log_softmax(-1)).sum().item()
        agreed += mask[0, i].item() * float(draft.argmax() == target.argmax())
    got = task(token_ids, mask)
    assert got["regression"].item() == pytest.approx(regression / 5, rel=1e-4)
    assert got["cross_entropy"].item() == pytest.approx(entropy / 5, rel=1e-4)
    assert got["accuracy"].item() == pytest.approx(agreed / 5, abs=1e-4)
    assert got["loss"].item() == pytest.approx(regression / 5 + 0.5 * entropy / 5, rel=1e-4)


def test_captured_features_are_taken_and_masked_positions_do_not_matter() -> None:
    task = create_task(LossOptions()).eval()
    token_ids = torch.randint(0, VOCAB, (2, 6))
    mask = torch.ones(2, 6)
    features = TinyTarget().features(token_ids)
    assert torch.equal(task(token_ids, mask)["loss"], task(token_ids, mask, features)["loss"])
    mask[:, 3:] = 0.0
    want = task(token_ids, mask, features)["loss"]
    features[:, 4:] = 50.0
    assert torch.equal(task(token_ids, mask, features)["loss"], want)


def test_unrolled_steps_add_their_decayed_losses() -> None:
    forced, unrolled = create_task(LossOptions()).eval(), create_task(LossOptions(unrolled_steps=3)).eval()
    token_ids, mask = torch.randint(0, VOCAB, (2, 8)), torch.ones(2, 8)
    once, thrice = forced(token_ids, mask), unrolled(token_ids, mask)
    for name in ("regression", "cross_entropy", "accuracy"):
        torch.testing.assert_close(once[name], thrice[name])
    features = TinyTarget().features(token_ids)
    steps = unrolled.predict(features[:, :-1], token_ids[:, 1:])
    want = once["loss"]
    for step, weight in ((1, 0.8), (2, 0.64)):
        ones = torch.ones(2, 7 - step)
        want = want + weight * unrolled.step_figures(steps[step][:, step:], features[:, step + 1 :], ones)["loss"]
    torch.testing.assert_close(thrice["loss"], want)
    assert {"accuracy_2", "accuracy_3"} <= thrice.keys()


def test_noise_while_training_only() -> None:
    task = create_task(LossOptions())
    token_ids, mask = torch.randint(0, VOCAB, (2, 6)), torch.ones(2, 6)
    assert not torch.equal(task(token_ids, mask)["loss"], task(token_ids, mask)["loss"])
    task.eval()
    assert torch.equal(task(token_ids, mask)["loss"], task(token_ids, mask)["loss"])


def test_only_the_network_learns_and_is_saved() -> None:
    task = create_task(LossOptions())
    task(torch.randint(0, VOCAB, (2, 6)), torch.ones(2, 6))["loss"].backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in task.parameters())
    assert task.embedding.grad is None
    assert not task.embedding.requires_grad
    assert all(name.startswith("network.") for name in task.state_dict())


def test_a_recipe_ends_in_a_drafter_that_drafts(recipe: dict[str, Any]) -> None:
    report = train_drafter(recipe, create_source)
    assert report.finished
    assert {"loss", "regression", "cross_entropy", "accuracy", "eval_accuracy"} <= report.final.keys()
    target = TinyTarget()
    drafter = load_drafter(
        Path(report.checkpoint), target.embedding, target.embedding, torch.device("cpu"), torch.float32, 1, 32
    )
    assert drafter.network.config.target == "tiny"
    token_ids = [1, 2, 3, 4]
    drafter.observe([Observation(0, target.features(torch.tensor([token_ids]))[0, :3], token_ids[1:])])
    (proposal,) = drafter.propose([DraftState(0, token_ids)], Budget(rows=8))
    assert len(proposal) == 7


def test_a_trimmed_vocabulary_is_the_frequent_part_and_nothing_else_is_drafted(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    frequent = [1, 5, 6, 11, 20]
    ids = np.tile(np.array([*frequent * 3, 2, 9], dtype=np.uint16), 60)
    np.save(tmp_path / "tokens.npy", ids)
    recipe["drafter"]["draft_vocab_size"] = 5
    recipe["loss"] = {"acceptance_weight": 1.0, "acceptance_form": "lambda"}
    recipe["training"] |= {"steps": 2, "evaluate_every": 2, "save_every": 2}
    report = train_drafter(recipe, create_source)
    target, cpu = TinyTarget(), torch.device("cpu")
    drafter = load_drafter(Path(report.checkpoint), target.embedding, target.embedding, cpu, torch.float32, 1, 32)
    assert drafter.network.draft_ids is not None
    assert drafter.network.draft_ids.tolist() == frequent
    drafter.observe([Observation(0, target.features(torch.tensor([[1, 2, 3]]))[0], [2, 3, 4])])
    (proposal,) = drafter.propose([DraftState(0, [1, 2, 3, 4])], Budget(rows=12, top_k=5, depth=1))
    assert set(proposal.token_ids) <= set(frequent)
    head = drafter.last_outputs[0] @ target.embedding[frequent].T
    assert proposal.log_probs[0] == pytest.approx(float(head.log_softmax(0).max()), abs=1e-5)


def test_choices_outside_a_trimmed_vocabulary_teach_nothing_and_count_as_missed() -> None:
    whole = create_task(LossOptions())
    torch.manual_seed(0)
    network = DovetailNetwork(replace(whole.network.config, draft_vocab_size=VOCAB // 2))
    network.load_state_dict({**whole.network.state_dict(), "draft_ids": torch.arange(VOCAB // 2)})
    target = TinyTarget()
    source = OnTheFlySource(target.features, target.embedding, target.embedding, "tiny", no_samples)
    trimmed = DrafterTask(network, source, LossOptions())
    wanted, predicted = torch.randn(1, 40, HIDDEN), torch.randn(1, 40, HIDDEN)
    choices = (wanted[0] @ target.embedding.T).argmax(-1)
    inside = (choices < VOCAB // 2).float()[None]
    assert 0 < inside.sum() < 40
    got = trimmed.step_figures(predicted, wanted, torch.ones(1, 40))
    only_inside = trimmed.step_figures(predicted, wanted, inside)
    torch.testing.assert_close(got["cross_entropy"], only_inside["cross_entropy"])
    torch.testing.assert_close(
        got["regression"], whole.step_figures(predicted, wanted, torch.ones(1, 40))["regression"]
    )
    right = (predicted[0] @ target.embedding[: VOCAB // 2].T).argmax(-1) == choices
    assert got["accuracy"].item() == pytest.approx(right.float().mean().item(), abs=1e-4)


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("muon", "bf16")])
def test_training_lowers_the_loss(recipe: dict[str, Any], optimizer: str, precision: str) -> None:
    recipe["drafter"] |= {"num_blocks": 2, "fusion": "dgf" if precision == "bf16" else "linear"}
    recipe["training"] |= {
        "optimizer": optimizer,
        "precision": precision,
        "steps": 30,
        "log_every": 5,
        "save_every": 30,
        "evaluate_every": 30,
    }
    train_drafter(recipe, create_source)
    history = json.loads((Path(recipe["training"]["output"]) / "training.json").read_text())
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    train_drafter(recipe, create_source)
    whole = load_state(tmp_path / "run")
    recipe["training"]["output"] = str(tmp_path / "again")
    train_drafter(recipe, create_source)
    shutil.rmtree(tmp_path / "again" / "checkpoint-12")
    train_drafter(recipe, create_source, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), load_state(tmp_path / "again").values(), strict=True))


def load_state(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint-12" / "model.safetensors")


@pytest.mark.parametrize(
    ("table", "changes", "named"),
    [
        ("drafter", {"num_heads": 3, "num_kv_heads": 3}, "not a multiple of drafter.num_heads 3"),
        ("drafter", {"num_blocks": 9}, "num_blocks is 9"),
        ("drafter", {"blocks": 2}, "unknown keys blocks"),
        ("data", {"tokens": "nowhere.npy"}, "nowhere.npy, which does not exist"),
        ("data", {"window_length": 5000}, "one window takes 5000"),
        ("data", {"held_out_share": 1.0}, "held_out_share is 1.0"),
        ("loss", {"unrolled_steps": 0}, "unrolled_steps is 0"),
        ("loss", {"acceptance_form": "exp"}, "'exp'; allowed are log, lambda"),
        ("drafter", {"draft_vocab_size": 99}, "draft_vocab_size is 99; allowed are 1 to the vocabulary, 24"),
        ("lose", {"noise": 0.0}, "unknown tables lose"),
    ],
)
def test_bad_recipes(recipe: dict[str, Any], table: str, changes: dict[str, Any], named: str) -> None:
    recipe[table] = {**recipe.get(table, {}), **changes}
    with pytest.raises((RecipeError, DrafterError), match=named):
        train_drafter(recipe, create_source)


def test_files_that_hold_no_tokens(recipe: dict[str, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(RecipeError, match=r"float32 of shape \(4, 4\)"):
        train_drafter(recipe, create_source)
    (tmp_path / "tokens.npy").write_bytes(b"")
    with pytest.raises(RecipeError, match="no array of token ids"):
        train_drafter(recipe, create_source)
