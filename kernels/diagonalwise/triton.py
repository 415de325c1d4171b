"""Depthwise convolution as kernels of its own: what the refactorisation worked around, written down directly.

Letters: K kernel side, ACC the type sums are kept in. Images are read in NCHW order; other layouts are copied first.
Importing this file needs Triton; with TRITON_INTERPRET=1 set before, the kernels run on a CPU, slowly.
"""

# Triton types its kernels itself.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.diagonalwise.layer import DepthwiseConv2d

PIXELS_PER_PROGRAM = 256
MAX_SPLITS = 64


@triton.jit
def forward_kernel(
    x, weight, y, channels, height, width, out_height, out_width,
    K: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One block of output pixels of one channel of one image; axis 0 counts the planes, axis 1 the blocks."""
    plane = tl.program_id(0).to(tl.int64)
    channel = plane % channels
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < out_height * out_width
    row, column = pixels // out_width, pixels % out_width
    total = tl.zeros((BLOCK,), dtype=ACC)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            h, w = row * STRIDE + i - PADDING, column * STRIDE + j - PADDING
            valid = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            tap = tl.load(x + plane * height * width + h * width + w, mask=valid, other=0.0)
            total += tap.to(ACC) * tl.load(weight + channel * K * K + i * K + j).to(ACC)
    tl.store(y + plane * out_height * out_width + pixels, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def input_gradient_kernel(
    dy, weight, dx, channels, height, width, out_height, out_width,
    K: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One block of input pixels of one plane gathers the outputs it took part in."""
    plane = tl.program_id(0).to(tl.int64)
    channel = plane % channels
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < height * width
    row, column = pixels // width, pixels % width
    total = tl.zeros((BLOCK,), dtype=ACC)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            # Output (h, w) reads this pixel through tap (i, j) where stride * h = row + padding - i, so for w.
            h, w = row + PADDING - i, column + PADDING - j
            valid = inside & (h >= 0) & (w >= 0) & (h % STRIDE == 0) & (w % STRIDE == 0)
            h, w = h // STRIDE, w // STRIDE
            valid = valid & (h < out_height) & (w < out_width)
            part = tl.load(dy + plane * out_height * out_width + h * out_width + w, mask=valid, other=0.0)
            total += part.to(ACC) * tl.load(weight + channel * K * K + i * K + j).to(ACC)
    tl.store(dx + plane * height * width + pixels, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    x, dy, partial, images, channels, height, width, out_height, out_width,
    K: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """All taps of one channel over every SPLITS-th block of its output pixels, so x and dy are read about once.

    ``partial`` [SPLITS, C, K * K]; TAPS is K * K rounded up to a power of two.
    """
    channel, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    out_pixels = out_height * out_width
    taps = tl.arange(0, TAPS)
    i, j = taps // K, taps % K
    total = tl.zeros((TAPS, BLOCK), dtype=ACC)
    for start in range(split * BLOCK, images * out_pixels, splits * BLOCK):
        positions = start + tl.arange(0, BLOCK)
        inside = positions < images * out_pixels
        plane = (positions // out_pixels).to(tl.int64) * channels + channel
        pixel = positions % out_pixels
        gradient = tl.load(dy + plane * out_pixels + pixel, mask=inside, other=0.0).to(ACC)
        h = (pixel // out_width)[None, :] * STRIDE + i[:, None] - PADDING
        w = (pixel % out_width)[None, :] * STRIDE + j[:, None] - PADDING
        valid = inside[None, :] & (taps < K * K)[:, None] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        read = tl.load(x + plane[None, :] * height * width + h * width + w, mask=valid, other=0.0)
        total += read.to(ACC) * gradient[None, :]
    tl.store(partial + (split * channels + channel) * K * K + taps, tl.sum(total, axis=1), mask=taps < K * K)


class DepthwiseFunction(torch.autograd.Function):
    """Forward and both gradients by the kernels above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        """See ``depthwise_conv2d``."""
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        images, channels, height, width = x.shape
        k = weight.shape[-1]
        out_height, out_width = ((side + 2 * padding - k) // stride + 1 for side in (height, width))
        y = x.new_empty(images, channels, out_height, out_width)
        grid = (images * channels, triton.cdiv(out_height * out_width, PIXELS_PER_PROGRAM))
        forward_kernel[grid](
            x, weight, y, channels, height, width, out_height, out_width,
            K=k, STRIDE=stride, PADDING=padding, BLOCK=PIXELS_PER_PROGRAM, ACC=accumulator(x),
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients to the images and to the filters, each only if asked for."""
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = input_gradient(dy, weight, x, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(x, dy, weight, ctx.stride, ctx.padding) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


def accumulator(x: Tensor) -> Any:
    """Sums are kept in float32, or in float64 for float64."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def input_gradient(dy: Tensor, weight: Tensor, x: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient to ``x``, [B, C, H, W]."""
    dx = torch.empty_like(x)
    grid = (x.shape[0] * x.shape[1], triton.cdiv(x.shape[2] * x.shape[3], PIXELS_PER_PROGRAM))
    input_gradient_kernel[grid](
        dy, weight, dx, x.shape[1], x.shape[2], x.shape[3], dy.shape[2], dy.shape[3],
        K=weight.shape[-1], STRIDE=stride, PADDING=padding, BLOCK=PIXELS_PER_PROGRAM, ACC=accumulator(x),
    )  # fmt: skip
    return dx


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient to ``weight``, [C, 1, k, k]; partial sums are added in a fixed order, so runs repeat bit for bit."""
    images, channels = x.shape[:2]
    k = weight.shape[-1]
    blocks = triton.cdiv(images * dy.shape[2] * dy.shape[3], PIXELS_PER_PROGRAM)
    splits = min(blocks, MAX_SPLITS)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(splits, channels, k * k, dtype=sums, device=x.device)
    weight_gradient_kernel[(channels, splits)](
        x, dy, partial, images, channels, x.shape[2], x.shape[3], dy.shape[2], dy.shape[3],
        K=k, STRIDE=stride, PADDING=padding, BLOCK=PIXELS_PER_PROGRAM, TAPS=triton.next_power_of_2(k * k),
        ACC=accumulator(x),
    )  # fmt: skip
    return partial.sum(0).to(weight.dtype).reshape(weight.shape)


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """As ``reference.depthwise_conv2d``: ``x`` [B, C, H, W], ``weight`` [C, 1, k, k] -> [B, C, H', W']."""
    y: Tensor = DepthwiseFunction.apply(x, weight, stride, padding)
    return y


class TritonDepthwiseConv2d(DepthwiseConv2d):
    """A depthwise convolution by the kernels of this file. Square and undilated filters only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sides = (self.kernel_size, self.stride, self.padding)
        if self.dilation != (1, 1) or any(isinstance(side, str) or side[0] != side[1] for side in sides):
            raise ValueError(f"{self} cannot run here: kernel, stride and padding must be square, the dilation 1")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> what the depthwise ``nn.Conv2d`` returns."""
        y = depthwise_conv2d(x, self.weight.to(x.dtype), int(self.stride[0]), int(self.padding[0]))
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
