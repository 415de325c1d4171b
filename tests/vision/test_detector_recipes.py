from pathlib import Path

import pytest

import vision
from kernels.training import load_recipe
from kernels.training.study import expand
from vision.backbones import list_backbones
from vision.data.labelled_boxes import DetectionSource
from vision.detection.checkpoint import load_detector
from vision.tasks.detection_recipe import DetectorRecipe, build_model

FOLDER = Path(vision.__file__).parent / "recipes" / "detection"
REPOSITORY = Path(__file__).resolve().parent.parent.parent
DETECTORS = sorted(
    path
    for path in FOLDER.glob("*.toml")
    if {"mining", "augmentation"} & load_recipe(path).keys() and "architecture" in load_recipe(path).get("model", {})
)
PUBLISHED = {"voc0712_thundernet_snet146": 62_500, "coco_thundernet_snet146": 375_000, "voc0712_yolo_v2": 80_200}


def recipes(path: Path) -> list[dict[str, object]]:
    recipe = load_recipe(path)
    return [cell.recipe for cell in expand(recipe)] if "study" in recipe else [recipe]


@pytest.mark.parametrize("path", DETECTORS, ids=lambda path: path.stem)
def test_every_recipe_is_whole(path: Path) -> None:
    for recipe in recipes(path):
        parsed = DetectorRecipe.parse(recipe)
        assert parsed.model.backbone in [*list_backbones(), "darknet19"]
        assert parsed.training.output.startswith("runs/")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_drop_the_learning_rate_where_the_papers_do(name: str) -> None:
    options = DetectorRecipe.parse(load_recipe(FOLDER / f"{name}.toml")).training
    assert (options.steps, options.batch_size) == (PUBLISHED[name], 64)
    first, second = options.schedule_options["at"]
    assert first / options.steps == pytest.approx(0.5, abs=0.002)
    assert second / options.steps == pytest.approx(0.75, abs=0.003)


def test_the_mining_study_compares_all_samplers_under_one_budget() -> None:
    cells = [DetectorRecipe.parse(recipe) for recipe in recipes(FOLDER / "detector_mining_study.toml")]
    assert len(cells) == (2 * 6 + 5) * 3
    assert len({(cell.training.steps, cell.training.batch_size) for cell in cells}) == 1
    assert {cell.mining.regions for cell in cells} == {"none", "random", "ohem", "s-ohem"}
    assert {cell.mining.map for cell in cells} == {"none", "lrm", "focal"}


def test_the_distillation_study_is_the_bundled_detectors_recipe_with_terms_of_one_weight() -> None:
    single = load_recipe(FOLDER / "bccd_thundernet_snet49.toml")
    cells = recipes(FOLDER / "bccd_distillation_study.toml")
    for cell in cells:
        taught = {"teacher": cell["teacher"], "terms": cell["terms"], "training": cell["training"]}
        assert cell == single | taught
        own = {key: value for key, value in cell["training"].items() if key != "seed"}  # type: ignore[attr-defined]
        assert own | {"output": ""} == single["training"] | {"output": ""}  # type: ignore[operator]
    parsed = [DetectorRecipe.parse(cell) for cell in cells]
    assert sorted({"+".join(cell.terms) for cell in parsed}) == ["bdd", "bdd+mimic", "dkd", "kd", "mimic"]
    assert {term.weight for cell in parsed for term in cell.terms.values()} == {1.0}
    teacher = load_detector(REPOSITORY / "server" / "assets" / "detector")
    assert {cell.teacher.path for cell in parsed if cell.teacher} == {"server/assets/detector"}
    assert set(teacher.config.class_names) == {"Platelets", "RBC", "WBC"}


def test_small_recipes_build_small_networks() -> None:
    recipe = DetectorRecipe.parse(load_recipe(FOLDER / "bccd_thundernet_snet49.toml"))
    model, config = build_model(recipe, DetectionSource(("Platelets", "RBC", "WBC"), (), 0))
    assert config.head.anchors.num_per_cell == 21  # type: ignore[union-attr]
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_100_000


def test_the_bundled_detectors_study_is_its_recipe_with_three_seeds() -> None:
    single = load_recipe(FOLDER / "bccd_thundernet_snet49.toml")
    cells = recipes(FOLDER / "bccd_study.toml")
    assert len(cells) == 3
    for seed, cell in enumerate(cells):
        output = {"output": f"runs/bccd_study/thundernet_snet49/seed_{seed}", "seed": seed}
        assert cell == single | {"training": single["training"] | output}  # type: ignore[operator]


def test_the_study_of_own_images_is_their_recipe_twice_with_fewer_steps() -> None:
    single = load_recipe(FOLDER / "own_images.toml")
    cells = recipes(FOLDER / "own_images_study.toml")
    for cell, start in zip(cells, (None, "server/assets/detector"), strict=True):
        parsed = DetectorRecipe.parse(cell)
        model, data, training = (cell[table] | {} for table in ("model", "data", "training"))  # type: ignore[operator]
        assert model.pop("start_from", None) == start
        assert model | {"licence": "yours"} == single["model"]
        assert data | {"source": ""} == single["data"] | {"source": ""}  # type: ignore[operator]
        own = {key: training[key] for key in ("steps", "evaluate_every", "output", "seed", "threads")}
        assert training == single["training"] | own  # type: ignore[operator]
        assert 4 * parsed.training.steps == DetectorRecipe.parse(single).training.steps
        others = {table: values for table, values in cell.items() if table not in ("model", "data", "training")}
        assert others == {table: single[table] for table in others}
