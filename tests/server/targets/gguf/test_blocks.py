import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from server.targets.gguf.blocks import DECODERS, Groups, decode


def random_blocks(kind: GGMLQuantizationType, count: int) -> np.ndarray:
    """Random bytes, with finite fp16 numbers where the type keeps its scales."""
    generator = np.random.default_rng(kind.value)
    block_bytes = GGML_QUANT_SIZES[kind][1]
    blocks = generator.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    if kind is GGMLQuantizationType.MXFP4:
        blocks[:4, 0] = [0, 1, 2, 250]  # the two subnormal scales, and the ends of the range
        blocks[4:, 0] = generator.integers(100, 150, count - 4)
        return blocks
    places = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}.get(kind.name, [0])
    for place in places:
        scales = generator.normal(scale=0.02, size=count).astype(np.float16)
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks


def values(groups: Groups) -> np.ndarray:
    """What the codes stand for, in float64, so that only the decoding is tested."""
    count, num_groups = groups.scale.shape
    codes = groups.codes.reshape(count, num_groups, -1)
    if groups.table is not None:
        centred = np.array(groups.table, np.float64)[codes]
    else:
        centred = codes.astype(np.float64) - (0 if groups.minimum is not None else 2 ** (groups.bits - 1))
    value = groups.scale.astype(np.float64)[..., None] * centred
    return (value if groups.minimum is None else value + groups.minimum.astype(np.float64)[..., None]).reshape(
        count, -1
    )


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_codes_stand_for_what_the_reference_reads(kind: GGMLQuantizationType) -> None:
    blocks = random_blocks(kind, 300)
    groups = decode(kind, blocks.reshape(-1))
    assert groups.codes.dtype == np.uint8 and groups.codes.max() < 2**groups.bits
    want = quants.dequantize(blocks.reshape(-1), kind).reshape(300, -1).astype(np.float64)
    got = values(groups)
    if groups.minimum is None:
        assert np.array_equal(got.astype(np.float32), want.astype(np.float32))
    else:
        # The reference rounds the product before it subtracts; half a unit in the last place of the larger term.
        assert np.abs(got - want).max() <= 2**-23 * np.abs(got).max() * 2
