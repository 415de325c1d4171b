"""Every packed format: what it stands for, its products on every instruction set, rows that stay bit-equal."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import native
from kernels.linear_lowbit import PackedFormatError, PackedWeight, dequantise, linear, load_packed, save_packed, unpack
from kernels.linear_lowbit.cpu import _reference
from kernels.linear_lowbit.packed import GROUP_SIZES, pack_quantised
from kernels.linear_lowbit.reference import QuantisedWeight

SETS = native.available_instruction_sets()
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
EXTREMES = (-128, 127, 0, 1, -1, 64, -64, 2, -2, 100, -100, 3, -3, 5, -5, 7)
KINDS = [(4, "middle"), (4, "minimum"), (4, IQ4), (4, E2M1_DOUBLED), (4, EXTREMES), (8, "middle"), (8, "minimum")]
FORMATS = [(*kind, group, dtype) for kind in KINDS for group in GROUP_SIZES for dtype in (torch.float16, torch.float32)]
Format = tuple[int, str | tuple[int, ...], int, torch.dtype]


def example(format: Format, seed: int, rows: int, out: int, width: int) -> tuple[torch.Tensor, QuantisedWeight]:
    bits, kind, group, dtype = format
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, width), generator=generator, dtype=torch.uint8)
    scale = (torch.randn(out, width // group, generator=generator) * 0.01).to(dtype)
    minimum = torch.randn(out, width // group, generator=generator).to(dtype) if kind == "minimum" else None
    table = kind if isinstance(kind, tuple) else None
    weight = QuantisedWeight(codes, scale, minimum, bits, group, table)
    return torch.randn(rows, width, generator=generator), weight


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_packed_weight_stands_for_the_same_values(format: Format) -> None:
    _, weight = example(format, 1, 1, 4125, 256)  # more rows than are ordered at once
    packed = pack_quantised(weight)
    again = unpack(packed)
    assert isinstance(again, QuantisedWeight) and again.table == weight.table
    assert torch.equal(again.codes, weight.codes) and torch.equal(again.scale, weight.scale)
    assert torch.equal(dequantise(packed), weight.dequantise())


@pytest.mark.skipif(not SETS, reason="the native kernels are not built")
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_native_equals_the_reference(name: str, format: Format) -> None:
    x, weight = example(format, 2, 9, 45, 384)
    packed = pack_quantised(weight)
    wanted = _reference(x, packed)
    with native.use_instruction_set(name):
        assert float((linear(x, packed) - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.skipif(not SETS, reason="the native kernels are not built")
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "kind"), [(8, "minimum"), (8, "middle"), (4, EXTREMES)], ids=str)
def test_the_largest_sums_of_a_group_stay_exact(
    name: str, dtype: torch.dtype, bits: int, kind: str | tuple[int, ...]
) -> None:
    x, weight = example((bits, kind, 128, dtype), 6, 2, 32, 128)
    for code in (0, 2**bits - 1):
        weight.codes.fill_(code)
        if weight.minimum is not None:
            weight.minimum.zero_()
        packed = pack_quantised(weight)
        with native.use_instruction_set(name):
            found = linear(torch.ones_like(x) * torch.tensor([[1.0], [-1.0]]), packed)
        whole = int(weight.levels()[0, 0]) * 128 * 127
        wanted = whole * weight.scale[:, 0].float() * torch.tensor(1.0 / 127.0)
        torch.testing.assert_close(found, torch.stack([wanted, -wanted]), rtol=3e-7, atol=0)


@pytest.mark.skipif(not SETS, reason="the native kernels are not built")
@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000), rows=st.integers(2, 70), out=st.integers(1, 70), blocks=st.integers(1, 3),
    format=st.sampled_from(FORMATS), name=st.sampled_from(SETS or [""]),
)  # fmt: skip
def test_a_row_is_bit_equal_whatever_stands_beside_it(
    seed: int, rows: int, out: int, blocks: int, format: Format, name: str
) -> None:
    x, weight = example(format, seed, rows, out, blocks * max(32, format[2]))
    x[0, 0] = torch.inf if seed % 2 else torch.nan
    packed = pack_quantised(weight)
    with native.use_instruction_set(name):
        together = linear(x, packed)
        alone = torch.cat([linear(row, packed) for row in x.split(1)])
    assert together[0].isnan().all() and torch.equal(together[1:], alone[1:])


def test_every_format_survives_a_file(tmp_path: Path) -> None:
    weights = {str(format): pack_quantised(example(format, 3, 1, 33, 128)[1]) for format in FORMATS}
    save_packed(tmp_path / "w.safetensors", weights)
    loaded = load_packed(tmp_path / "w.safetensors")
    for name, weight in weights.items():
        again = loaded[name]
        assert isinstance(again, PackedWeight) and torch.equal(dequantise(again), dequantise(weight))


def test_a_folder_of_the_first_version_still_reads(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    packed = pack_quantised(example((4, "middle", 32, torch.float16), 4, 1, 32, 64)[1])
    path = tmp_path / "old.safetensors"
    described = '{"w": {"out_features": 32, "in_features": 64, "bits": 4, "group_size": 32, "zero_point": false}}'
    for version, readable in (("1", True), ("0", False)):
        save_file(
            {"w": packed.data}, path, {"format": "dovetail-packed", "format_version": version, "packed": described}
        )
        if readable:
            again = load_packed(path)["w"]
            assert isinstance(again, PackedWeight) and torch.equal(dequantise(again), dequantise(packed))
        else:
            with pytest.raises(PackedFormatError, match="this version reads 1 and 2: `dovetail convert"):
                load_packed(path)


def test_what_has_no_packed_form_is_refused() -> None:
    _, weight = example((4, IQ4, 16, torch.float32), 5, 1, 32, 64)
    packed = pack_quantised(weight)
    for table, bits, message in (
        ((1, 2), 4, "sixteen entries"), ((*IQ4[:15], 128), 4, "sixteen entries"), (IQ4, 8, "4-bit codes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PackedWeight(packed.data, 32, 64, bits, 16, wide_scales=True, table=table)
    with pytest.raises(ValueError, match="divide into groups of 16"):  # half a chunk
        pack_quantised(QuantisedWeight(weight.codes[:, :48], weight.scale[:, :3], None, 4, 16))
    with pytest.raises(ValueError, match=r"scales must be fp16 or fp32, got torch\.bfloat16"):
        pack_quantised(QuantisedWeight(weight.codes, weight.scale.bfloat16(), None, 4, 16))
    with pytest.raises(ValueError, match="minima must have the scales' type"):
        pack_quantised(QuantisedWeight(weight.codes, weight.scale, weight.scale.half(), 4, 16))
