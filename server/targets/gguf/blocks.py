"""Blocks of a GGUF tensor as codes, scales and minima: the file's exact values in the form that the kernels stream.

A symmetric 4-bit code stands for scale * (code - 8), a symmetric 8-bit code for scale * (code - 128), a code with a
minimum for scale * code + minimum, a code with a table for scale * table[code]. Where the file's own centre or sign
differs, codes are shifted by a constant, which changes no value. Sources: ggml-common.h and gguf-py's quants.py, which
the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[Any]  # fp16 where the file holds the scale itself, fp32 where it is a product
LOW_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # E2M1 doubled; the scale is halved


@dataclass(frozen=True)
class Groups:
    """codes uint8 [B, values of a block]; scale and minimum [B, groups of a block]; minimum None: symmetric.

    table: what the 16 codes stand for, where they do not count evenly.
    """

    codes: Bytes
    scale: Numbers
    minimum: Numbers | None
    bits: int
    table: tuple[int, ...] | None = None


def halves(blocks: Bytes, begin: int) -> Numbers:
    """The fp16 number at byte ``begin`` of each block, [B, 1]."""
    return np.ascontiguousarray(blocks[:, begin : begin + 2]).view(np.float16)


def nibbles(packed: Bytes, run: int) -> Bytes:
    """4-bit codes [B, 2 * bytes]: each run of bytes holds that many low nibbles' values, then the high nibbles'."""
    words = np.ascontiguousarray(packed).view(np.uint64).reshape(len(packed), -1, run // 8)  # eight bytes at a time
    codes = np.empty((*words.shape[:2], 2, words.shape[2]), dtype=np.uint64)
    np.bitwise_and(words, LOW_NIBBLES, out=codes[:, :, 0])
    np.bitwise_and(words >> np.uint64(4), LOW_NIBBLES, out=codes[:, :, 1])
    return codes.view(np.uint8).reshape(len(packed), -1)


def high_bits(packed: Bytes) -> Bytes:
    """Bit i of the 32-bit number in each block, as 16 where it is set: [B, 32]."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def q4_0(blocks: Bytes) -> Groups:
    """d * (q - 8)."""
    return Groups(nibbles(blocks[:, 2:], 16), halves(blocks, 0), None, 4)


def q4_1(blocks: Bytes) -> Groups:
    """d * q + m."""
    return Groups(nibbles(blocks[:, 4:], 16), halves(blocks, 0), halves(blocks, 2), 4)


def q5_0(blocks: Bytes) -> Groups:
    """d * (q - 16)."""
    codes = nibbles(blocks[:, 6:], 16) | high_bits(blocks[:, 2:6])
    return Groups(codes + np.uint8(128 - 16), halves(blocks, 0), None, 8)


def q5_1(blocks: Bytes) -> Groups:
    """d * q + m."""
    codes = nibbles(blocks[:, 8:], 16) | high_bits(blocks[:, 4:8])
    return Groups(codes, halves(blocks, 0), halves(blocks, 2), 8)


def q8_0(blocks: Bytes) -> Groups:
    """d * q, q a signed byte."""
    return Groups(blocks[:, 2:] ^ np.uint8(128), halves(blocks, 0), None, 8)


def k_scales(blocks: Bytes) -> tuple[Numbers, Numbers]:
    """Scale d * sc and minimum -dmin * m of Q4_K's and Q5_K's eight groups, fp32 [B, 8]; sc and m have 6 bits."""
    scales, minima, upper = np.split(blocks[:, 4:16], 3, axis=1)
    scale = np.concatenate((scales & 63, upper & 15 | scales >> 2 & 48), axis=1).astype(np.float32)
    minimum = np.concatenate((minima & 63, upper >> 4 | minima >> 2 & 48), axis=1).astype(np.float32)
    return halves(blocks, 0).astype(np.float32) * scale, -(halves(blocks, 2).astype(np.float32) * minimum)


def q4_k(blocks: Bytes) -> Groups:
    """d * sc * q - dmin * m, in groups of 32."""
    return Groups(nibbles(blocks[:, 16:], 32), *k_scales(blocks), 4)


def q5_k(blocks: Bytes) -> Groups:
    """As Q4_K, with a fifth bit: bit g of byte i belongs to value i of group g."""
    fifth = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1) << np.uint8(4)
    codes = nibbles(blocks[:, 48:], 32) | fifth.reshape(len(blocks), -1)
    return Groups(codes, *k_scales(blocks), 8)


def q6_k(blocks: Bytes) -> Groups:
    """d * sc * (q - 32), in groups of 16."""
    low = nibbles(blocks[:, :128], 64)
    pairs = blocks[:, 128:192].reshape(len(blocks), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = low | ((pairs & np.uint8(3)) << np.uint8(4)).reshape(len(blocks), -1)
    scale = halves(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8)
    return Groups(codes + np.uint8(128 - 32), scale, None, 8)


def iq4_nl(blocks: Bytes) -> Groups:
    """d * table[q]."""
    return Groups(nibbles(blocks[:, 2:], 16), halves(blocks, 0), None, 4, IQ4_TABLE)


def iq4_xs(blocks: Bytes) -> Groups:
    """d * (sc - 32) * table[q], in groups of 32, sc of 6 bits."""
    low = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    upper = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scale = (low.reshape(len(blocks), 8) | upper << 4).astype(np.float32) - 32
    return Groups(nibbles(blocks[:, 8:], 16), halves(blocks, 0).astype(np.float32) * scale, None, 4, IQ4_TABLE)


def mxfp4(blocks: Bytes) -> Groups:
    """2^(e - 128) * table[q]; the two smallest exponents are subnormal numbers of fp32."""
    exponent = blocks[:, :1].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x00200000) << exponent, (exponent - 1) << 23)
    return Groups(nibbles(blocks[:, 1:], 16), bits.astype(np.uint32).view(np.float32), None, 4, MXFP4_TABLE)


DECODERS: dict[Kind, Callable[[Bytes], Groups]] = {
    Kind.Q4_0: q4_0, Kind.Q4_1: q4_1, Kind.Q5_0: q5_0, Kind.Q5_1: q5_1, Kind.Q8_0: q8_0, Kind.Q4_K: q4_k,
    Kind.Q5_K: q5_k, Kind.Q6_K: q6_k, Kind.IQ4_NL: iq4_nl, Kind.IQ4_XS: iq4_xs, Kind.MXFP4: mxfp4,
}  # fmt: skip
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)


def decode(kind: Kind, data: Bytes) -> Groups:
    """Every block of a tensor's bytes. ``kind`` must be one of ``DECODERS``."""
    return DECODERS[kind](data.reshape(-1, GGML_QUANT_SIZES[kind][1]))
