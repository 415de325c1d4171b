"""The designs of docs/evidence.md can be read whole before anything is trained."""

from pathlib import Path
from typing import Any

import pytest

import vision
from kernels.training import load_recipe, take_table
from kernels.training.study import expand
from vision.distillation.terms import parse_terms
from vision.tasks.classification import ClassifierRecipe
from vision.tasks.detection_recipe import DetectorRecipe, MiningOptions
from vision.tasks.distillation import DistillationRecipe
from vision.tasks.face_quality import FaceQualityRecipe
from vision.tasks.perceptrons import Variant
from vision.tasks.region_heads import FrozenOptions
from vision.tasks.segmentation import SegmentationDataOptions

DATA = {"needles_lrm": "needles", "bccd_lrm": "voc", "shapes_thundernet": "shapes"}
RECIPES = Path(vision.__file__).parent / "recipes" / "evidence"


@pytest.mark.parametrize(
    "name", ["textures_tuning", "textures_bdd", "textures_cckd", "textures_long", "textures_plugin"]
)
def test_studies_of_perceptrons(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.toml")
    variants = {cell.variant: Variant.parse(cell.variant, cell.recipe) for cell in expand(recipe)}
    for variant in variants.values():
        weight = sum(term.weight for kind, term in variant.terms.items() if kind != "cckd")
        assert variant.distillation.cross_entropy_weight + weight == pytest.approx(1.0), variant.name
    tuning = load_recipe(RECIPES / "textures_tuning.toml")["study"]["seeds"]
    assert name == "textures_tuning" or not set(recipe["study"]["seeds"]) & set(tuning)


@pytest.mark.parametrize("name", DATA)
def test_studies_of_detectors(name: str) -> None:
    cells = expand(load_recipe(RECIPES / f"{name}.toml"))
    assert len({cell.seed for cell in cells}) >= 10
    parsed = {cell.variant: DetectorRecipe.parse(cell.recipe) for cell in cells}
    assert len({(each.training.steps, each.training.batch_size) for each in parsed.values()}) == 1
    assert all(each.data.kind == DATA[name] and each.data.image_size % 32 == 0 for each in parsed.values())


def test_studies_of_region_heads() -> None:
    cells = expand(load_recipe(RECIPES / "regions_bccd.toml"))
    assert len({cell.seed for cell in cells}) == 30
    miners = {cell.variant: take_table(cell.recipe, "mining", MiningOptions) for cell in cells}
    assert {each.regions for each in miners.values()} == {"none", "random", "ohem", "s-ohem"}
    frozen = take_table(cells[0].recipe, "frozen", FrozenOptions)
    assert all(each.nms_threshold < frozen.proposals_nms for each in miners.values()), "something to suppress"


@pytest.mark.parametrize("name", ["backbones", "textures_backbones"])
def test_studies_of_classifiers(name: str) -> None:
    cells = expand(load_recipe(RECIPES / f"{name}.toml"))
    assert len({cell.seed for cell in cells}) >= 10
    for cell in cells:
        assert ClassifierRecipe.parse(cell.recipe).model.backbone == cell.variant


def test_the_studies_beside_a_teacher_differ_in_the_teaching_alone() -> None:
    for name, parse in (("orl_cckd", DistillationRecipe.parse), ("scenes_bdd", parse_scenes)):
        cells = expand(load_recipe(RECIPES / f"{name}.toml"))
        assert len({cell.seed for cell in cells}) == 10
        teacher = load_recipe(RECIPES / f"{name.split('_')[0]}_teacher.toml")["training"]["output"]
        assert {cell.recipe["teacher"]["path"] for cell in cells if "teacher" in cell.recipe} == {f"{teacher}/model"}
        for cell in cells:
            parse(cell.recipe)
        same = [
            {table: cell.recipe[table] for table in ("model", "data", "training")} for cell in cells if cell.seed == 0
        ]
        for each in same:
            each["training"] = {key: value for key, value in each["training"].items() if key != "output"}
        assert all(each == same[0] for each in same), name


def parse_scenes(recipe: dict[str, Any]) -> None:
    data = take_table(recipe, "data", SegmentationDataOptions)
    train, measured = data.sources()
    assert data.shape_odds is not None and len(train) > len(measured) > 0
    assert parse_terms(recipe.get("terms", [])).keys() <= {"kd", "bdd"}


def test_the_studies_of_face_scorers_measure_everybody_once() -> None:
    names = ("faces_folds", "faces_folds_ranks", "faces_folds_wide")
    plain, *others = (
        [cell for cell in expand(load_recipe(RECIPES / f"{name}.toml")) if cell.variant == "plain"] for name in names
    )
    assert all(cells == plain for cells in others), "one training serves all"
    recipes = [FaceQualityRecipe.parse(cell.recipe) for cell in plain]
    splits = [recipe.data.splits(recipe.training.seed) for recipe in recipes]
    assert splits[0] == ("fold_2+3+4_of_5", "fold_1_of_5") and splits[4] == ("fold_1+2+3_of_5", "fold_0_of_5")
    assert len(set(splits)) == 5
