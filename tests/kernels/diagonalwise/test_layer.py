import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonalwise import DiagonalwiseConv2d, MaskedDiagonalwiseConv2d, NotDepthwiseError
from kernels.diagonalwise.layer import DepthwiseConv2d, default_channels_per_group
from kernels.diagonalwise.reference import compact_weight, depthwise_conv2d, diagonal_mask, expand_weight

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
CHANNELS = [1, 2, 31, 37, 57, 124, 228]


def depthwise(channels: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=bias)


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient, and filter gradient as [C, 1, k, k]."""
    x = x.clone().requires_grad_()
    y = layer(x)
    dx, dw = torch.autograd.grad(y, [x, layer.weight], dy)
    return y.detach(), dx, dw if dw.shape[1] == 1 else compact_weight(dw)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("channels", CHANNELS[1:])
@pytest.mark.parametrize("kind", ["default", "m8", "m32", "dense", "masked"])
def test_output_and_gradients_equal_native(
    dtype: torch.dtype, stride: int, kernel: int, channels: int, kind: str
) -> None:
    torch.manual_seed(channels + kernel + stride)
    native = depthwise(channels, kernel, stride).to(dtype)
    m = {"default": None, "m8": 8, "m32": 32, "dense": channels, "masked": None}[kind]
    layer = (MaskedDiagonalwiseConv2d if kind == "masked" else DiagonalwiseConv2d).replacing(
        native, channels_per_group=m
    )
    x = torch.randn(2, channels, 9, 7, dtype=dtype)
    dy = torch.randn_like(native(x))
    for ours, expected in zip(results(layer, x, dy), results(native, x, dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("channels", CHANNELS)
def test_reference_equals_native(stride: int, kernel: int, channels: int) -> None:
    x = torch.randn(2, channels, 8, 11, dtype=torch.float64, requires_grad=True)
    w = torch.randn(channels, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    ours = depthwise_conv2d(x, w, stride, kernel // 2)
    native = F.conv2d(x, w, None, stride, kernel // 2, groups=channels)
    dy = torch.randn_like(native)
    torch.testing.assert_close(ours, native, rtol=0, atol=1e-10)
    for mine, theirs in zip(
        torch.autograd.grad(ours, [x, w], dy), torch.autograd.grad(native, [x, w], dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("m", [2, 4])
def test_gradients_by_finite_differences(m: int) -> None:
    torch.manual_seed(0)
    layer = DiagonalwiseConv2d(6, 3, 2, 1, channels_per_group=m).double()
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias))


@pytest.mark.parametrize(("channels", "m"), [
    (32, 32), (64, 32), (57, 19), (114, 19), (228, 19), (66, 22), (132, 22), (264, 24), (60, 30), (120, 30), (124, 31),
    (248, 31), (496, 31), (37, 1), (24, 24),
])  # fmt: skip
def test_default_group_is_the_largest_divisor(channels: int, m: int) -> None:
    assert default_channels_per_group(channels) == m
    assert DiagonalwiseConv2d(channels, 3).channels_per_group == m


def test_expanded_weight_is_diagonal_in_each_group() -> None:
    weight = torch.randn(6, 1, 3, 3)
    expanded = expand_weight(weight, 3)
    assert expanded.shape == (6, 3, 3, 3)
    for c in range(6):
        for j in range(3):
            assert torch.equal(expanded[c, j], weight[c, 0] if j == c % 3 else torch.zeros(3, 3))
    assert torch.equal(compact_weight(expanded), weight)
    assert torch.equal(expanded * diagonal_mask(6, 3), expanded)


@pytest.mark.parametrize("kind", [DiagonalwiseConv2d, MaskedDiagonalwiseConv2d])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(kind: type[DepthwiseConv2d], bias: bool) -> None:
    native, other = depthwise(12, 5, 2, bias), depthwise(12, 5, 2, bias)
    layer = kind.replacing(depthwise(12, 5, 2, bias), channels_per_group=4)
    layer.load_state_dict(native.state_dict())
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in native.state_dict().items()}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, native.weight)
    x = torch.randn(1, 12, 8, 8)
    torch.testing.assert_close(layer(x), native(x))


def test_masked_form_stays_depthwise_while_it_trains() -> None:
    torch.manual_seed(0)
    native = depthwise(8).double()
    masked = MaskedDiagonalwiseConv2d.replacing(native, channels_per_group=4)
    twin = copy.deepcopy(native)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    for layer in (masked, twin):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(x) ** 2).mean().backward()
            optimizer.step()
    off_diagonal = masked.weight.detach() * (1 - masked.mask)
    assert off_diagonal.abs().max() == 0
    torch.testing.assert_close(compact_weight(masked.weight.detach()), twin.weight.detach(), rtol=0, atol=1e-12)


def test_masking_only_once_would_leak() -> None:
    """Why the masked form multiplies in every step: the raw off-diagonal gradient is larger than the diagonal one."""
    torch.manual_seed(0)
    x = torch.randn(8, 32, 10, 10, dtype=torch.float64)
    dense = expand_weight(torch.randn(32, 1, 3, 3, dtype=torch.float64), 32).requires_grad_()
    y = F.conv2d(x, dense, padding=1)
    (gradient,) = torch.autograd.grad(y, dense, torch.randn_like(y))
    diagonal = diagonal_mask(32, 32)
    assert (gradient * (1 - diagonal)).norm() > 3 * (gradient * diagonal).norm()


def test_parameters_are_not_inflated() -> None:
    native = depthwise(64)
    compact = DiagonalwiseConv2d.replacing(native)
    assert compact.weight is native.weight
    assert sum(p.numel() for p in compact.parameters()) == 64 * 9
    assert [name for name, _ in MaskedDiagonalwiseConv2d.replacing(native).named_parameters()] == ["weight"]


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 2, "dilation": 2}, {"padding": (1, 2)}])
def test_any_padding_and_dilation(options: dict[str, object]) -> None:
    native = nn.Conv2d(10, 10, 3, groups=10, **options)
    x = torch.randn(1, 10, 9, 9)
    torch.testing.assert_close(DiagonalwiseConv2d.replacing(native, channels_per_group=4)(x), native(x))


def test_mixed_precision() -> None:
    native = depthwise(16)
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = DiagonalwiseConv2d.replacing(native)(x), native(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 4, 1, groups=4),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
])  # fmt: skip
def test_other_convolutions_are_refused(layer: nn.Conv2d) -> None:
    with pytest.raises(NotDepthwiseError, match="is not depthwise"):
        DiagonalwiseConv2d.replacing(layer)


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="channels_per_group is 0"):
        DiagonalwiseConv2d(8, 3, channels_per_group=0)
    with pytest.raises(ValueError, match="channels_per_group is 5; it must divide the 8 channels"):
        MaskedDiagonalwiseConv2d(8, 3, channels_per_group=5)
