import pytest
import torch
from torch import nn

from kernels.linear_lowbit.reference import quantise
from kernels.linear_lowbit.stock import StockLinear, replace_linears


@pytest.mark.parametrize(("bits", "group", "bound"), [(4, 32, 0.004), (4, 128, 0.004), (8, 32, 0.006)])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_stock_products_stay_near_the_quantised_weight(bits: int, group: int, bound: float, rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(48, 256) * 0.05, torch.randn(48), torch.randn(2, rows, 256).bfloat16()
    layer = StockLinear(weight, bias, bits, group)
    kept = quantise(weight, bits, group if bits == 4 else 256).dequantise()
    wanted = x.float() @ kept.T + bias
    y = layer(x)
    assert y.shape == (2, rows, 48) and y.dtype == torch.bfloat16
    assert (y.float() - wanted).norm() < bound * wanted.norm()


def test_layers_that_do_not_fit_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(64, 32), nn.Sequential(nn.Linear(64, 30), nn.Linear(48, 32)), nn.ReLU())
    replace_linears(module, 4)
    kinds = [type(part) for part in (module[0], module[1][0], module[1][1])]
    assert kinds == [StockLinear, nn.Linear, nn.Linear]
    with pytest.raises(ValueError, match="no 4-bit product"):
        StockLinear(torch.zeros(30, 64), None, 4, 32)
