"""Heads on kept regions: all at once as if each were alone, and each as the detector's own loss trains it."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from kernels.training import RecipeError
from kernels.training.paired_report import analyse
from kernels.training.study import FINISHED, expand, overlay
from vision.data.detection import DetectionDataOptions
from vision.detection.boxes import encode_boxes
from vision.detection.checkpoint import load_detector, save_detector
from vision.detection.detector import DetectorConfig, build_detector
from vision.detection.rpn import AnchorGrid, ProposalBudget
from vision.detection.thundernet import REGION_STDS, ThunderNetConfig
from vision.detection.yolo_v2 import YOLOv2Config
from vision.mining import OHEM, AllRegions
from vision.tasks import region_heads
from vision.tasks.region_heads import Heads, RegionHeadsTask, keep_regions, train_heads

Recipe = Callable[..., dict[str, Any]]
CLASSES = ("disc", "square")
COMPARED = {"claim": "x", "variant": "ohem", "against": "none", "figure": "map60", "smallest_effect": 0.01}


@pytest.fixture
def recipe(shapes_folder: Path, tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    head = ThunderNetConfig(anchors=AnchorGrid(scales=(24, 36, 52), ratios=(1.0,)), test_budget=ProposalBudget(60, 20))
    config = DetectorConfig("thundernet", "plain_w6", CLASSES, 96, head=head)
    save_detector(build_detector(config), config, tmp_path / "detector")
    return {
        "study": {
            "seeds": [0, 1, 2],
            "variants": {"none": {"mining": {"regions": "none"}}, "ohem": {"mining": {"regions": "ohem"}}},
            "comparisons": [COMPARED],
        },
        "frozen": {"detector": str(tmp_path / "detector"), "proposals_before": 60, "proposals_after": 30},
        "head": {"width": 8},
        "mining": {"regions_per_image": 12},
        "data": {"kind": "voc", "root": str(shapes_folder), "image_size": 96},
        "training": {
            "output": "", "steps": 5, "batch_size": 2, "learning_rate": 1e-2, "clip_norm": 0.0, "log_every": 5,
            "threads": 1,
        },
    }  # fmt: skip


def test_every_cell_is_trained_as_if_it_were_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole, console = tmp_path / "whole", Console(file=StringIO())
    outcomes = train_heads(expand(recipe, whole), whole, console)
    assert [outcome.status for outcome in outcomes] == [FINISHED] * 6
    assert analyse(recipe, expand(recipe, whole)).seeds == (0, 1, 2)
    alone = overlay(recipe, {"study": {"seeds": [1], "comparisons": []}})
    alone["study"]["variants"] = {"ohem": recipe["study"]["variants"]["ohem"]}
    one = tmp_path / "one"
    train_heads(expand(alone, one), one, console)
    final = [json.loads((folder / "ohem/seed_1/report.json").read_text())["final"] for folder in (whole, one)]
    assert set(final[0]) == {"map50", "map60", "map70"}
    assert final[0] == pytest.approx(final[1], abs=1e-4)


def test_the_loss_equals_a_loop_over_seeds_and_images(recipe: dict[str, Any]) -> None:
    """Slow beside fast: each seed's weights in plain layers, each image's regions mined and averaged by hand."""
    loaded = load_detector(Path(recipe["frozen"]["detector"]))
    data = DetectionDataOptions(**recipe["data"])
    kept = keep_regions(loaded, data.open_train(), data, ProposalBudget(60, 30, 0.9))
    miner, order = OHEM(6), torch.tensor([[0, 3], [5, 1]])
    heads = Heads(2, [7, 8], kept[0].inputs.shape[1], 8, len(CLASSES))
    task = RegionHeadsTask(heads, [AllRegions(), miner], kept, steps=10)
    expected = torch.zeros(())
    for seed, images in enumerate(order.tolist()):
        parts = []
        for image in (kept[place] for place in images):
            hidden = (image.inputs @ heads.weights["hidden"][1, seed]).relu()
            logits, deltas = hidden @ heads.weights["classes"][1, seed], hidden @ heads.weights["deltas"][1, seed]
            c = functional.cross_entropy(logits, image.labels, reduction="none")
            goals = encode_boxes(image.answers, image.boxes, REGION_STDS)
            g = functional.smooth_l1_loss(deltas, goals, reduction="none").sum(dim=1).where(image.labels > 0, 0.0)
            rows = miner(c, g, image.boxes, image.labels, 0.0)
            parts.append((c + 2 * g)[rows])
        expected = expected + torch.cat(parts).mean()
    seen = tuple(values[order].flatten(1, 2) for values in (task.inputs, task.labels, task.goals))
    torch.testing.assert_close(task.loss(1, miner, order, *seen), expected)
    loss = task(order)["loss"]
    loss.backward()
    assert all(weights.grad is not None and weights.grad.abs().sum() > 0 for weights in heads.weights.values())


def test_finished_studies_stay_and_what_ties_heads_together_is_refused(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    train_heads(expand(recipe, folder), folder, Console(file=StringIO()))
    monkeypatch.setattr(region_heads, "train_all", lambda *_: pytest.fail("trained again"))
    assert {outcome.status for outcome in train_heads(expand(recipe, folder), folder)} == {FINISHED}
    wrong = overlay(recipe, {"study": {"variants": {"ohem": {"head": {"width": 4}}}}})
    with pytest.raises(RecipeError, match=r"ohem changes \[head\], which all cells of one run share"):
        train_heads(expand(wrong, tmp_path), tmp_path)
    config = DetectorConfig("yolo_v2", "plain_w6", CLASSES, 96, head=YOLOv2Config(width=8))
    save_detector(build_detector(config), config, tmp_path / "yolo")
    with pytest.raises(RecipeError, match="yolo_v2; only thundernet has a second stage"):
        train_heads(expand(overlay(recipe, {"frozen": {"detector": str(tmp_path / "yolo")}}), tmp_path), tmp_path)
