"""Attention over slots against its slow twin, and the bookkeeping of rows."""

import mmap
from pathlib import Path

import pytest
import torch

from kernels.tree_attention import KVSlots, Segment, SlotError, causal_segment, tree_attention, tree_segment
from kernels.tree_attention.reference import tree_attention_reference
from kernels.tree_attention.slots import KEPT_ROWS, quantise_rows

CPU = torch.device("cpu")


def filled_slots(num_kv_heads: int = 2, capacity: int = 40, dtype: torch.dtype = torch.float32) -> KVSlots:
    slots = KVSlots(3, capacity, 2, num_kv_heads, 8, dtype, CPU)
    slots.keys.copy_(torch.randn(slots.keys.shape))
    slots.values.copy_(torch.randn(slots.values.shape))
    return slots


def random_parents(num_rows: int) -> list[int]:
    return [-1] + [int(torch.randint(0, row, ())) for row in range(1, num_rows)]


@pytest.mark.parametrize("num_heads", [2, 4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_several_slots_equal_the_reference(num_heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    slots = filled_slots()
    segments = [
        causal_segment(0, 5, 7),
        tree_segment(1, 0, random_parents(9), CPU),
        tree_segment(2, 11, random_parents(1), CPU),
    ]
    query = torch.randn(num_heads, sum(s.num_rows for s in segments), 8)
    got = tree_attention(query, slots, 1, segments, 0.3)
    torch.testing.assert_close(got, tree_attention_reference(query, slots, 1, segments, 0.3), atol=1e-6, rtol=1e-5)


def test_a_level_sees_earlier_uncommitted_rows_of_its_own_path() -> None:
    torch.manual_seed(0)
    slots = filled_slots()
    mask = torch.tensor([[True, False, True, False], [False, True, False, True]])
    segment = Segment(0, 3, 2, mask)
    query = torch.randn(2, 2, 8)
    got = tree_attention(query, slots, 0, [segment], 1.0)
    torch.testing.assert_close(got, tree_attention_reference(query, slots, 0, [segment], 1.0))
    slots.keys[0, 0, :, 4] += 1.0  # a row off its path must not touch the first row's result
    assert torch.equal(tree_attention(query, slots, 0, [segment], 1.0)[:, 0], got[:, 0])


def test_window_counts_positions_along_the_path() -> None:
    torch.manual_seed(0)
    slots = filled_slots(num_kv_heads=1)
    # Two branches of length 2 below a prefix of 4: the window of 3 holds the row, its parent and one prefix row.
    segment = tree_segment(0, 4, [-1, -1, 0, 1], CPU)
    query = torch.randn(1, 4, 8)
    got = tree_attention(query, slots, 0, [segment], 1.0, window=3)
    for row, seen in ((2, [3, 4, 6]), (3, [3, 5, 7]), (0, [2, 3, 4])):
        keys, values = slots.keys[0, 0, 0, seen], slots.values[0, 0, 0, seen]
        want = torch.softmax(keys @ query[0, row], 0) @ values
        torch.testing.assert_close(got[0, row], want)


def test_capped_scores_equal_the_formula() -> None:
    torch.manual_seed(0)
    slots = filled_slots(num_kv_heads=1)
    segment = tree_segment(0, 4, [-1, 0, 0], CPU)
    query = torch.randn(2, 3, 8)
    got = tree_attention(query, slots, 0, [segment], 1.0, softcap=2.0)
    for row, seen in ((0, [0, 1, 2, 3, 4]), (2, [0, 1, 2, 3, 4, 6])):
        keys, values = slots.keys[0, 0, 0, seen], slots.values[0, 0, 0, seen]
        want = torch.softmax(2.0 * torch.tanh(keys @ query[1, row] / 2.0), 0) @ values
        torch.testing.assert_close(got[1, row], want)


def test_keep_moves_the_path_and_rows_are_put_back() -> None:
    slots = filled_slots()
    before = slots.keys.clone()
    slots.lengths[1] = 4
    slots.keep(1, [0, 2, 5])
    assert slots.lengths[1] == 7
    assert torch.equal(slots.keys[:, 1, :, 4:7], before[:, 1, :, [4, 6, 9]])
    slots.write_rows(2, slots.read_rows(1, 0, 6))
    assert slots.lengths[2] == 6
    assert torch.equal(slots.keys[:, 2, :, :6], slots.keys[:, 1, :, :6])
    slots.release(1)
    assert slots.lengths[1] == 0


def test_misuse_is_refused_by_name() -> None:
    slots = filled_slots(capacity=10)
    with pytest.raises(SlotError, match="holds 10 rows; 12"):
        slots.check(causal_segment(0, 8, 4))
    with pytest.raises(SlotError, match="slot 3 does not exist"):
        slots.check(causal_segment(3, 0, 1))
    with pytest.raises(SlotError, match="rising order"):
        slots.keep(0, [0, 2, 1])
    with pytest.raises(SlotError, match="0 committed rows"):
        slots.read_rows(0, 0, 1)
    with pytest.raises(SlotError, match="parent"):
        tree_segment(0, 0, [-1, 2, 0], CPU)


def test_int8_rows_are_near_what_they_hold() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 5, 64)
    rows[0, 0], rows[0, 1] = 0.0, 1e-38
    rows[1, 2, 7] = float("inf")
    quantised, scale = quantise_rows(rows)
    assert quantised.dtype == torch.int8 and scale.shape == (3, 5)
    assert scale[1, 2].isnan() and scale[0, :2].tolist() == [0.0, 0.0] and not quantised[0, :2].any()
    error = (quantised * scale[..., None] - rows).abs().amax(-1)
    usual = torch.ones(3, 5, dtype=torch.bool)
    usual[1, 2] = usual[0, 0] = usual[0, 1] = False
    assert (error[usual] <= 0.5001 * scale[usual]).all()


def test_int8_slots_store_attend_keep_and_copy() -> None:
    torch.manual_seed(0)
    slots = KVSlots(2, 40, 2, 2, 8, torch.int8, CPU)
    plain = KVSlots(2, 40, 2, 2, 8, torch.float32, CPU)
    segment = tree_segment(1, 0, random_parents(9), CPU)
    keys, values, query = torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.randn(4, 9, 8)
    for each in (slots, plain):
        each.write(1, segment, keys, values)
    got = tree_attention(query, slots, 1, [segment], 0.3)
    torch.testing.assert_close(got, tree_attention_reference(query, slots, 1, [segment], 0.3), atol=1e-6, rtol=1e-5)
    want = tree_attention_reference(query, plain, 1, [segment], 0.3)
    assert 0 < (got - want).norm() < 0.02 * want.norm()
    slots.keep(1, [0, 4, 7])
    slots.write_rows(0, slots.read_rows(1, 0, 3))
    for store in slots.stores:
        assert torch.equal(store[1, 0, :, :3], store[1, 1, :, :3])
    assert torch.equal(slots.key_scales[1, 0, :, 1], quantise_rows(keys)[1][:, 4])  # type: ignore[index]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell what is resident")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_memory_comes_with_rows_and_goes_with_their_request(dtype: torch.dtype) -> None:
    slots = KVSlots(4, 2**20, 2, 2, 64, dtype, CPU)  # far more than the machine might have
    row_bytes, before = slots.bytes_per_position, resident_bytes()
    for _ in range(3):
        slots.check(causal_segment(1, 0, 40_000))
        for store in slots.stores:
            store[:, 1, :, :40_000] = 1
        assert resident_bytes() - before > 39_000 * row_bytes
        slots.release(1)
        assert resident_bytes() - before < 8_000 * row_bytes
        for store in slots.stores:
            assert store[:, 1, :, :KEPT_ROWS].eq(1).all()  # and nothing of its neighbours is touched


def test_bytes_of_a_position() -> None:
    sizes = {dtype: KVSlots(2, 4, 3, 2, 64, dtype, CPU).bytes_per_position for dtype in (torch.bfloat16, torch.int8)}
    assert sizes == {torch.bfloat16: 3 * 2 * 2 * 64 * 2, torch.int8: 3 * 2 * 2 * (64 + 4)}
