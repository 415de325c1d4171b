"""Every architecture's native layers against transformers' own, and their rows bit-equal in trees and batches."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from architectures import ARCHITECTURES, tiny_model
from kernels import native
from kernels.decoder_layer import (
    LayerPass,
    LayerStack,
    UnsupportedLayer,
    decoder_layers,
    layer_form,
    pack_decoder_layer,
    rotary_kinds,
    unpack_decoder_layer,
)
from kernels.tree_attention import KVSlots, Segment, causal_segment, tree_segment

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
CPU = torch.device("cpu")
LENGTH = 140
PARENTS = [-1, 0, 0, 1, 3, 2]
DEPTHS = [0, 1, 1, 2, 3, 2]


class Machine:
    """A model's packed layers over slots, and the inputs and outputs of transformers' own on one text."""

    def __init__(self, name: str, bits: int = 32, kv: torch.dtype = torch.float32) -> None:
        self.model = tiny_model(name)
        self.stack = LayerStack([pack_decoder_layer(layer, bits) for layer in self.model.base_model.layers])
        self.slots = KVSlots(3, LENGTH + 10, len(self.stack), self.stack.num_kv_heads, self.stack.head_dim, kv, CPU)

    def twin(self, token_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            before = arguments[0] if arguments else keywords["hidden_states"]
            seen.append((before[0], (output[0] if isinstance(output, tuple) else output).reshape(before[0].shape)))

        for layer in self.model.base_model.layers:
            layer.register_forward_hook(keep, with_kwargs=True)
        self.model(token_ids[None], use_cache=False)
        return seen

    def run(
        self, hidden: Tensor, segments: Sequence[Segment], positions: Sequence[int], layers: range | None = None
    ) -> Tensor:
        base, kinds = self.model.base_model, rotary_kinds(self.model.config)
        given = [{} if kind is None else {"layer_type": kind} for kind in kinds]
        turns = [base.rotary_emb(hidden[None], torch.tensor([list(positions)]), **which) for which in given]
        cosine, sine = (torch.cat(parts) for parts in zip(*turns, strict=True))
        out = hidden.clone()
        decoder_layers(out, self.stack, LayerPass(self.slots, segments, cosine, sine), layers)
        return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_equals_transformers_own(name: str) -> None:
    machine = Machine(name)
    torch.manual_seed(1)
    twins = machine.twin(torch.randint(1, 96, (LENGTH,)))
    for instructions in native.available_instruction_sets():
        with native.use_instruction_set(instructions):
            for index, (before, wanted) in enumerate(twins):
                got = machine.run(before, [causal_segment(0, 0, LENGTH)], range(LENGTH), range(index, index + 1))
                assert (got - wanted).norm() < 2e-6 * (wanted - before).norm(), f"layer {index}, {instructions}"


@pytest.mark.parametrize(
    ("name", "bits", "kv"),
    [("mistral", 8, torch.bfloat16), ("qwen2", 4, torch.int8), ("gemma2", 32, torch.float32),
     ("gemma3_text", 4, torch.bfloat16), ("gemma2", 8, torch.int8), ("phi3", 8, torch.bfloat16),
     ("granite", 4, torch.float32), ("smollm3", 8, torch.int8), ("olmo2", 4, torch.bfloat16),
     ("glm4", 8, torch.float32), ("stablelm", 4, torch.bfloat16)],
)  # fmt: skip
def test_rows_are_bit_equal_alone_in_chunks_and_in_trees(name: str, bits: int, kv: torch.dtype) -> None:
    machine = Machine(name, bits, kv)
    torch.manual_seed(2)
    text, drafted = torch.randn(LENGTH, 64), torch.randn(6, 64)
    whole = machine.run(text, [causal_segment(0, 0, LENGTH)], range(LENGTH))
    for chunk in (64, 37):
        starts = range(0, LENGTH, chunk)
        rows = [text[start : start + chunk] for start in starts]
        parts = [
            machine.run(part, [causal_segment(1, start, len(part))], range(start, start + len(part)))
            for start, part in zip(starts, rows, strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
    segments = [causal_segment(2, 0, 3), tree_segment(0, LENGTH, PARENTS, CPU)]
    beside = torch.cat([torch.randn(3, 64), drafted])
    tree = machine.run(beside, segments, [0, 1, 2, *(LENGTH + depth for depth in DEPTHS)])[3:]
    for path in ([0, 1, 3, 4], [0, 2, 5]):
        for depth, row in enumerate(path):
            place = LENGTH + depth
            plain = machine.run(drafted[row][None], [causal_segment(1, place, 1)], [place])
            assert torch.equal(plain[0], tree[row])


@pytest.mark.parametrize("name", ["gemma2", "phi3", "glm4", "stablelm"])
def test_an_unpacked_layer_is_the_one_that_was_packed(name: str) -> None:
    layer, empty = tiny_model(name).base_model.layers[1], tiny_model(name).base_model.layers[1].to("meta")
    unpack_decoder_layer(pack_decoder_layer(layer, 32), empty, torch.float32)
    for key, values in layer.state_dict().items():
        torch.testing.assert_close(empty.state_dict()[key], values, rtol=0, atol=1e-7)


def test_what_a_layer_computes_is_read_off_its_configuration() -> None:
    forms = {name: [layer_form(layer) for layer in tiny_model(name).base_model.layers] for name in ARCHITECTURES}
    assert [form.window for form in forms["qwen2"]] == [None, None, 41, 41]
    assert [form.window for form in forms["gemma3_text"]] == [24, 24, 24, None]
    assert [form.angles for form in forms["gemma3_text"]] == [1, 1, 1, 0]
    assert [form.angles for form in forms["smollm3"]] == [0, None, 0, None]
    assert forms["gemma2"][0].score_cap == 3.0 and forms["gemma2"][0].activation == "gelu_tanh"
    assert forms["granite"][0].residual_scale == 0.7 and forms["granite"][0].scale == 0.4
    assert forms["olmo2"][0].whole_norms and forms["stablelm"][0].centred


def test_what_the_layers_cannot_compute_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayer, match=r"StableLmDecoderLayer is put together in another way \(.*norm"):
        layer_form(tiny_model("stablelm", use_parallel_residual=True).base_model.layers[0])
    with pytest.raises(UnsupportedLayer, match="activation 'gelu'"):
        layer_form(tiny_model("llama", hidden_act="gelu").base_model.layers[0])
    odd = tiny_model("llama")
    odd.config.model_type = "odd"
    with pytest.raises(UnsupportedLayer, match="layers of odd models are not native; those of llama, mistral"):
        layer_form(odd.base_model.layers[0])
