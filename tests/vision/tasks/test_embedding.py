"""Metric learning, alone and beside a teacher of other identities."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kernels.training import RecipeError, TrainingReport, callbacks
from vision.backbones import create_backbone
from vision.backbones.checkpoint import load_backbone, save_backbone
from vision.backbones.preprocessing import Preprocessing
from vision.distillation.teacher import TeacherError
from vision.tasks.embedding import train_embedding

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)


@pytest.fixture
def identities(image_folder: Path) -> Path:
    for name in ("blue", "green", "red"):
        (image_folder / "val" / name).rename(image_folder / "val" / f"dark {name}")
    return image_folder


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    network = create_backbone("snet49", 9)
    network.preprocessing = Preprocessing(32, 36)
    save_backbone(network, tmp_path / "teacher")
    return tmp_path / "teacher"


def train(recipe: dict[str, Any], **kwargs: Any) -> TrainingReport:
    return train_embedding(recipe, console=Console(file=StringIO()), **kwargs)


def test_identities_never_seen_are_found(tiny_recipe: Recipe, identities: Path) -> None:
    recipe = tiny_recipe(
        model={"backbone": "snet49"},
        data={"normalization": "bgr_255"},
        task={"reestimate_batches": 4},
        training={"steps": 30, "clip_norm": 0.0},
    )
    report = train(recipe)
    assert report.final["rank1"] > 0.8 and report.final["mean_average_precision"] > 0.6
    assert load_backbone(Path(report.checkpoint)).class_names == ("blue", "green", "red")


def test_a_teacher_of_other_identities_teaches_its_embedding(
    tiny_recipe: Recipe, identities: Path, teacher_folder: Path
) -> None:
    tables = tiny_recipe(teacher={"path": str(teacher_folder)}, distillation={"cross_entropy_weight": 0.0})
    terms = [{"kind": "mimic", "weight": 1.0}, {"kind": "cckd", "weight": 10.0}]
    report = train(tables | {"terms": terms})
    assert {"mimic", "cckd", "cckd_gradient_share", "rank1"} <= report.final.keys()


def test_logits_of_other_identities_are_refused(tiny_recipe: Recipe, identities: Path, teacher_folder: Path) -> None:
    tables = tiny_recipe(teacher={"path": str(teacher_folder)})
    with pytest.raises(TeacherError, match="has 9 classes"):
        train(tables | {"terms": [{"kind": "kd", "weight": 1.0, "temperature": 1.0}]})


def test_splits_that_share_identities_are_refused(tiny_recipe: Recipe, image_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"blue, green, red stand in both splits \(3 in all\)"):
        train(tiny_recipe())
