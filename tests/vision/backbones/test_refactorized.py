"""Whole backbones with refactored depthwise layers."""

import pytest
import torch

from kernels.diagonalwise import DiagonalwiseConv2d, refactorize
from vision.backbones import create_backbone
from vision.backbones.complexity import count


@pytest.mark.parametrize("name", ["snet49", "menet_228_12x1_g3", "fd_mobilenet_x0_25"])
def test_same_function_and_same_counted_size(name: str) -> None:
    torch.manual_seed(0)
    model = create_backbone(name, 4).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    size, keys = count(model, 64), list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        refactorize(model)
        assert any(isinstance(layer, DiagonalwiseConv2d) for layer in model.modules())
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    assert count(model, 64) == size
    assert list(model.state_dict()) == keys
