"""Drafter training: alignment against the drafter at work, frozen parts, a run from recipe to a drafter that loads."""

import json
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional

from drafters.dovetail import DovetailDrafter, load_drafter
from drafters.drafter import DrafterError, DraftState, Observation
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget
from drafters.train import memory
from drafters.train.drafter_task import DrafterTask, train_drafter
from drafters.train.feature_source import DataOptions, FeatureSource, OnTheFlySource, packed_windows
from drafters.train.options import LossOptions
from kernels.training import RecipeError
from kernels.training.run import last_checkpoint

VOCAB, HIDDEN = 24, 16


class TinyTarget:
    """A target whose feature is a fixed mix of the current and the last token: learnable in a few steps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.mix = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5

    def three_layers(self, token_ids: torch.Tensor) -> torch.Tensor:
        last = self.features(token_ids)
        before = functional.pad(last[:, :-1], (0, 0, 1, 0))
        return torch.cat((last.sin(), 3 * before, last - before), dim=-1)

    def layers(self, names: Sequence[str], token_ids: torch.Tensor) -> torch.Tensor:
        last = self.features(token_ids)
        return last if len(names) == 1 else torch.cat((self.three_layers(token_ids), last), dim=-1)

    def features(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedded = functional.embedding(token_ids, self.embedding)
        before = functional.pad(embedded[:, :-1], (0, 0, 1, 0))
        return torch.tanh(embedded @ self.mix + 0.3 * before)


def create_source(data: DataOptions, layers: Sequence[str]) -> FeatureSource:
    target = TinyTarget()
    load = partial(packed_windows, data, VOCAB)
    compute = partial(target.layers, layers)
    return OnTheFlySource(compute, target.embedding, target.embedding, "tiny", load)


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


def create_task(loss: LossOptions, **shape: Any) -> DrafterTask:
    torch.manual_seed(0)
    target = TinyTarget()
    source = OnTheFlySource(target.features, target.embedding, target.embedding, "tiny", no_samples)
    config = DovetailConfig(HIDDEN, VOCAB, 32, 2, 1, 8, num_blocks=2, **shape)
    return DrafterTask(DovetailNetwork(config), source, loss)


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
        want = want + weight * unrolled.figures([steps[step][:, step:]], features[:, step + 1 :], ones)["loss"]
    torch.testing.assert_close(thrice["loss"], want)
    assert {"accuracy_2", "accuracy_3"} <= thrice.keys()


def test_three_layers_predict_what_the_drafter_at_work_predicts() -> None:
    torch.manual_seed(0)
    target = TinyTarget()
    compute = partial(target.layers, ("low", "mid", "high", "last"))
    source = OnTheFlySource(compute, target.embedding, target.embedding, "tiny", no_samples)
    network = DovetailNetwork(DovetailConfig(HIDDEN, VOCAB, 32, 2, 1, 8, features="low+mid+high"))
    task = DrafterTask(network, source, LossOptions(unrolled_steps=2)).eval()
    drafter = DovetailDrafter(network, task.embedding, task.lm_head, 1, 32)
    assert drafter.feature_layers == ("low", "mid", "high")
    token_ids, mask = torch.randint(0, VOCAB, (1, 9)), torch.ones(1, 9)
    layers, last = target.three_layers(token_ids), target.features(token_ids)
    first = task.predict(layers[:, :-1], token_ids[:, 1:])
    regression = second = 0.0
    for i in range(8):
        drafter.observe([Observation(0, layers[0, i : i + 1], token_ids[0, i + 1 : i + 2].tolist())])
        torch.testing.assert_close(drafter.last_outputs[0], first[0][0, i], atol=1e-5, rtol=1e-4)
        regression += functional.smooth_l1_loss(drafter.last_outputs[0], last[0, i + 1]).item() / 8
        # A drafted position reads the output of its parent, not a projection of anything.
        drafted = torch.cat((network.project(layers[:, : i + 1]), drafter.last_outputs[None]), dim=1)
        if i < 7:
            embedded = task.embedding[token_ids[:, 1 : i + 3]]
            again = network.forward_causal(drafted, embedded)[0, -1]
            torch.testing.assert_close(again, first[1][0, i + 1], atol=1e-5, rtol=1e-4)
            second += functional.smooth_l1_loss(again, last[0, i + 2]).item() / 7
    got = task(token_ids, mask)
    assert got["regression"].item() == pytest.approx(regression, rel=1e-4)
    only_regression = DrafterTask(network, source, LossOptions(cross_entropy_weight=0.0, unrolled_steps=2)).eval()
    assert only_regression(token_ids, mask)["loss"].item() == pytest.approx(regression + 0.8 * second, rel=1e-4)
    got["loss"].backward()
    assert network.feature_proj is not None
    assert network.feature_proj.weight.grad is not None
    assert bool((network.feature_proj.weight.grad != 0).any())


@pytest.mark.parametrize("draft_vocab_size", [None, VOCAB // 2])
def test_losses_in_chunks_equal_those_of_all_positions_at_once(
    monkeypatch: pytest.MonkeyPatch, draft_vocab_size: int | None
) -> None:
    whole = create_task(LossOptions(acceptance_weight=1.0, unrolled_steps=2, noise=0.0))
    network = DovetailNetwork(replace(whole.network.config, draft_vocab_size=draft_vocab_size))
    network.load_state_dict(whole.network.state_dict(), strict=False)
    target = TinyTarget()
    source = OnTheFlySource(target.features, target.embedding, target.embedding, "tiny", no_samples)
    task = DrafterTask(network, source, whole.loss)
    token_ids, mask = torch.randint(0, VOCAB, (3, 12)), (torch.rand(3, 12) > 0.3).float()
    want = task(token_ids, mask)
    want["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    monkeypatch.setattr(memory, "CHUNK_LOGITS", 5 * VOCAB)
    got = task(token_ids, mask)
    got["loss"].backward()
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("draft_vocab_size", [None, VOCAB // 2])
def test_the_confidence_learns_acceptance_and_leaves_the_drafts_alone(draft_vocab_size: int | None) -> None:
    options = LossOptions(unrolled_steps=2, noise=0.0)
    plain = create_task(options, draft_vocab_size=draft_vocab_size)
    task = create_task(options, draft_vocab_size=draft_vocab_size, confidence=True)
    task.network.load_state_dict(plain.network.state_dict(), strict=False)
    projection = task.network.confidence_proj
    assert projection is not None
    token_ids, mask = torch.randint(0, VOCAB, (2, 12)), torch.ones(2, 12)
    mask[1, 5:] = 0.0
    got, want = task(token_ids, mask), plain(token_ids, mask)
    steps = task.predict(TinyTarget().features(token_ids)[:, :-1], token_ids[:, 1:])
    # It begins undecided, at the logarithm of 2 nats a position, whatever is accepted.
    assert got["confidence"].item() == pytest.approx(np.log(2), rel=1e-4)
    assert got["loss"].item() == pytest.approx(want["loss"].item() + 1.8 * np.log(2), rel=1e-4)
    got["loss"].backward()
    want["loss"].backward()
    for name, parameter in plain.network.named_parameters():
        torch.testing.assert_close(task.network.get_parameter(name).grad, parameter.grad)
    wanted = TinyTarget().features(token_ids) @ task.lm_head.T
    gradient = torch.zeros(())
    for step, (predicted, weight) in enumerate(zip(steps, (1.0, 0.8), strict=True)):
        counted = mask[:, step:-1] > 0
        draft = task.logits(predicted[:, step:])[counted].argmax(-1)
        accepted = draft == wanted[:, step + 1 :][counted].argmax(-1)  # ids below the draft vocabulary are themselves
        gradient = gradient + weight * (0.5 - accepted.float().mean())
    assert projection.bias.grad is not None
    assert projection.bias.grad.item() == pytest.approx(gradient.item(), abs=1e-4)


def test_a_trimmed_vocabulary_is_the_frequent_part_and_nothing_else_is_drafted(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    frequent = [1, 5, 6, 11, 20]
    ids = np.tile(np.array([*frequent * 3, 2, 9], dtype=np.uint16), 60)
    np.save(tmp_path / "tokens.npy", ids)
    recipe["drafter"] |= {"draft_vocab_size": 5, "confidence": True}
    recipe["loss"] = {"acceptance_weight": 0.9, "acceptance_form": "total_variation", "unrolled_steps": 2}
    recipe["training"] |= {"steps": 2, "evaluate_every": 2, "save_every": 2}
    report = train_drafter(recipe, create_source)
    target, cpu = TinyTarget(), torch.device("cpu")
    drafter = load_drafter(Path(report.checkpoint), target.embedding, target.embedding, cpu, torch.float32, 1, 32)
    assert drafter.network.draft_ids is not None
    assert drafter.network.draft_ids.tolist() == frequent
    drafter.observe([Observation(0, target.features(torch.tensor([[1, 2, 3]]))[0], [2, 3, 4])])
    (proposal,) = drafter.propose([DraftState(0, [1, 2, 3, 4])], Budget(rows=12, top_k=5, depth=1))
    assert set(proposal.token_ids) <= set(frequent)
    confidence = drafter.network.confidence(drafter.last_outputs[0])
    assert confidence is not None
    assert confidence != 0
    assert proposal.log_probs[0] == pytest.approx(float(functional.logsigmoid(confidence)), abs=1e-5)


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
    got = trimmed.figures([predicted], wanted, torch.ones(1, 40))
    only_inside = trimmed.figures([predicted], wanted, inside)
    torch.testing.assert_close(got["cross_entropy"], only_inside["cross_entropy"])
    torch.testing.assert_close(got["regression"], whole.figures([predicted], wanted, torch.ones(1, 40))["regression"])
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
        ("loss", {"acceptance_form": "exp"}, "'exp'; allowed are log, lambda, total_variation"),
        ("drafter", {"draft_vocab_size": 99}, "draft_vocab_size is 99; allowed are 1 to the vocabulary, 24"),
        ("lose", {"noise": 0.0}, "unknown tables lose"),
        ("drafter", {"features": "low+high"}, r"'low\+high'; allowed are last, low\+mid\+high"),
        ("drafter", {"features": "low+mid+high"}, "needs loss.unrolled_steps of at least 2"),
        ("data", {"answers": "a.jsonl"}, "needs data.conversations in a format with turns: sharegpt, messages"),
        ("data", {"answer_tokens": 0}, "answer_tokens is 0"),
        ("data", {"answer_temperature": -1.0}, "0 is greedy"),
    ],
)
def test_bad_recipes(recipe: dict[str, Any], table: str, changes: dict[str, Any], named: str) -> None:
    recipe[table] = {**recipe.get(table, {}), **changes}
    with pytest.raises((RecipeError, DrafterError), match=named):
        train_drafter(recipe, create_source)


def test_tokens_of_another_vocabulary_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.full(200, VOCAB, dtype=np.uint16))
    with pytest.raises(RecipeError, match=r"tokens\.npy gives token 24, and the target's vocabulary has 24"):
        train_drafter(recipe, create_source)


def test_a_changed_recipe_is_not_resumed_and_nothing_is_lost(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"] |= {"steps": 2, "save_every": 2}
    train_drafter(recipe, create_source)
    before = {file: file.read_bytes() for file in sorted((tmp_path / "run").rglob("*")) if file.is_file()}
    recipe["loss"] = {"noise": 0.0}
    with pytest.raises(RecipeError, match=r"the recipe changed since checkpoint-2 .*resume with the recipe that began"):
        train_drafter(recipe, create_source, resume=True)
    assert before == {file: file.read_bytes() for file in sorted((tmp_path / "run").rglob("*")) if file.is_file()}


def test_ctrl_c_saves_a_drafter_and_a_resumed_run_equals_an_uninterrupted_one(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["drafter"] |= {"features": "low+mid+high"}
    recipe["loss"] = {"unrolled_steps": 2}
    recipe["training"] |= {"steps": 4, "save_every": 4, "evaluate_every": 4}

    def interrupted(data: DataOptions, layers: Sequence[str]) -> FeatureSource:
        calls, source = 0, create_source(data, layers)

        def compute(token_ids: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 2:
                signal.raise_signal(signal.SIGINT)
            return source.features(token_ids)

        return replace(source, compute=compute)  # type: ignore[type-var]

    stopped = train_drafter(recipe, interrupted)
    assert not stopped.finished
    assert (Path(stopped.checkpoint) / "model.safetensors").is_file()
    assert last_checkpoint(tmp_path / "run") not in (None, tmp_path / "run" / "checkpoint-4")
    resumed = train_drafter(recipe, create_source, resume=True)
    assert resumed.finished
    recipe["training"]["output"] = str(tmp_path / "whole")
    whole = train_drafter(recipe, create_source)
    states = [load_file(Path(report.checkpoint) / "model.safetensors") for report in (resumed, whole)]
    assert all(torch.equal(state, states[1][name]) for name, state in states[0].items())


def test_progress_tells_loss_accuracy_per_depth_and_time_left(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["loss"] = {"unrolled_steps": 3}
    recipe["training"] |= {"steps": 4, "log_every": 2}
    screen = StringIO()
    train_drafter(recipe, create_source, console=Console(file=screen, force_terminal=True, width=100))
    shown = " ".join(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).split())
    figures = r"loss [\d.]+ accuracy [\d.]+ accuracy_2 [\d.]+ accuracy_3 [\d.]+"
    assert re.search(r"training ━+╺?━* 2/4 \d:\d\d:\d\d [\d:-]+ " + figures, shown)
    assert (tmp_path / "run" / "training.png").stat().st_size > 1000
    history = json.loads((tmp_path / "run" / "training.json").read_text())
    assert {"loss", "accuracy", "accuracy_2", "accuracy_3"} <= history[0].keys()


def test_the_memory_is_told_before_the_samples_are_asked_for(
    recipe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def without_samples(data: DataOptions, layers: Sequence[str]) -> FeatureSource:
        def load() -> Any:
            raise RecipeError("asked for")

        return replace(create_source(data, layers), load=load)  # type: ignore[type-var]

    with caplog.at_level("INFO"), pytest.raises(RecipeError, match="asked for"):
        train_drafter(recipe, without_samples)
    assert "training takes about 0.00 GB (parameters" in caplog.text


def test_files_that_hold_no_tokens(recipe: dict[str, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(RecipeError, match=r"float32 of shape \(4, 4\)"):
        train_drafter(recipe, create_source)
    (tmp_path / "tokens.npy").write_bytes(b"")
    with pytest.raises(RecipeError, match="no array of token ids"):
        train_drafter(recipe, create_source)
