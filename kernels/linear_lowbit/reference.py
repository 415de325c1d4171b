"""Low-bit linear layers in plain torch: what the native kernels compute, written to be read.

Letters: N rows of activations, O output features, I input features, G = I / group_size groups of a weight row.

A weight group (group_size consecutive inputs of one output) is stored as unsigned codes of `bits` bits with one fp16 or
fp32 scale: weight = scale * (code - 2^(bits - 1)), or with zero points (a minimum per group) scale * code + minimum, or
with a table of sixteen signed bytes scale * table[code].
Activations are quantised per row and span (32 inputs, or a weight group where that is longer) to signed bytes:
value = scale * byte, scale = largest magnitude / 127. Products of codes and bytes are summed exactly, as integers, over
a group, then in fp32 over the groups of a span, then over spans.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATION_SPAN = 32  # inputs that share an activation scale, where the weight's groups are not longer
_TINY = 1e-30  # spans below it are zero: 127 / largest would overflow
_CHUNK_ELEMENTS = 1 << 16  # weights searched at once: some eight temporaries of it live at a time, in L2


@dataclass(frozen=True)
class QuantisedWeight:
    """Codes uint8 [O, I]; scale fp16 or fp32 [O, G]; minimum of the scale's type [O, G], or None for symmetric codes.

    `table`: what the sixteen 4-bit codes stand for before their scale, signed bytes; None: the code less 2^(bits - 1).
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    bits: int
    group_size: int
    table: tuple[int, ...] | None = None

    def levels(self) -> Tensor:
        """What the codes stand for before their scale: fp32 [O, I], whole numbers."""
        if self.table is not None:
            return torch.tensor(self.table, dtype=torch.float32, device=self.codes.device)[self.codes.long()]
        codes = self.codes.float()
        return codes if self.minimum is not None else codes - 2 ** (self.bits - 1)

    def dequantise(self) -> Tensor:
        """The weights that the codes stand for, fp32 [O, I]; the product is rounded, then the sum with the minimum."""
        values = self.levels().reshape(len(self.codes), -1, self.group_size) * self.scale.float().unsqueeze(-1)
        return (values if self.minimum is None else values + self.minimum.float().unsqueeze(-1)).flatten(1)


def quantise(
    weight: Tensor, bits: int, group_size: int, *, zero_point: bool = False, importance: Tensor | None = None
) -> QuantisedWeight:
    """Codes and scales of weight [O, I] with the least squared error among a search over clipping ranges.

    Every candidate range gives codes; the scale (and minimum) is then refitted to those codes by least squares.
    `importance` [I] weighs the error of each input, e.g. the mean square of its activations on a calibration text.
    The search is ours.
    """
    out_features, in_features = weight.shape
    groups = weight.detach().float().reshape(-1, group_size)
    cost = torch.ones(in_features) if importance is None else importance.float().clamp_min(_TINY)
    cost = cost.reshape(-1, group_size)
    rows = max(1, _CHUNK_ELEMENTS // in_features) * (in_features // group_size)
    search = _search_with_minimum if zero_point else _search_symmetric
    parts = [search(piece, cost.repeat(len(piece) // len(cost), 1), bits) for piece in torch.split(groups, rows)]
    codes = torch.cat([part[0] for part in parts]).reshape(out_features, in_features)
    scale = torch.cat([part[1] for part in parts]).reshape(out_features, -1)
    minimum = torch.cat([part[2] for part in parts]).reshape(out_features, -1) if zero_point else None
    return QuantisedWeight(codes, scale, minimum, bits, group_size)


def _search_symmetric(groups: Tensor, cost: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups and cost [M, group_size] -> codes, scale [M, 1], unused minimum [M, 1]."""
    middle = 2 ** (bits - 1)
    low = -middle if bits == 4 else 1 - middle  # int8 stays symmetric, so that |code| * 127 * 2 fits 16 bits on AVX2
    # The largest value goes to the longer, negative end of the int4 range: the scale takes its sign.
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    divisors = torch.linspace(5.5, 9.0, 15) if bits == 4 else torch.linspace(121.0, 127.0, 4)
    best_scale, best_gain = torch.zeros_like(largest), torch.full_like(largest, -1.0)
    for divisor in divisors.tolist():
        inverse = torch.where(largest == 0, 0.0, -divisor / largest)
        codes = (groups * inverse).round_().clamp_(low, middle - 1)
        weighted = codes * cost
        dot, norm = (weighted * groups).sum(1, keepdim=True), (weighted * codes).sum(1, keepdim=True)
        gain = torch.where(
            norm > 0, dot * dot / norm, 0.0
        )  # error = sum of cost * weight^2 - gain, at scale = dot / norm
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, torch.where(norm > 0, dot / norm, 0.0), best_scale)
    scale = best_scale.half()
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    codes = (groups * inverse).round_().clamp_(low, middle - 1) + middle
    return codes.to(torch.uint8), scale, torch.zeros_like(scale)


def _search_with_minimum(groups: Tensor, cost: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups and cost [M, group_size] -> codes, scale [M, 1], minimum [M, 1]."""
    top = 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    total = cost.sum(1, keepdim=True)
    mean = (cost * groups).sum(1, keepdim=True) / total
    best = (torch.zeros_like(low), mean)
    best_error = torch.full_like(low, torch.inf)
    for shrink in torch.linspace(0.75, 1.0, 11).tolist():
        centre, reach = (low + high) / 2, (high - low) / 2 * shrink
        inverse = torch.where(reach > 0, top / (2 * reach), 0.0)
        codes = ((groups - centre + reach) * inverse).round_().clamp_(0, top)
        code_mean = (cost * codes).sum(1, keepdim=True) / total
        spread = (cost * (codes - code_mean).square()).sum(1, keepdim=True)
        slope = (cost * (codes - code_mean) * (groups - mean)).sum(1, keepdim=True)
        scale = torch.where(spread > 0, slope / spread, 0.0)
        minimum = mean - scale * code_mean
        error = (cost * (scale * codes + minimum - groups).square()).sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = (torch.where(better, scale, best[0]), torch.where(better, minimum, best[1]))
    scale, minimum = best[0].half(), best[1].half()
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    codes = ((groups - minimum.float()) * inverse).round_().clamp_(0, top)
    return codes.to(torch.uint8), scale, minimum


def quantise_activations(x: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """x fp32 [N, I] -> bytes int8 [N, I], scale fp32 [N, I / span].

    A span with NaN or infinity has scale NaN and bytes 0: the row's outputs are all NaN, other rows are untouched.
    """
    spans = x.reshape(len(x), -1, span)
    largest = spans.abs().amax(-1, keepdim=True)
    finite, used = largest.isfinite(), largest > _TINY
    inverse = torch.where(finite & used, 127.0 / largest, 0.0)
    values = torch.where(finite, spans * inverse, 0.0).round().to(torch.int8)
    scale = torch.where(finite, torch.where(used, largest / 127.0, 0.0), torch.nan)
    return values.flatten(1), scale.squeeze(-1)


def linear_integer(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """x fp32 [N, I] times the quantised weight: fp32 [N, O], through the integer sums that the native kernels take."""
    activation_span = max(ACTIVATION_SPAN, weight.group_size)
    values, activation_scale = quantise_activations(x, activation_span)
    levels = weight.levels().to(torch.float64)
    grouped = values.to(torch.float64).reshape(len(x), -1, weight.group_size)
    # float64 holds every integer sum exactly.
    dots = torch.einsum("ngi,ogi->gno", grouped, levels.reshape(len(levels), -1, weight.group_size)).float()
    sums = grouped.sum(-1).float()
    span_groups = activation_span // weight.group_size
    out = torch.zeros(len(x), len(weight.codes))
    for first in range(0, len(dots), span_groups):
        span = torch.zeros_like(out)
        for group in range(first, min(first + span_groups, len(dots))):
            span = torch.addcmul(span, dots[group], weight.scale[:, group].float())
            if weight.minimum is not None:
                span = torch.addcmul(span, sums[:, group, None], weight.minimum[:, group].float())
        out = torch.addcmul(out, span, activation_scale[:, first // span_groups, None])
    return out


def linear_float(x: Tensor, weight: Tensor) -> Tensor:
    """x fp32 [N, I] times weight [O, I] in bf16 (activations rounded to bf16 too) or fp32, summed in fp32: [N, O]."""
    return torch.nn.functional.linear(x.to(weight.dtype).float(), weight.float())
