"""The designs of docs/evidence.md can be read whole before anything is trained."""

from pathlib import Path

import pytest

import vision
from kernels.training import load_recipe
from kernels.training.study import expand
from vision.tasks.classification import ClassifierRecipe
from vision.tasks.perceptrons import Variant

RECIPES = Path(vision.__file__).parent / "recipes" / "evidence"


@pytest.mark.parametrize("name", ["textures_tuning", "textures_bdd", "textures_cckd", "textures_long"])
def test_studies_of_perceptrons(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.toml")
    variants = {cell.variant: Variant.parse(cell.variant, cell.recipe) for cell in expand(recipe)}
    for variant in variants.values():
        weight = sum(term.weight for kind, term in variant.terms.items() if kind != "cckd")
        assert variant.distillation.cross_entropy_weight + weight == pytest.approx(1.0), variant.name
    tuning = load_recipe(RECIPES / "textures_tuning.toml")["study"]["seeds"]
    assert name == "textures_tuning" or not set(recipe["study"]["seeds"]) & set(tuning)


def test_studies_of_classifiers() -> None:
    cells = expand(load_recipe(RECIPES / "backbones.toml"))
    assert len({cell.seed for cell in cells}) >= 10
    for cell in cells:
        assert ClassifierRecipe.parse(cell.recipe).model.backbone == cell.variant
