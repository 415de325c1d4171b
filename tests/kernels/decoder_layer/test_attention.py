"""The native layer's attention alone: against the slow twin in torch, and bit-equal however a row comes about."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.decoder_layer import LayerForm, LayerPass, LayerStack, PackedDecoderLayer, decoder_layers
from kernels.linear_lowbit import pack
from kernels.tree_attention import KVSlots, Segment, causal_segment, tree_segment
from kernels.tree_attention.reference import tree_attention_reference
from kernels.tree_attention.slots import quantise_rows

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
CPU = torch.device("cpu")
CACHES = [torch.float32, torch.bfloat16, torch.int8]
# What a row may differ from fp64: rounded queries and weights of bf16 dot products, else fp32 sums.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.int8: 4e-3}
PARENTS = [-1, 0, 0, 1, 3, 2, 4, 6]
DEPTHS = [0, 1, 1, 2, 3, 2, 4, 5]


def eye(size: int, rows: int | None = None) -> Tensor:
    return torch.eye(rows or size, size)


class Attention:
    """A layer that hands q, k and v through from its input and adds what was attended to it: its MLP is zero."""

    def __init__(
        self, kv: torch.dtype, heads: int, kv_heads: int, width: int, capacity: int, window: int | None = None
    ) -> None:
        self.sizes = [heads * width, kv_heads * width, kv_heads * width]
        # The norm makes every row's mean square 1; q, k and v are thirds of the row.
        hidden = (sum(self.sizes) + 31) // 32 * 32
        self.hidden, self.scale, self.heads = hidden, width**-0.5, heads
        zero, ones = torch.zeros(hidden, 32), torch.ones(hidden)
        self.layer = PackedDecoderLayer(
            (pack(eye(hidden, sum(self.sizes)), 32),), pack(eye(heads * width, hidden), 32),
            (pack(torch.zeros(64, hidden), 32),), pack(zero, 32),
            LayerForm(heads, kv_heads, width, 0.0, self.scale, window=window), ones, ones,
        )  # fmt: skip
        self.slots = KVSlots(2, capacity, 1, kv_heads, width, kv, CPU)
        for store, scales in ((self.slots.keys, self.slots.key_scales), (self.slots.values, self.slots.value_scales)):
            rows = torch.randn(store.shape)
            if scales is None:
                store.copy_(rows)
            else:
                quantised, scale = quantise_rows(rows)
                store.copy_(quantised)
                scales.copy_(scale)

    def rows(self, count: int) -> Tensor:
        """Inputs that the norm leaves alone, but for rounding."""
        rows = torch.randn(count, self.hidden)
        return rows / rows.square().mean(-1, keepdim=True).sqrt()

    def run(self, hidden: Tensor, segments: Sequence[Segment]) -> Tensor:
        """What was attended, [rows, heads * head_dim]."""
        width = self.slots.keys.shape[-1]
        out = hidden.clone()
        row_pass = LayerPass(self.slots, segments, torch.ones(len(hidden), width), torch.zeros(len(hidden), width))
        decoder_layers(out, LayerStack([self.layer]), row_pass)
        return (out - hidden)[:, : self.sizes[0]]

    def reference(self, hidden: Tensor, segments: Sequence[Segment]) -> Tensor:
        query = hidden[:, : self.sizes[0]].reshape(len(hidden), self.heads, -1).transpose(0, 1)
        window = self.layer.form.window
        return tree_attention_reference(query, self.slots, 0, segments, self.scale, window).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("name", native.available_instruction_sets())
@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 64), (3, 1, 16), (5, 5, 48), (6, 2, 128)])
def test_rows_of_several_slots_equal_the_twin(
    heads: int, kv_heads: int, width: int, kv: torch.dtype, name: str
) -> None:
    torch.manual_seed(0)
    attention = Attention(kv, heads, kv_heads, width, 700)
    segments = [causal_segment(0, 61, 70), tree_segment(1, 600, PARENTS, CPU)]
    hidden = attention.rows(78)
    with native.use_instruction_set(name):
        got = attention.run(hidden, segments)
    want = attention.reference(hidden, segments)
    assert (got - want).norm() < BOUNDS[kv] * want.norm()


@pytest.mark.parametrize("name", native.available_instruction_sets())
@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 450, 508, 512, 1100])
def test_a_tree_row_equals_the_plain_row(prefix: int, kv: torch.dtype, name: str) -> None:
    torch.manual_seed(prefix)
    attention = Attention(kv, 4, 2, 32, 1200)
    for store in attention.slots.stores:
        store[:, 1] = store[:, 0]
    drafted, beside = attention.rows(8), attention.rows(5)
    with native.use_instruction_set(name):
        segments = [tree_segment(0, prefix, PARENTS, CPU), causal_segment(1, 30, 5)]
        tree = attention.run(torch.cat([drafted, beside]), segments)[:8]
        for path in ([0, 1, 3, 4, 6, 7], [0, 2, 5]):
            for store in attention.slots.stores:
                store[:, 1, :, :prefix] = store[:, 0, :, :prefix]
            for depth, row in enumerate(path):
                plain = attention.run(drafted[row][None], [causal_segment(1, prefix + depth, 1)])
                assert torch.equal(plain[0], tree[row])
            chunk = attention.run(drafted[path], [causal_segment(1, prefix, len(path))])
            assert torch.equal(chunk, tree[path])


@pytest.mark.parametrize("name", native.available_instruction_sets())
@pytest.mark.parametrize("kv", CACHES)
def test_rows_in_a_window_equal_the_twin_and_themselves(kv: torch.dtype, name: str) -> None:
    """Windows that begin in the keys of the tree, in a block, on its edge, in an earlier chunk, and before the text."""
    torch.manual_seed(0)
    with native.use_instruction_set(name):
        for prefix, window in (
            (5, 2),
            (130, 3),
            (130, 67),
            (640, 64),
            (640, 65),
            (700, 190),
            (1100, 515),
            (1100, 1101),
        ):
            attention = Attention(kv, 4, 2, 32, 1200, window)
            for store in attention.slots.stores:
                store[:, 1] = store[:, 0]
            drafted = attention.rows(8)
            segments = [tree_segment(0, prefix, PARENTS, CPU)]
            tree = attention.run(drafted, segments)
            want = attention.reference(drafted, segments)
            assert (tree - want).norm() < BOUNDS[kv] * want.norm()
            for path in ([0, 1, 3, 4, 6, 7], [0, 2, 5]):
                for depth, row in enumerate(path):
                    plain = attention.run(drafted[row][None], [causal_segment(1, prefix + depth, 1)])
                    assert torch.equal(plain[0], tree[row])
                chunk = attention.run(drafted[path], [causal_segment(1, prefix, len(path))])
                assert torch.equal(chunk, tree[path])


@pytest.mark.skipif(native.num_threads() < 2, reason="one processor has nobody to share a head's keys with")
@pytest.mark.parametrize("kv", CACHES)
def test_threads_that_share_a_heads_keys_change_no_bit(kv: torch.dtype) -> None:
    attention = Attention(kv, 2, 1, 64, 2100)
    segments, hidden = [tree_segment(0, 2000, PARENTS, CPU)], attention.rows(8)
    shared = attention.run(hidden, segments)
    threads = native.num_threads()
    try:
        native.set_num_threads(1)
        assert torch.equal(attention.run(hidden, segments), shared)
    finally:
        native.set_num_threads(threads)


@pytest.mark.parametrize("name", native.available_instruction_sets())
@pytest.mark.parametrize("kv", CACHES)
def test_a_row_that_is_not_finite_spoils_only_those_that_see_it(kv: torch.dtype, name: str) -> None:
    attention = Attention(kv, 4, 2, 32, 200)
    hidden = attention.rows(8)
    spoilt = hidden.clone()
    spoilt[2] = float("nan")
    segments = [tree_segment(0, 65, PARENTS, CPU)]
    with native.use_instruction_set(name):
        clean, got = attention.run(hidden, segments), attention.run(spoilt, segments)
        chunk = attention.run(spoilt, [causal_segment(1, 65, 8)])
    assert got[[2, 5]].isnan().all() and torch.equal(got[[0, 1, 3, 4, 6, 7]], clean[[0, 1, 3, 4, 6, 7]])
    assert chunk[:2].isfinite().all() and chunk[2:].isnan().all()


def test_int8_rows_are_stored_as_the_reference_stores_them() -> None:
    torch.manual_seed(0)
    attention = Attention(torch.int8, 4, 2, 64, 8)
    hidden = attention.rows(3)
    attention.run(hidden, [causal_segment(0, 0, 3)])
    keys = hidden[:, 4 * 64 : 6 * 64].reshape(3, 2, 64).transpose(0, 1)
    quantised, scale = quantise_rows(keys)
    assert attention.slots.key_scales is not None
    torch.testing.assert_close(attention.slots.key_scales[0, 0, :, :3], scale)
    assert (attention.slots.keys[0, 0, :, :3].int() - quantised.int()).abs().max() <= 1  # the norm rounds
