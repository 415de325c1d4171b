"""Low-bit linear modules on torch's own operators: what serves int8 and int4 where the native kernels cannot.

One row costs about 1.4 times as much as with the native kernels, sixteen rows 4 to 5 times (docs/bench), and a row's
result depends on how many stand beside it. int4 has our codes and scales (rounded to bf16); int8 has one scale for each
output, which is the only form torch multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.linear_lowbit.reference import quantise

_INT4_GROUPS = (32, 64, 128)
_INT4_OUTPUTS = 16  # torch's int4 product takes outputs in multiples of this
_INT8_INPUTS = 32  # its int8 product takes inputs in multiples of this


class StockLinear(nn.Module):
    """A linear layer held in 4 or 8 bits: x [..., in] -> [..., out] in x's type, computed in bf16."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int, group_size: int) -> None:
        """weight [out, in], quantised here. Raises ValueError for a shape that torch's operator does not take."""
        super().__init__()
        if not fits(weight, bits, group_size):
            raise ValueError(f"torch has no {bits}-bit product for a weight {list(weight.shape)}, group {group_size}")
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size = bits, group_size
        whole = quantise(weight, bits, group_size if bits == 4 else self.in_features)
        if bits == 4:
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.codes.to(torch.int32), 1)
            scale = whole.scale.t().to(torch.bfloat16)
            scales = torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()
        else:
            codes = (whole.codes.to(torch.int16) - 128).to(torch.int8)
            scales = whole.scale[:, 0].to(torch.bfloat16)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x times the weight, plus the bias."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        out: Tensor
        if self.bits == 4:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group_size, self.scales)
        else:
            out = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def fits(weight: Tensor, bits: int, group_size: int) -> bool:
    """Whether torch has a product for this weight [out, in]."""
    out_features, in_features = weight.shape
    if bits == 4:
        return group_size in _INT4_GROUPS and in_features % group_size == 0 and out_features % _INT4_OUTPUTS == 0
    return bits == 8 and in_features % _INT8_INPUTS == 0


def replace_linears(module: nn.Module, bits: int, group_size: int = 32) -> None:
    """Puts a `StockLinear` in the place of every `nn.Linear` below `module` that fits; the others stay as they are."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and fits(child.weight, bits, group_size):
                setattr(parent, name, StockLinear(child.weight.detach(), child.bias, bits, group_size))
