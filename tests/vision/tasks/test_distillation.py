"""Students trained beside a teacher: recipes, resuming, caching, samplers, and what is refused."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kernels.losses import BatchTooSmall
from kernels.training import RecipeError, TrainingOptions, TrainingReport, callbacks
from vision.backbones import create_backbone
from vision.backbones.checkpoint import load_backbone, save_backbone
from vision.backbones.preprocessing import Preprocessing
from vision.distillation.teacher import TeacherError, backbone_teacher
from vision.distillation.terms import Answers, parse_terms
from vision.serving.folder import CheckpointError
from vision.tasks import classification
from vision.tasks.classification import TaskOptions
from vision.tasks.distillation import DistillationOptions, DistillationTask, train_distilled

Recipe = Callable[..., dict[str, Any]]

KD = {"kind": "kd", "weight": 0.9, "temperature": 4.0}
CCKD = {"kind": "cckd", "weight": 20.0}
STILL = {"crop": "centre", "flip": False, "color_jitter": 0.0}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    network = create_backbone("fd_mobilenet_x0_25", 3)
    network.class_names = ("blue", "green", "red")
    network.preprocessing = Preprocessing(32, 36)
    save_backbone(network, tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def recipe(tiny_recipe: Recipe, teacher_folder: Path) -> Recipe:
    def build(terms: list[dict[str, Any]] | None = None, **changes: dict[str, Any]) -> dict[str, Any]:
        tables = tiny_recipe(**{"teacher": {"path": str(teacher_folder)}, **changes})
        return tables | {"terms": [KD] if terms is None else terms}

    return build


def train(recipe: dict[str, Any], **kwargs: Any) -> TrainingReport:
    return train_distilled(recipe, console=Console(file=StringIO()), **kwargs)


def weights(report: TrainingReport) -> dict[str, Tensor]:
    return load_backbone(Path(report.checkpoint)).state_dict()


def test_all_terms_train_together_and_are_reported(recipe: Recipe, teacher_folder: Path) -> None:
    terms = [KD, {"kind": "bdd", "weight": 0.4}, {"kind": "dkd", "weight": 0.2, "warmup_steps": 4}, CCKD,
             {"kind": "mimic", "weight": 1.0}, {"kind": "kd", "weight": 0.1, "temperature": 1.0}]  # fmt: skip
    before = (teacher_folder / "model.safetensors").read_bytes()
    report = train(recipe(terms, model={"backbone": "snet49"}, training={"steps": 4, "log_every": 1}))
    names = {"cross_entropy", "kd", "bdd", "dkd", "cckd", "mimic", "kd_2"}
    assert names <= report.final.keys()
    assert {f"{name}_gradient_share" for name in names - {"cross_entropy"}} <= report.final.keys()
    assert {"top1", "calibration_error", "agreement", "tail_mass"} <= report.final.keys()
    assert load_backbone(Path(report.checkpoint)).class_names == ("blue", "green", "red")
    assert (teacher_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("sampler", ["random", "class_uniform", "superclass_uniform"])
def test_resumed_distillation_equals_the_uninterrupted_one(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    terms = [{**KD, "warmup_steps": 6}, CCKD]
    table = {"sampler": sampler, "images_per_class": 4, "num_superclasses": 3}
    # Both runs cross an epoch: 36 images make four batches of eight.
    whole = train(recipe(terms, distillation=table, training={"output": str(tmp_path / "whole")}))
    broken = recipe(terms, distillation=table, training={"output": str(tmp_path / "broken")})
    with monkeypatch.context() as patch:
        original = DistillationTask.after_step

        def interrupt(self: DistillationTask) -> None:
            original(self)
            if int(self.steps_done) == 5:
                signal.raise_signal(signal.SIGINT)

        patch.setattr(DistillationTask, "after_step", interrupt)
        assert not train(broken).finished
    resumed = train(broken, resume=True)
    assert resumed.finished
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed).items())


def test_cached_answers_train_the_same_student_and_are_kept(
    recipe: Recipe, tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = train(recipe(augmentation=STILL, training={"output": str(tmp_path / "asked")}))
    cached = {"path": str(teacher_folder), "cache": str(tmp_path / "answers")}
    table = recipe(augmentation=STILL, teacher=cached, training={"output": str(tmp_path / "cached")})
    kept = train(table)
    expected = weights(asked)
    for key, value in weights(kept).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    assert [file.suffix for file in (tmp_path / "answers").iterdir()] == [".safetensors"]
    monkeypatch.setattr("vision.distillation.cache.ask_all", lambda *_: pytest.fail("the answers are on disk"))
    again = recipe(augmentation=STILL, teacher=cached, training={"output": str(tmp_path / "again")})
    assert all(torch.equal(value, weights(kept)[key]) for key, value in weights(train(again)).items())


def test_answers_to_other_images_are_not_taken(recipe: Recipe, tmp_path: Path, teacher_folder: Path) -> None:
    cached = {"path": str(teacher_folder), "cache": str(tmp_path / "answers")}
    for limit in (None, 24):
        data = {} if limit is None else {"limit": limit}
        table = recipe(augmentation=STILL, teacher=cached, data=data, training={"output": str(tmp_path / str(limit))})
        assert train(table).finished
    assert len(list((tmp_path / "answers").iterdir())) == 2


def test_the_teacher_is_frozen_and_no_part_of_the_state(teacher_folder: Path) -> None:
    teacher = backbone_teacher(teacher_folder)
    student = create_backbone("fd_mobilenet_x0_25", 3)
    student.preprocessing = Preprocessing(32, 36)
    task = DistillationTask(student, teacher, parse_terms([KD, CCKD]), TaskOptions(), DistillationOptions(), 1024)
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    task.train()
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    task(images, torch.tensor([0, 1, 2, 0]), torch.zeros(1, dtype=torch.long))["loss"].backward()
    assert not teacher.network.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.network.state_dict().items())
    assert all(p.grad is None for p in teacher.network.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not any(key.startswith("teacher") for key in task.state_dict())


def test_the_loss_is_the_weighted_sum(teacher_folder: Path) -> None:
    student = create_backbone("fd_mobilenet_x0_25", 3)
    terms = parse_terms([{**KD, "warmup_steps": 4}, {**CCKD, "warmup_steps": 2}])
    teacher = backbone_teacher(teacher_folder)
    table = DistillationOptions(cross_entropy_weight=0.3)
    task = DistillationTask(student, teacher, terms, TaskOptions(), table, 1024)
    images, labels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    task.train()
    task.steps_done += 2
    out = task(images, labels, torch.zeros(1, dtype=torch.long))
    expected = 0.3 * out["cross_entropy"] + 0.9 * 3 / 4 * out["kd"] + 20 * out["cckd"]
    torch.testing.assert_close(out["loss"], expected)


def test_a_student_with_its_teachers_weights_has_nothing_to_learn_from_it(teacher_folder: Path) -> None:
    """Batch statistics aside: both in evaluation mode."""
    student = load_backbone(teacher_folder)
    task = DistillationTask(
        student, backbone_teacher(teacher_folder), parse_terms([KD, CCKD, {"kind": "bdd", "weight": 1.0}]),
        TaskOptions(), DistillationOptions(), 1024,
    )  # fmt: skip
    task.train()
    student.eval()
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    out = task(images, torch.tensor([0, 1, 2, 0]), torch.zeros(1, dtype=torch.long))
    assert all(abs(float(out[name])) < 1e-6 for name in ("kd", "cckd", "bdd"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"terms": [{"kind": "crd", "weight": 1.0}]}, RecipeError, "kind is 'crd'; allowed are kd, bdd"),
        ({"terms": [{"kind": "kd", "weight": 0.9}]}, RecipeError, r"\[kd\] lacks temperature"),
        ({"terms": [{**KD, "weight": 0.0}]}, RecipeError, "leave out a term"),
        ({"terms": [{**KD, "temperature": 0.0}]}, ValueError, "temperature"),
        ({"terms": [{**KD, "temperature": -1.0}]}, ValueError, "temperature"),
        ({"terms": [{"kind": "bdd", "weight": 1.0, "reverse_share": 0.9}]}, RecipeError, "must add up to 1"),
        ({"task": {"mixup": 0.2}}, RecipeError, "mixup"),
        ({"distillation": {"sampler": "greedy"}}, RecipeError, "allowed are random, class_uniform"),
        ({"teacher": {"kind": "jax"}}, RecipeError, "allowed are backbone, transformers"),
        ({"teacher": {"cache": "answers"}}, RecipeError, "needs images that do not change"),
        ({"teacher": {"path": "/nowhere"}}, CheckpointError, "does not exist"),
        ({"terms": [CCKD], "training": {"batch_size": 1}}, BatchTooSmall, "at least 2"),
    ],
)
def test_bad_recipes_are_refused_before_training(
    recipe: Recipe, teacher_folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    terms = changes.pop("terms", None)
    if "teacher" in changes:
        changes["teacher"] = {"path": str(teacher_folder)} | changes["teacher"]
    with pytest.raises(error, match=message):
        train(recipe(terms, **changes))


def test_a_recipe_without_terms_or_teacher_is_refused(recipe: Recipe) -> None:
    tables = recipe()
    for absent, message in (("terms", r"no \[\[terms\]\]"), ("teacher", r"name it in \[teacher\]")):
        with pytest.raises(RecipeError, match=message):
            train({table: values for table, values in tables.items() if table != absent})


def test_an_empty_list_of_terms_trains_the_student_alone_and_measures_it_alike(recipe: Recipe) -> None:
    report = train(recipe([]))
    assert {"top1", "calibration_error", "agreement", "tail_mass"} <= report.final.keys()


def test_a_teacher_of_other_classes_is_refused(recipe: Recipe, teacher_folder: Path, tmp_path: Path) -> None:
    network = load_backbone(teacher_folder)
    network.class_names = ("blue", "green", "yellow")
    save_backbone(network, tmp_path / "other")
    with pytest.raises(TeacherError, match=r"differ in \['red', 'yellow'\]"):
        train(recipe(teacher={"path": str(tmp_path / "other")}))
    network.replace_head(4)
    save_backbone(network, tmp_path / "four")
    with pytest.raises(TeacherError, match="has 4 classes, the student's data 3"):
        train(recipe(teacher={"path": str(tmp_path / "four")}))


def test_a_teacher_that_answers_nan_is_refused(recipe: Recipe, teacher_folder: Path, tmp_path: Path) -> None:
    network = load_backbone(teacher_folder)
    torch.nn.init.constant_(network.head.weight, float("nan"))
    save_backbone(network, tmp_path / "broken")
    with pytest.raises(TeacherError, match="not finite"):
        train(recipe(teacher={"path": str(tmp_path / "broken")}))


def test_terms_know_the_settings_of_their_losses() -> None:
    terms = parse_terms([KD, {"kind": "bdd", "weight": 0.9, "forward_share": 1.0, "reverse_share": 0.0,
                              "forward_temperature": 4.0}])  # fmt: skip
    logits, other = torch.randn(5, 4), torch.randn(5, 4)
    answers = Answers(logits, other, logits, other, torch.zeros(5, dtype=torch.long))
    assert torch.equal(terms["kd"].loss(answers), terms["bdd"].loss(answers)), "without reverse term BDD is KD"
    assert dataclasses.replace(terms["kd"], warmup_steps=10).weight_at(5) == pytest.approx(0.45)


@pytest.mark.parametrize("channels_last", [False, True])
def test_students_are_trained_and_tuned_in_the_layout_the_recipe_asks(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool, tuple[int, ...]]] = []

    def note(images: torch.Tensor) -> None:
        layout = images.is_contiguous(memory_format=torch.channels_last)
        seen.append((layout, torch.is_autocast_enabled("cpu"), tuple(images.shape)))

    student = create_backbone("fd_mobilenet_x0_25", 3)
    monkeypatch.setattr(classification, "tune", lambda model, batch: note(batch) or [])
    options = classification.ModelOptions("fd_mobilenet_x0_25", depthwise="tuned", channels_last=channels_last)
    training = TrainingOptions(output="unused", steps=1, batch_size=4, precision="bf16")
    classification.choose_depthwise(student, options, training, 32)
    terms, table = parse_terms([]), DistillationOptions()
    task = DistillationTask(student, None, terms, TaskOptions(), table, 1024, channels_last).train()
    monkeypatch.setattr(student, "embed", lambda images: note(images) or torch.zeros(4, 256, requires_grad=True))
    task(
        torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), torch.zeros(1).long(),
        torch.zeros(4, 3), torch.zeros(4, 1024),
    )  # fmt: skip
    assert seen == [(channels_last, True, (4, 3, 32, 32)), (channels_last, False, (4, 3, 32, 32))]
