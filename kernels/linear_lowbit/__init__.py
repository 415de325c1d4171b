"""Linear layers whose weights are packed to 4, 8 or 16 bits and read once for all rows of a pass.

`pack` a weight at load, then `linear(x, packed)`. Written for verifying many drafted rows on a CPU: the weights cross
the memory bus once for all rows, and every row is bit-equal to the row computed alone.
"""

from kernels.linear_lowbit.checkpoint import PackedFormatError, PackingError, load_packed, packing_error, save_packed
from kernels.linear_lowbit.cpu import linear
from kernels.linear_lowbit.packed import (
    FORMAT_VERSION,
    DamagedWeight,
    PackedWeight,
    dequantise,
    pack,
    pack_quantised,
    unpack,
)
from kernels.linear_lowbit.reference import QuantisedWeight

__all__ = [
    "FORMAT_VERSION",
    "DamagedWeight",
    "PackedFormatError",
    "PackedWeight",
    "PackingError",
    "QuantisedWeight",
    "dequantise",
    "linear",
    "load_packed",
    "pack",
    "pack_quantised",
    "packing_error",
    "save_packed",
    "unpack",
]
