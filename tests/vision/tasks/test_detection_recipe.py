"""What a recipe says of mining reaches the network, and what would do nothing is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.training import RecipeError
from vision.detection.boxes import nms
from vision.mining import OHEM
from vision.tasks.detection_recipe import DetectorRecipe

Recipe = Callable[..., dict[str, Any]]


def test_a_miner_that_has_nothing_to_suppress_is_told_of(
    detector_recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    usual = DetectorRecipe.parse(detector_recipe(mining={"regions": "ohem"}))
    assert usual.suppresses_in_vain and "task.proposals_nms" in caplog.text
    caplog.clear()
    for changes in (
        {"mining": {"regions": "ohem"}, "task": {"proposals_nms": 0.9}},
        {"mining": {"regions": "ohem", "nms_threshold": 0.5}},
        {"mining": {"regions": "random"}},
    ):
        parsed = DetectorRecipe.parse(detector_recipe(**changes))
        assert not parsed.suppresses_in_vain
        assert parsed.task.budget.nms_threshold == changes.get("task", {}).get("proposals_nms", 0.7)
    assert not caplog.text
    with pytest.raises(RecipeError, match=r"task\.proposals_nms is 0"):
        DetectorRecipe.parse(detector_recipe(task={"proposals_nms": 0.0}))


@pytest.mark.parametrize(("mining", "message"), [
    ({"map": "random"}, 'ThunderNet draws its anchors at random without mining; set mining.map to "none"'),
    ({"background_weight": 0.0}, "background_weight is 0.0; it must be above 0"),
])  # fmt: skip
def test_mining_that_means_nothing_is_refused(detector_recipe: Recipe, mining: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DetectorRecipe.parse(detector_recipe(mining=mining))


def test_after_suppression_by_score_only_a_smaller_overlap_suppresses_by_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(400, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 20 + torch.rand(400, 2, generator=generator) * 20], dim=1)
    scores, losses = torch.rand(400, generator=generator), torch.rand(400, generator=generator)

    def mined(proposals_nms: float) -> tuple[int, int]:
        kept = nms(boxes, scores, proposals_nms)
        labels = torch.zeros(len(kept), dtype=torch.long)
        chosen = OHEM(400, nms_threshold=0.7)(losses[kept], torch.zeros(len(kept)), boxes[kept], labels, 1.0)
        return len(kept), len(chosen)

    proposals, chosen = mined(0.7)
    assert chosen == proposals
    proposals, chosen = mined(0.9)
    assert chosen < proposals
