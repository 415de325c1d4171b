"""Every committed recipe of distillation and segmentation can be read, and names networks and terms that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vision
from kernels.training import TrainingOptions, load_recipe, take_table
from kernels.training.study import expand
from vision.backbones import list_backbones
from vision.distillation.terms import parse_terms
from vision.tasks.distillation import DistillationRecipe
from vision.tasks.segmentation import SegmentationDataOptions, SegmenterOptions

RECIPES = sorted((Path(vision.__file__).parent / "recipes" / "distillation").glob("*.toml"))
SEGMENTERS = ("scenes", "cityscapes")


def cells(file: Path) -> list[dict[str, Any]]:
    recipe = load_recipe(file)
    return [cell.recipe for cell in expand(recipe)] if "study" in recipe else [recipe]


@pytest.mark.parametrize("file", [f for f in RECIPES if not f.name.startswith(SEGMENTERS)], ids=lambda file: file.stem)
def test_distillation_recipes(file: Path) -> None:
    for recipe in cells(file):
        assert DistillationRecipe.parse(recipe).student.model.backbone in list_backbones()


@pytest.mark.parametrize("file", [f for f in RECIPES if f.name.startswith(SEGMENTERS)], ids=lambda file: file.stem)
def test_segmentation_recipes(file: Path) -> None:
    for recipe in cells(file):
        assert take_table(recipe, "model", SegmenterOptions).backbone in list_backbones()
        take_table(recipe, "data", SegmentationDataOptions)
        take_table(recipe, "training", TrainingOptions)
        assert bool(parse_terms(recipe.get("terms", []))) == ("teacher" in recipe)


def test_the_study_weighs_every_loss_alike() -> None:
    """Labels and teacher add up to 1 in every variant; only the correlation comes on top."""
    for recipe in cells(next(file for file in RECIPES if file.stem == "cifar10_study")):
        terms = parse_terms(recipe["terms"])
        weight = sum(term.weight for name, term in terms.items() if name != "cckd")
        assert recipe["distillation"]["cross_entropy_weight"] + weight == pytest.approx(1.0)
