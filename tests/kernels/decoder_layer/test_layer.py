import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from kernels import native
from kernels.decoder_layer import (
    LayerPass,
    LayerStack,
    PackedDecoderLayer,
    decoder_layers,
    head_argmax,
    layer_from_tensors,
    layer_tensors,
    pack_decoder_layer,
    packing_errors,
)
from kernels.linear_lowbit import (
    PackedWeight,
    QuantisedWeight,
    dequantise,
    linear,
    load_packed,
    pack,
    pack_quantised,
    save_packed,
    unpack,
)
from kernels.tree_attention import KVSlots, Segment, SlotError, causal_segment, tree_segment

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
CPU = torch.device("cpu")
SIZES = dict(
    vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


def build(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = SIZES | changes
    if kind == "llama":
        model = LlamaModel(LlamaConfig(**sizes))
    elif kind == "llama-biased":
        model = LlamaModel(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
    elif kind == "qwen2":
        model = Qwen2Model(Qwen2Config(**sizes))
    else:
        model = Qwen3Model(Qwen3Config(**sizes | {"head_dim": 32}))
    model = model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.5 if "bias" in name else 0.1) + ("norm" in name))
    return model


class Machine:
    """A one-layer model's packed layer over its own slots."""

    def __init__(self, model: Any, bits: int = 32, kv: torch.dtype = torch.float32) -> None:
        self.model = model
        self.layer: PackedDecoderLayer = pack_decoder_layer(model.layers[0], bits)
        self.slots = KVSlots(3, 400, 2, self.layer.form.num_kv_heads, self.layer.form.head_dim, kv, CPU)

    def run(self, hidden: Tensor, segments: Sequence[Segment], positions: Sequence[int]) -> Tensor:
        cosine, sine = self.model.rotary_emb(hidden[None], torch.tensor([list(positions)]))
        out = hidden.clone()
        row_pass = LayerPass(self.slots, segments, cosine[0], sine[0])
        decoder_layers(out, LayerStack([self.layer]), row_pass, first_slot_layer=1)
        return out

    def prefill(self, slot: int, hidden: Tensor, chunk: int) -> Tensor:
        outs = []
        for first in range(0, len(hidden), chunk):
            rows = hidden[first : first + chunk]
            segment = causal_segment(slot, first, len(rows))
            outs.append(self.run(rows, [segment], range(first, first + len(rows))))
        return torch.cat(outs)


def twin(model: Any, hidden: Tensor) -> Tensor:
    """transformers' own layer on one causal sequence."""
    positions = torch.arange(len(hidden))[None]
    mask = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)[None, None]
    embedded = model.rotary_emb(hidden[None], positions)
    out = model.layers[0](hidden[None], attention_mask=mask, position_ids=positions, position_embeddings=embedded)
    return (out[0] if isinstance(out, tuple) else out).reshape(hidden.shape)


@pytest.mark.parametrize("name", native.available_instruction_sets())
@pytest.mark.parametrize("kind", ["llama", "llama-biased", "qwen2", "qwen3"])
def test_equals_transformers_own_layer(kind: str, name: str) -> None:
    machine = Machine(build(kind))
    hidden = torch.randn(150, 64)
    with native.use_instruction_set(name):
        torch.testing.assert_close(machine.prefill(0, hidden, 150), twin(machine.model, hidden), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("bits", "kv", "bound"),
    [(16, torch.float32, 0.01), (32, torch.bfloat16, 0.01), (8, torch.float32, 0.02), (4, torch.bfloat16, 0.15)],
)
def test_low_precision_stays_near_the_layer(bits: int, kv: torch.dtype, bound: float) -> None:
    machine = Machine(build("llama"), bits, kv)
    hidden = torch.randn(40, 64)
    wanted = twin(machine.model, hidden) - hidden
    assert (machine.prefill(0, hidden, 40) - hidden - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize("name", native.available_instruction_sets())
@pytest.mark.parametrize(
    ("bits", "kv"), [(32, torch.float32), (16, torch.bfloat16), (8, torch.bfloat16), (4, torch.float32)]
)
def test_chunking_changes_no_bit(bits: int, kv: torch.dtype, name: str) -> None:
    machine = Machine(build("qwen3"), bits, kv)
    hidden = torch.randn(140, 64)
    with native.use_instruction_set(name):
        whole = machine.prefill(0, hidden, 140)
        for chunk in (1, 7, 64, 100):
            assert torch.equal(machine.prefill(1, hidden, chunk), whole)
    assert torch.equal(machine.slots.keys[1, 0, :, :140], machine.slots.keys[1, 1, :, :140])


@pytest.mark.parametrize("prefix", [0, 5, 62, 63, 64, 128])
@pytest.mark.parametrize(("bits", "kv"), [(32, torch.float32), (4, torch.bfloat16)])
def test_a_tree_row_equals_the_plain_row(prefix: int, bits: int, kv: torch.dtype) -> None:
    machine = Machine(build("llama"), bits, kv)
    prompt, drafted = torch.randn(prefix, 64), torch.randn(6, 64)
    parents = [-1, 0, 0, 1, 3, 2]
    depths = [0, 1, 1, 2, 3, 2]
    for slot in (0, 1):
        machine.prefill(slot, prompt, 50) if prefix else None
    beside = causal_segment(2, 0, 3)
    tree = machine.run(
        torch.cat([torch.randn(3, 64), drafted]),
        [beside, tree_segment(0, prefix, parents, CPU)],
        [0, 1, 2, *(prefix + depth for depth in depths)],
    )[3:]
    for path in ([0, 1, 3, 4], [0, 2, 5]):
        for depth, row in enumerate(path):
            plain = machine.run(drafted[row][None], [causal_segment(1, prefix + depth, 1)], [prefix + depth])
            assert torch.equal(plain[0], tree[row])


def test_no_rows_are_fine() -> None:
    machine = Machine(build("llama"), 8)
    assert machine.run(torch.empty(0, 64), [], []).shape == (0, 64)
    ids, logits = head_argmax(torch.empty(0, 64), machine.layer.output)
    assert ids.shape == logits.shape == (0,)


def test_a_bad_row_spoils_no_other() -> None:
    machine = Machine(build("llama"), 8)
    hidden = torch.randn(4, 64)
    segments = [tree_segment(0, 0, [-1, 0, 0, 0], CPU)]
    clean = machine.run(hidden, segments, [0, 1, 1, 1])
    hidden[2, 3] = float("nan")
    spoilt = machine.run(hidden, segments, [0, 1, 1, 1])
    assert spoilt[2].isnan().all() and torch.equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_head_argmax_is_that_of_the_logits(bits: int) -> None:
    torch.manual_seed(1)
    head, features = pack(torch.randn(501, 64), bits), torch.randn(70, 64)
    logits = linear(features, head)
    ids, largest = head_argmax(features, head)
    assert torch.equal(ids, logits.argmax(-1)) and torch.equal(largest, logits.amax(-1))


def test_head_argmax_ties_and_nan() -> None:
    head = pack(torch.ones(100, 32), 32)
    features = torch.ones(2, 32)
    features[1, 0] = float("nan")
    ids, logits = head_argmax(features, head)
    assert ids.tolist() == [0, 0] and logits[1].isnan()


def test_what_does_not_fit_is_refused_by_name() -> None:
    machine = Machine(build("llama"))
    table = torch.zeros(2, 16)
    row_pass = LayerPass(machine.slots, [causal_segment(0, 0, 2)], table, table)
    with pytest.raises(ValueError, match=r"hidden must be fp32 \[2, 64\]"):
        decoder_layers(torch.zeros(3, 64), LayerStack([machine.layer]), row_pass)
    with pytest.raises(ValueError, match="contiguous"):
        decoder_layers(torch.zeros(64, 2).t(), LayerStack([machine.layer]), row_pass)
    with pytest.raises(ValueError, match=r"cosine and sine must be \[n, d\] with an even d of at most 16"):
        LayerPass(machine.slots, [causal_segment(0, 0, 2)], table[:, :7], table[:, :7])
    with pytest.raises(ValueError, match="the layers choose from 2 rotary tables, the pass has 1"):
        second = dataclasses.replace(machine.layer, form=dataclasses.replace(machine.layer.form, angles=1))
        decoder_layers(torch.zeros(2, 64), LayerStack([second]), row_pass)
    with pytest.raises(ValueError, match="a window of 0 has none"):
        dataclasses.replace(machine.layer.form, window=0)
    with pytest.raises(ValueError, match="3 rows want as many positions below 2"):
        LayerPass(machine.slots, [causal_segment(0, 0, 3)], table, table)
    with pytest.raises(ValueError, match="2 rows want as many positions below 2"):
        LayerPass(machine.slots, [causal_segment(0, 0, 2)], table, table, [1, 2])
    with pytest.raises(SlotError, match="400 rows"):
        LayerPass(machine.slots, [causal_segment(0, 399, 2)], table, table)
    other = KVSlots(1, 8, 1, 1, 16, torch.float32, CPU)
    with pytest.raises(ValueError, match="2 key heads of 16, the slots hold 1"):
        other_pass = LayerPass(other, [causal_segment(0, 0, 2)], table, table)
        decoder_layers(torch.zeros(2, 64), LayerStack([machine.layer]), other_pass)
    with pytest.raises(ValueError, match="layers 1 to 2: the slots hold 2 layers"):
        decoder_layers(torch.zeros(2, 64), LayerStack([machine.layer] * 2), row_pass, first_slot_layer=1)
    with pytest.raises(ValueError, match="layers of one stack share"):
        other_heads = dataclasses.replace(machine.layer.form, num_heads=2, num_kv_heads=1, head_dim=32)
        LayerStack([machine.layer, dataclasses.replace(machine.layer, form=other_heads)])


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
def test_layers_in_one_call_equal_one_call_for_each(kv: torch.dtype) -> None:
    model = build("llama", num_hidden_layers=2)
    layers = [pack_decoder_layer(layer, 8) for layer in model.layers]
    stack, hidden = LayerStack(layers), torch.randn(6, 64)
    table = torch.randn(9, 16)
    slots = [KVSlots(1, 20, 2, 2, 16, kv, CPU) for _ in range(3)]
    outs = []
    for store, calls in zip(slots, ([range(2)], [range(1), range(1, 2)], None), strict=True):
        row_pass = LayerPass(store, [causal_segment(0, 0, 6)], table, table, [8, 1, 0, 3, 3, 5])
        outs.append(hidden.clone())
        if calls is None:
            for index, layer in enumerate(layers):
                decoder_layers(outs[-1], LayerStack([layer]), row_pass, first_slot_layer=index)
        else:
            for layers_of_call in calls:
                decoder_layers(outs[-1], stack, row_pass, layers_of_call)
    for out, store in zip(outs[1:], slots[1:], strict=True):
        assert torch.equal(out, outs[0])
        # Rows behind the segment were never written: they hold whatever the memory held.
        pairs = zip(store.stores, slots[0].stores, strict=True)
        assert all(torch.equal(got[:, :, :, :6], want[:, :, :, :6]) for got, want in pairs)


def test_attention_without_a_norm_before_it_reads_the_rows_as_they_are() -> None:
    machine = Machine(build("llama"))
    hidden = (
        torch.nn.functional.normalize(torch.randn(5, 64), dim=-1) * 8
    )  # rows whose norm with weight 1 changes nothing
    machine.layer = dataclasses.replace(machine.layer, input_norm=torch.ones(64))
    wanted = machine.prefill(0, hidden, 5)
    machine.layer = dataclasses.replace(machine.layer, input_norm=None)
    torch.testing.assert_close(machine.prefill(1, hidden, 5), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(machine.prefill(1, 2 * hidden, 5) - hidden, wanted, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_saved_layer_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    machine = Machine(build(kind), 4)
    hidden = torch.randn(5, 64)
    wanted = machine.prefill(0, hidden, 5)
    save_packed(tmp_path / "layer.safetensors", layer_tensors(machine.layer, "layers.0"))
    loaded = load_packed(tmp_path / "layer.safetensors")
    machine.layer = layer_from_tensors(loaded, "layers.0", machine.model.layers[0])
    assert torch.equal(machine.prefill(1, hidden, 5), wanted)
    with pytest.raises(ValueError, match=r"holds no layers\.1\.qkv"):
        layer_from_tensors(loaded, "layers.1", machine.model.layers[0])


def test_packing_errors_name_every_matrix() -> None:
    model = build("llama")
    errors = packing_errors(model.layers[0], pack_decoder_layer(model.layers[0], 4))
    assert list(errors) == ["qkv", "output", "gate_up", "down"]
    assert all(0.01 < error.relative < 0.1 for error in errors.values())


def split(packed: PackedWeight, sizes: Sequence[int]) -> tuple[PackedWeight, ...]:
    """The same codes as several packed matrices."""
    whole = unpack(packed)
    assert isinstance(whole, QuantisedWeight)
    parts = zip(torch.split(whole.codes, list(sizes)), torch.split(whole.scale, list(sizes)), strict=True)
    return tuple(pack_quantised(dataclasses.replace(whole, codes=codes, scale=scale)) for codes, scale in parts)


@pytest.mark.parametrize("normed", [True, False])
def test_joined_matrices_may_lie_in_parts_of_their_own_formats(normed: bool, tmp_path: Path) -> None:
    machine = Machine(build("llama-biased"), 8)
    if not normed:
        machine.layer = dataclasses.replace(machine.layer, input_norm=None)
    hidden = torch.randn(5, 64)
    wanted = machine.prefill(0, hidden, 5)
    (qkv,), (gate_up,) = machine.layer.qkv, machine.layer.gate_up
    machine.layer = dataclasses.replace(machine.layer, qkv=split(qkv, (64, 32, 32)), gate_up=split(gate_up, (96, 96)))
    assert torch.equal(machine.prefill(0, hidden, 5), wanted)
    key = split(qkv, (64, 32, 32))[1]
    wide = pack(dequantise(key), 32)
    machine.layer = dataclasses.replace(machine.layer, qkv=(machine.layer.qkv[0], wide, machine.layer.qkv[2]))
    mixed = machine.prefill(0, hidden, 5)
    torch.testing.assert_close(mixed, wanted, rtol=0.05, atol=0.05)
    if normed:
        save_packed(tmp_path / "layer.safetensors", layer_tensors(machine.layer, "layers.0"))
        stored = load_packed(tmp_path / "layer.safetensors")
        machine.layer = layer_from_tensors(stored, "layers.0", machine.model.layers[0])
        assert torch.equal(machine.prefill(0, hidden, 5), mixed)
    with pytest.raises(ValueError, match="the matrices of qkv must have 128 outputs together, got 96"):
        dataclasses.replace(machine.layer, qkv=machine.layer.qkv[:2])
