"""ThunderNet on the backbones it was published with."""

import pytest
import torch

from vision.backbones import create_backbone
from vision.detection import ThunderNet


@pytest.mark.parametrize(
    ("name", "num_parameters"), [("snet49", 1_154_235), ("snet146", 1_880_283), ("snet535", 4_666_891)]
)
def test_parameters_are_the_published_count(name: str, num_parameters: int) -> None:
    """COCO's 80 classes; the backbone's own classifier does not belong to a detector and is dropped."""
    model = ThunderNet(create_backbone(name), 80)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert not any("head." in key for key in model.state_dict())


def test_it_answers_for_an_image() -> None:
    torch.manual_seed(0)
    model = ThunderNet(create_backbone("snet49"), 3).eval()
    with torch.inference_mode():
        (found,) = model(torch.randn(1, 3, 320, 320))
    assert found.boxes.shape[1] == 4
    assert len(found.boxes) == len(found.scores)
