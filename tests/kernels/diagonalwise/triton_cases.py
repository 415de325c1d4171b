"""The Triton kernels against the reference; ``test_triton.py`` runs this file in a process of its own."""

import pytest
import torch
from torch import nn

from kernels.diagonalwise import refactorize
from kernels.diagonalwise.reference import depthwise_conv2d as reference
from kernels.diagonalwise.replacement import replace_layers
from kernels.diagonalwise.triton import PIXELS_PER_PROGRAM, TritonDepthwiseConv2d, depthwise_conv2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


def assert_equals_reference(x: torch.Tensor, w: torch.Tensor, stride: int, padding: int) -> None:
    tolerance = TOLERANCE[x.dtype]
    x, w = x.to(DEVICE).requires_grad_(), w.to(DEVICE).requires_grad_()
    ours, expected = depthwise_conv2d(x, w, stride, padding), reference(x.double(), w.double(), stride, padding)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(ours, [x, w], dy), torch.autograd.grad(expected, [x, w], dy.double())
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype == x.dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kernel", "stride", "dtype"), [
    (3, 1, torch.float64), (3, 2, torch.float64), (5, 1, torch.float64), (5, 2, torch.float64),
    (3, 2, torch.float32), (3, 1, torch.bfloat16),
])  # fmt: skip
def test_output_and_gradients(kernel: int, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_equals_reference(
        torch.randn(2, 3, 7, 9, dtype=dtype), torch.randn(3, 1, kernel, kernel, dtype=dtype), stride, kernel // 2
    )


@pytest.mark.parametrize("channels", [1, 57])
def test_channel_counts(channels: int) -> None:
    assert_equals_reference(torch.randn(1, channels, 4, 4).double(), torch.randn(channels, 1, 3, 3).double(), 2, 1)


@pytest.mark.parametrize(("side", "padding", "stride"), [(20, 1, 1), (3, 0, 1), (1, 1, 2), (6, 0, 2)])
def test_edges(side: int, padding: int, stride: int) -> None:
    """More pixels than one program takes, no padding, a single pixel, and input pixels no output reads."""
    assert side < 20 or side * side > PIXELS_PER_PROGRAM
    assert_equals_reference(torch.randn(2, 2, side, side).double(), torch.randn(2, 1, 3, 3).double(), stride, padding)


def test_strided_input_and_repeatable_gradients() -> None:
    x = torch.randn(2, 6, 6, 4, dtype=torch.float64).permute(0, 3, 1, 2)
    assert_equals_reference(x, torch.randn(4, 1, 3, 3, dtype=torch.float64), 1, 1)
    w = torch.randn(4, 1, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    x = x.to(DEVICE)
    first, second = (torch.autograd.grad(depthwise_conv2d(x, w, 1, 1).sum(), w)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_layer_takes_the_place_of_a_depthwise_one() -> None:
    torch.manual_seed(0)
    native = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.Conv2d(4, 2, 1)).to(DEVICE)
    x = torch.randn(1, 4, 6, 6, device=DEVICE)
    expected = native(x)
    model = replace_layers(native, TritonDepthwiseConv2d.replacing)
    assert isinstance(model[0], TritonDepthwiseConv2d)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(refactorize(model)(x), expected)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": "same"}, {"padding": (1, 0)}])
def test_other_geometries_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be square, the dilation 1"):
        TritonDepthwiseConv2d.replacing(nn.Conv2d(4, 4, 3, groups=4, **options))
