import dataclasses
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kernels.losses import forward_kl
from kernels.training import RecipeError, TrainingReport, callbacks
from vision.backbones import create_backbone
from vision.backbones.preprocessing import Normalization
from vision.detection.checkpoint import load_detector, save_detector
from vision.detection.detector import DetectorConfig, build_detector
from vision.detection.rpn import AnchorGrid
from vision.detection.thundernet import ThunderNet, ThunderNetConfig
from vision.detection.thundernet_loss import ThunderNetLoss
from vision.distillation.detector import DetectorTeacher, load_detector_teacher, places
from vision.distillation.teacher import TeacherError
from vision.distillation.terms import CorrelationTerm, DecoupledTerm, KDTerm, MimicTerm, parse_terms
from vision.mining import AllRegions
from vision.tasks.detection import DetectionTask, train_detector
from vision.tasks.detection_recipe import DetectorRecipe, build_model

Recipe = Callable[..., dict[str, Any]]
HEAD = ThunderNetConfig(anchors=AnchorGrid(scales=(24, 36, 52), ratios=(1.0,)))
CLASSES = ("disc", "square")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "plot", lambda *_: None)


def network(seed: int, backbone: str = "fd_mobilenet_x0_25") -> ThunderNet:
    torch.manual_seed(seed)
    detector = ThunderNet(create_backbone(backbone), len(CLASSES), HEAD)
    torch.nn.init.normal_(detector.class_logits.weight, std=10)  # a fresh detector calls everything alike
    return detector


def saved(folder: Path, **changes: Any) -> Path:
    plain = DetectorConfig("thundernet", "fd_mobilenet_x0_25", CLASSES, image_size=96, head=HEAD)
    config = dataclasses.replace(plain, **changes)
    torch.manual_seed(1)
    save_detector(build_detector(config), config, folder)
    return folder


def batch() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(5)
    boxes = [torch.tensor([[10.0, 10, 50, 50]]), torch.tensor([[20.0, 30, 80, 90], [0, 0, 30, 30]])]
    return torch.randn(2, 3, 96, 96), boxes, [torch.tensor([0]), torch.tensor([1, 0])]


def taught(student: ThunderNet, teacher: DetectorTeacher) -> dict[str, Tensor]:
    inputs, boxes, labels = batch()
    torch.manual_seed(9)
    return ThunderNetLoss(AllRegions())(student, inputs, boxes, labels, 0.5, teacher.lesson(inputs))


def test_a_student_equal_to_its_teacher_learns_nothing_from_it() -> None:
    student = network(0).eval()
    terms = {"kd": KDTerm(weight=1.0, temperature=2.0), "mimic": MimicTerm(weight=1.0)}
    losses = taught(student, DetectorTeacher(network(0), terms))
    assert {"rpn_classification", "rcnn_localization", "kd", "mimic"} <= losses.keys()
    for name in terms:
        assert abs(losses[name].item()) < 1e-6
        assert taught(student, DetectorTeacher(network(1), terms))[name].item() > 1e-6


def test_the_terms_are_those_of_the_regions_that_train() -> None:
    student, other = network(0, "snet49").eval(), network(1)
    terms = {
        "kd": KDTerm(weight=1.0, temperature=3.0),
        "dkd": DecoupledTerm(weight=1.0),
        "mimic": MimicTerm(weight=1.0),
    }
    inputs, boxes, labels = batch()
    seen: dict[str, Any] = {}
    teacher = DetectorTeacher(other, terms)

    def spy(maps: Any, regions: Any, logits: Tensor, own: Tensor) -> dict[str, Tensor]:
        seen.update(maps=maps, regions=regions, logits=logits, labels=own)
        return teacher.teach(inputs, maps, regions, logits, own)

    torch.manual_seed(9)
    losses = ThunderNetLoss(AllRegions())(student, inputs, boxes, labels, 0.5, spy)
    with torch.no_grad():
        maps = other.eval().dense(inputs)
        logits, _ = other.classify(maps, seen["regions"])
    expected = forward_kl(seen["logits"], logits, 3.0).mean()
    assert torch.allclose(losses["kd"], expected, rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(seen["maps"].f_cem, maps.f_cem, dim=1)
    assert torch.allclose(losses["mimic"], (2 - 2 * cosine).mean(), atol=1e-5)
    assert len(seen["labels"]) == sum(map(len, seen["regions"]))
    assert not any(parameter.requires_grad for parameter in other.parameters())
    learned = torch.autograd.grad(losses["mimic"], list(student.context_enhancement.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in learned)


def test_places_are_rows_of_channels() -> None:
    feature_map = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert places(feature_map)[5].tolist() == feature_map[1, :, 0, 1].tolist()


def test_no_region_to_train_on_is_no_loss() -> None:
    teacher = DetectorTeacher(network(1), {"kd": KDTerm(weight=1.0, temperature=2.0), "mimic": MimicTerm(weight=1.0)})
    student, (inputs, _, _) = network(0).eval(), batch()
    empty = [torch.zeros(0, 4)] * 2
    maps = student.dense(inputs)
    logits, _ = student.classify(maps, empty)
    losses = teacher.teach(inputs, maps, empty, logits, torch.zeros(0, dtype=torch.long))
    assert losses["kd"].item() == 0 and losses["mimic"].item() > 0


def run(recipe: dict[str, Any], **kwargs: Any) -> TrainingReport:
    return train_detector(recipe, console=Console(file=StringIO()), **kwargs)


def lesson_recipe(recipe: Recipe, folder: Path, terms: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return recipe(**changes) | {"teacher": {"path": str(saved(folder))}, "terms": terms}


def test_a_recipe_with_a_teacher_trains_and_saves_the_student_alone(detector_recipe: Recipe, tmp_path: Path) -> None:
    terms = [{"kind": "bdd", "weight": 0.5}, {"kind": "mimic", "weight": 2.0, "warmup_steps": 2}]
    report = run(lesson_recipe(detector_recipe, tmp_path / "teacher", terms))
    assert report.finished
    assert {"bdd", "mimic", "rpn_classification", "map50"} <= report.final.keys()
    assert load_detector(Path(report.checkpoint)).model.state_dict().keys() == network(0).state_dict().keys()


def test_terms_are_weighed_and_warm_up(detector_recipe: Recipe, tmp_path: Path) -> None:
    terms = [{"kind": "mimic", "weight": 2.0, "warmup_steps": 4}]
    recipe = lesson_recipe(detector_recipe, tmp_path / "teacher", terms)
    options = DetectorRecipe.parse(recipe)
    source = options.data.open_train()
    torch.manual_seed(0)
    model, config = build_model(options, source)
    teacher = load_detector_teacher(tmp_path / "teacher", config, options.terms)
    task = DetectionTask(model, options, teacher).train()
    images, boxes = torch.randint(256, (4, 3, 96, 96), dtype=torch.uint8), torch.tensor([[[8.0, 8, 50, 50]]] * 4)
    args = (
        boxes,
        torch.zeros(4, 1, dtype=torch.long),
        torch.zeros(4, 1, dtype=torch.bool),
        torch.zeros(1, dtype=torch.long),
    )
    for step in (1, 2):
        losses = task(images, *args)
        parts = {name: value for name, value in losses.items() if name not in ("loss", "mimic")}
        expected = sum(parts.values()) + 2.0 * step / 4 * losses["mimic"]
        assert torch.allclose(losses["loss"], expected, atol=1e-5)
    assert "mimic" not in task.eval()(images, *args)


@pytest.mark.parametrize(("changes", "match"), [
    ({"class_names": ("disc", "ring")}, "finds disc, ring; the student's data has disc, square"),
    ({"normalization": Normalization((0.5,) * 3, (0.5,) * 3)}, "other normalisation constants"),
    ({"head": ThunderNetConfig(depth=3)}, "147 channels, the student's 245"),
])  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused(
    detector_recipe: Recipe, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    folder = saved(tmp_path / "teacher", **changes)
    recipe = detector_recipe() | {
        "teacher": {"path": str(folder)},
        "terms": [{"kind": "kd", "weight": 1, "temperature": 2}],
    }
    with pytest.raises(TeacherError, match=match):
        run(recipe)


def test_one_stage_detectors_neither_teach_nor_learn(detector_recipe: Recipe, tmp_path: Path) -> None:
    terms = [{"kind": "kd", "weight": 1.0, "temperature": 2.0}]
    yolo = {"architecture": "yolo_v2", "anchors": [[0.8, 0.8]]}
    with pytest.raises(TeacherError, match="two ThunderNets"):
        run(lesson_recipe(detector_recipe, tmp_path / "teacher", terms, model=yolo))


def test_a_teacher_of_nonsense_is_found_out() -> None:
    broken = network(1)
    torch.nn.init.constant_(broken.class_logits.bias, float("nan"))
    with pytest.raises(TeacherError, match="not finite"):
        taught(network(0), DetectorTeacher(broken, {"mimic": MimicTerm(weight=1.0)}))


def test_recipes_that_are_refused(detector_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="belong together"):
        run(detector_recipe() | {"terms": [{"kind": "mimic", "weight": 1.0}]})
    with pytest.raises(RecipeError, match="cckd relate whole images"):
        DetectorTeacher(network(0), {"cckd": CorrelationTerm(weight=1.0)})
    with pytest.raises(RecipeError, match="kind is 'fitnet'"):
        parse_terms([{"kind": "fitnet", "weight": 1.0}])
