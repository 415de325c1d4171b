import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import native
from kernels.linear_lowbit import PackedWeight, cpu, linear, pack, unpack
from kernels.linear_lowbit.reference import QuantisedWeight

SETS = native.available_instruction_sets()
needs_native = pytest.mark.skipif(not SETS, reason="the native kernels are not built")
FORMATS = [(4, False), (4, True), (8, False), (8, True), (16, False), (32, False)]
# Integer sums are exact, so only the fp32 folds differ (fused or not); bf16 and fp32 differ in the order of summing.
TOLERANCE = {4: 1e-6, 8: 1e-6, 16: 2e-6, 32: 2e-6}


def example(seed: int, rows: int, out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator), torch.randn(out, width, generator=generator) * 0.05


def relative(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y - wanted).norm() / wanted.norm())


@needs_native
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("bits", "zero_point"), FORMATS)
@pytest.mark.parametrize(
    ("rows", "out", "width", "group"), [(1, 32, 32, 32), (7, 33, 192, 64), (8, 100, 256, 128), (65, 31, 352, 32)]
)
def test_native_equals_the_reference(
    name: str, bits: int, zero_point: bool, rows: int, out: int, width: int, group: int
) -> None:
    x, weight = example(bits + rows, rows, out, width)
    packed = pack(weight, bits, group, zero_point=zero_point)
    with native.use_instruction_set(name):
        y = linear(x, packed)
    assert relative(y, cpu._reference(x, packed)) < TOLERANCE[bits]


@needs_native
@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 70), out=st.integers(1, 130), chunks=st.integers(1, 9),
    format=st.sampled_from(FORMATS), name=st.sampled_from(SETS or [""]),
)  # fmt: skip
def test_a_row_is_bit_equal_whatever_stands_beside_it(
    seed: int, rows: int, out: int, chunks: int, format: tuple[int, bool], name: str
) -> None:
    x, weight = example(seed, rows, out, chunks * 32)
    packed = pack(weight, format[0], 32, zero_point=format[1])
    with native.use_instruction_set(name):
        together = linear(x, packed)
        alone = torch.cat([linear(row[None], packed) for row in x])
        some = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: rows // 2 + 1]
        assert torch.equal(together, alone)
        assert torch.equal(linear(x[some], packed), together[some])


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.09), (8, 0.006), (16, 0.003), (32, 0.0)])
def test_packing_keeps_the_weight(bits: int, bound: float) -> None:
    _, weight = example(0, 1, 50, 192)
    kept = unpack(pack(weight, bits, 32))
    kept = kept.dequantise() if isinstance(kept, QuantisedWeight) else kept.float()
    assert relative(kept, weight) <= bound


def test_bf16_in_bf16_out_and_leading_dimensions() -> None:
    x, weight = example(1, 6, 40, 64)
    packed = pack(weight, 8, 32)
    y = linear(x.reshape(2, 3, 64).bfloat16(), packed)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 40)
    assert relative(y.float().reshape(6, 40), x @ weight.T) < 0.02


def test_without_native_kernels_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = example(2, 3, 40, 64)
    packed = pack(weight, 4, 32)
    before = linear(x, packed)
    monkeypatch.setattr(cpu, "library", lambda: None)
    torch.testing.assert_close(linear(x, packed), before, rtol=1e-5, atol=1e-6)


def test_a_checkout_without_a_compiler_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".absent"])
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.library() is None and native.library() is None
            assert native.instruction_set() == "reference" and native.num_threads() == 1
        assert len(caplog.records) == 1 and "not built" in caplog.text
    finally:
        native.library.cache_clear()


@needs_native
def test_a_library_of_another_interface_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "built from other sources" in caplog.text
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_activation_spoils_its_row_and_no_other(bits: int, bad: float) -> None:
    x, weight = example(3, 9, 40, 192)
    packed = pack(weight, bits, 32)
    clean = linear(x, packed)
    x[4, 130] = bad
    y = linear(x, packed)
    assert y[4].isnan().all()
    assert torch.equal(y[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("bits", [16, 32])
def test_a_bad_activation_propagates_in_floats(bits: int) -> None:
    x, weight = example(3, 3, 40, 64)
    x[1, 5] = float("nan")
    y = linear(x, pack(weight, bits, 32))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_extreme_but_finite_activations(bits: int) -> None:
    _, weight = example(3, 1, 40, 64)
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e-38), torch.full((64,), 1e30)])
    y = linear(x, pack(weight, bits, 32))
    assert y.isfinite().all() and (y[0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_no_rows_give_no_rows(bits: int) -> None:
    _, weight = example(4, 1, 40, 64)
    assert linear(torch.empty(0, 64), pack(weight, bits, 32)).shape == (0, 40)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_unaligned_data(bits: int) -> None:
    x, weight = example(5, 5, 40, 64)
    packed = pack(weight, bits, 32)
    shifted = torch.zeros(len(packed.data) + 4, dtype=torch.uint8)[4:]
    shifted.copy_(packed.data)
    moved = PackedWeight(shifted, packed.out_features, packed.in_features, bits, packed.group_size)
    values = torch.zeros(5 * 64 + 1)[1:].reshape(5, 64)
    values.copy_(x)
    assert torch.equal(linear(values, moved), linear(x, packed))


@pytest.mark.parametrize(
    ("weight", "bits", "group", "message"),
    [
        (torch.zeros(4, 48), 4, 32, "48 input features do not divide into groups of 32: keep this layer in bf16"),
        (torch.zeros(4, 192), 8, 128, "192 input features do not divide into groups of 128: take 16 or 32 or 64"),
        (torch.zeros(4, 64), 4, 24, "group_size must be one of 16, 32, 64, 128, got 24"),
        (torch.zeros(4, 64), 3, 32, "bits must be 4, 8, 16"),
        (torch.zeros(4, 64, dtype=torch.int32), 4, 32, "floating-point matrix"),
        (torch.zeros(64), 4, 32, "floating-point matrix"),
        (torch.full((4, 64), float("nan")), 8, 32, "NaN or infinity"),
        (torch.full((4, 64), 1e6), 4, 32, "65504"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(weight: torch.Tensor, bits: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(weight, bits, group)


def test_wrong_activations_are_refused_by_name() -> None:
    packed = pack(torch.randn(8, 64), 8, 32)
    with pytest.raises(ValueError, match="takes 64 input features"):
        linear(torch.zeros(2, 32), packed)
    with pytest.raises(ValueError, match="floating-point tensor on the CPU"):
        linear(torch.zeros(2, 64, dtype=torch.int64), packed)
    with pytest.raises(ValueError, match="contiguous bytes"):
        PackedWeight(packed.data[:-1], 8, 64, 8, 32)


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    _, weight = example(6, 1, 64, 128)
    importance = torch.ones(128)
    importance[::4] = 100.0
    plain, aware = (unpack(pack(weight, 4, 32, importance=chosen)) for chosen in (None, importance))
    assert isinstance(plain, QuantisedWeight) and isinstance(aware, QuantisedWeight)
    errors = [((q.dequantise() - weight).square() * importance).sum() for q in (plain, aware)]
    assert errors[1] < 0.95 * errors[0]


@needs_native
def test_a_processor_without_any_fast_path_has_the_portable_kernels() -> None:
    assert SETS[-1] == "portable"
    x, weight = example(8, 3, 40, 64)
    packed = pack(weight, 4, 32)
    with native.use_instruction_set("portable"):
        assert native.instruction_set() == "portable"
        assert relative(linear(x, packed), cpu._reference(x, packed)) < TOLERANCE[4]
    with (
        pytest.raises(ValueError, match=r"no instruction set 'mmx' here; available: .*portable"),
        native.use_instruction_set("mmx"),
    ):
        pass


@needs_native
def test_callers_on_several_threads_get_their_own_rows() -> None:
    x, weight = example(7, 16, 256, 256)
    packed = pack(weight, 4, 32)
    wanted = linear(x, packed)
    wrong: list[int] = []

    def call(row: int) -> None:
        for _ in range(50):
            if not torch.equal(linear(x[row : row + 4], packed), wanted[row : row + 4]):
                wrong.append(row)

    threads = [threading.Thread(target=call, args=(row,)) for row in (0, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_native
def test_the_pool_survives_a_fork_and_sleeps_when_idle() -> None:
    code = """
import os, resource, time, torch
from kernels.linear_lowbit import linear, pack
packed, x = pack(torch.randn(512, 256), 4, 32), torch.randn(8, 256)
wanted = linear(x, packed)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(linear(x, packed), wanted) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
time.sleep(0.05)
before = time.process_time()
time.sleep(0.5)
assert time.process_time() - before < 0.005, time.process_time() - before
"""
    root = Path(native.__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, check=True)
