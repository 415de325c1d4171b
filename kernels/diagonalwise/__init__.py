"""Depthwise convolutions that train fast: Diagonalwise Refactorization (arXiv 1803.09926) and its rivals."""

from kernels.diagonalwise.layer import DiagonalwiseConv2d, MaskedDiagonalwiseConv2d, NotDepthwiseError
from kernels.diagonalwise.replacement import refactorize, restore
from kernels.diagonalwise.tune import Choice, TuningTable, tune

__all__ = [
    "Choice",
    "DiagonalwiseConv2d",
    "MaskedDiagonalwiseConv2d",
    "NotDepthwiseError",
    "TuningTable",
    "refactorize",
    "restore",
    "tune",
]
