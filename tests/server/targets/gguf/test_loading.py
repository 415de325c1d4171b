import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

from drafters.proposal import Proposal
from kernels.linear_lowbit import QuantisedWeight, dequantise
from server.launch import load_codec
from server.targets.context import Wanted
from server.targets.gguf.blocks import DECODERS, FLOATS
from server.targets.gguf.configuration import read_configuration
from server.targets.gguf.header import open_gguf
from server.targets.gguf.loading import load_gguf_target, pack_stored
from server.targets.gguf.weights import GGUFWeights, pack_parts
from server.targets.loading import memory_plan
from server.targets.native_target import NativeTarget
from server.targets.packed_model import model_of
from server.targets.target import PrefillChunk, VerifyRows

Kind = GGMLQuantizationType
NEAR = 0.1  # what activations of 8 bits and keys and values in bf16 may change
IDS = [5, 9, 40, 77, 3, 99, 60, 61, 62, 12]


def logits(target: Any) -> torch.Tensor:
    return target.prefill(PrefillChunk(0, IDS)).logits


def truth(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0, -1]


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Weights drawn at random make attention sharp; wrong rows or codes give an error of about 1."""
    return bool((got - want).norm() < NEAR * want.norm())


@pytest.mark.parametrize("kind", [*FLOATS, *DECODERS], ids=lambda kind: kind.name)
def test_every_type_is_exact_and_computed_natively(kind: Kind, tiny_gguf: Any, tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf", kind)
    model = tiny_gguf.model(kind)
    opened = open_gguf(file)
    weights = GGUFWeights(opened, read_configuration(opened))
    for name, want in model.state_dict().items():
        if name != "lm_head.weight":
            # gguf-py rounds the product before it subtracts a minimum.
            torch.testing.assert_close(weights.read(name).float(), want, atol=1e-7, rtol=1e-6)
    packed = pack_stored(model_of(weights.config, file), weights)
    for layer, module in zip(packed.layers, model.model.layers, strict=True):
        attention = module.self_attn
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        torch.testing.assert_close(torch.cat([dequantise(part) for part in layer.qkv]), qkv, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(dequantise(layer.down), module.mlp.down_proj.weight, atol=1e-7, rtol=1e-6)
    target = load_gguf_target(file, None, 1, 64)
    assert isinstance(target, NativeTarget)
    assert near(logits(target), truth(model))


MIXED = {"attn_v": Kind.Q6_K, "ffn_down": Kind.Q6_K, "attn_k": Kind.Q4_K, "token_embd": Kind.Q8_0}


@pytest.mark.parametrize(
    ("default", "kinds"), [(Kind.Q4_K, MIXED), (Kind.Q4_1, {"attn_k": Kind.F16, "ffn_up": Kind.IQ4_NL})]
)
def test_matrices_of_one_layer_may_differ(
    default: Kind, kinds: dict[str, Kind], tiny_gguf: Any, tmp_path: Path
) -> None:
    target = load_gguf_target(tiny_gguf.write(tmp_path / "mixed.gguf", default, kinds, tied=False), None, 1, 64)
    assert isinstance(target, NativeTarget)
    assert near(logits(target), truth(tiny_gguf.model(default, kinds, tied=False)))
    assert not torch.equal(target.lm_head(), target.embedding())


def test_matrices_of_one_input_stay_in_their_own_formats() -> None:
    def codes(bits: int, rows: int) -> QuantisedWeight:
        return QuantisedWeight(
            torch.randint(0, 2**bits, (rows, 64), dtype=torch.uint8), torch.rand(rows, 2).half(), None, bits, 32
        )

    q, k, v = codes(4, 40), codes(4, 8), codes(8, 8)
    parts = pack_parts([q, k, v])
    assert [(part.bits, part.out_features) for part in parts] == [(4, 48), (8, 8)]
    whole = torch.cat([dequantise(part) for part in parts])
    assert torch.equal(whole, torch.cat([part.dequantise() for part in (q, k, v)]))
    floats = pack_parts([torch.rand(8, 64).half(), torch.rand(8, 64).bfloat16(), torch.rand(8, 64).bfloat16()])
    assert [(part.bits, part.out_features) for part in floats] == [(32, 8), (16, 16)]


def test_other_weights_are_packed_from_the_files_values(tiny_gguf: Any, tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf", Kind.Q4_1)
    want = truth(tiny_gguf.model(Kind.Q4_1))
    for weights, tolerance in (("fp32", 1e-4), ("bf16", NEAR), ("int8", NEAR)):
        target = load_gguf_target(file, weights, 1, 64)
        assert isinstance(target, NativeTarget) and target.info.weights == weights
        assert (logits(target) - want).norm() < tolerance * want.norm(), weights


def test_tensors_without_a_place_are_named(tiny_gguf: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def spare(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_sinks.weight", torch.ones(4).numpy())

    file = tiny_gguf.write(tmp_path / "tiny.gguf", extra=spare)
    for weights in (None, "int8"):
        caplog.clear()
        load_gguf_target(file, weights, 1, 64)
        assert caplog.text.count("tensors that are not used: blk.0.attn_sinks.weight") == 1


def test_drafted_rows_are_bit_equal_to_plain_ones(tiny_gguf: Any, tmp_path: Path) -> None:
    target = load_gguf_target(tiny_gguf.write(tmp_path / "tiny.gguf", Kind.Q4_K, MIXED), None, 2, 64)
    for slot in (0, 1):
        target.prefill(PrefillChunk(slot, IDS))
    tree = Proposal((7, 8, 9), (None, 0, 1), (0.0, 0.0, 0.0))
    (together,) = target.verify([VerifyRows(0, 6, tree)])
    for row, token_id in enumerate((6, 7, 8, 9)):
        (alone,) = target.verify([VerifyRows(1, token_id, Proposal((), (), ()))])
        target.keep(1, [0])
        assert torch.equal(alone.logits(0), together.logits(row))


def test_split_files_are_one_model(tiny_gguf: Any, tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf", split=5)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    whole = load_gguf_target(tiny_gguf.write(tmp_path / "whole.gguf"), None, 1, 64)
    assert torch.equal(logits(load_gguf_target(parts[0], None, 1, 64)), logits(whole))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def test_rope_factors_of_the_file_scale_the_frequencies(tiny_gguf: Any, tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=256, rope_parameters=LLAMA3,
                         num_hidden_layers=1, intermediate_size=32, vocab_size=8)  # fmt: skip
    scaled = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)

    def factors(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())

    target = load_gguf_target(tiny_gguf.write(tmp_path / "tiny.gguf", extra=factors), None, 1, 64)
    assert torch.allclose(target.model.base_model.rotary_emb.inv_freq, scaled, rtol=1e-5)


def test_linear_and_yarn_scaling_are_read(tiny_gguf: Any, tmp_path: Path) -> None:
    for kind in ("linear", "yarn"):

        def scaling(writer: GGUFWriter, kind: str = kind) -> None:
            writer.add_string("llama.rope.scaling.type", kind)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(64)

        file = tiny_gguf.write(tmp_path / f"{kind}.gguf", extra=scaling)
        parameters = read_configuration(open_gguf(file)).rope_parameters
        assert (parameters["rope_type"], parameters["factor"]) == (kind, 4.0)


@pytest.mark.parametrize("key", ["factor", "scale_linear"])
def test_a_factor_without_a_type_is_linear(key: str, tiny_gguf: Any, tmp_path: Path) -> None:
    def scaling(writer: GGUFWriter) -> None:
        writer.add_float32("llama.rope.scaling.factor" if key == "factor" else "llama.rope.scale_linear", 4.0)

    parameters = read_configuration(open_gguf(tiny_gguf.write(tmp_path / "tiny.gguf", extra=scaling))).rope_parameters
    assert (parameters["rope_type"], parameters["factor"]) == ("linear", 4.0)


def test_heads_that_the_native_layers_do_not_compute_run_on_transformers(
    tiny_gguf: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf", heads=32, extra=lambda writer: writer.add_key_length(8))
    # The file's k and v have 128 rows: 16 heads of 8.
    data = file.read_bytes().replace(b"head_count_kv\x04\0\0\0\x02", b"head_count_kv\x04\0\0\0\x10")
    file.write_bytes(data)
    target = load_gguf_target(file, None, 1, 64)
    assert not isinstance(target, NativeTarget) and target.info.weights == "fp32"
    assert "multiples of 16" in caplog.text


def test_codec_context_and_stop_ids_come_from_the_file(tiny_gguf: Any, tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    codec = load_codec(file)
    assert memory_plan(file, Wanted(), 1, None).context == 256
    assert codec.stop_ids == {0, 2}
    ids = codec.encode("the 12<|im_end|>")
    assert [tiny_gguf.tokens[i] for i in ids] == ["the", "Ġ", "1", "2", "<|im_end|>"]
    assert codec.tokenizer.decode(ids) == "the 12"
    assert codec.chat([{"role": "user", "content": "<|im_end|>"}])[:2] == [1, tiny_gguf.tokens.index("<")]
    assert list(itertools.accumulate(codec.stream().push(i) for i in ids))[-1] == "the 12"
