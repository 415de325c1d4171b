import dataclasses
import json

import pytest
import torch

from vision.backbones.preprocessing import BGR_255, IMAGENET, Normalization, Preprocessing


def test_imagenet_constants() -> None:
    grey = torch.full((2, 3, 1, 1), 0.5)
    expected = torch.tensor([(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225])
    torch.testing.assert_close(IMAGENET(grey)[1].flatten(), expected)


def test_bgr_255_swaps_and_scales() -> None:
    pixel = torch.tensor([1.0, 0.5, 0.0]).reshape(3, 1, 1)
    torch.testing.assert_close(BGR_255(pixel).flatten(), torch.tensor([0.0, 127.5, 255.0]))


def test_json_round_trip() -> None:
    values = Preprocessing(64, 72, BGR_255)
    assert Preprocessing.from_json(json.loads(json.dumps(dataclasses.asdict(values)))) == values


def test_impossible_constants_are_refused() -> None:
    with pytest.raises(ValueError, match="channel_order is 'gbr'; allowed are rgb, bgr"):
        Normalization(channel_order="gbr")
    with pytest.raises(ValueError, match="std above 0"):
        Normalization(std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="at most resize 100"):
        Preprocessing(image_size=224, resize=100)
