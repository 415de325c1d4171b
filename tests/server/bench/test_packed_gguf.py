from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from doubles import tiny_llama, tiny_qwen3
from server.targets.gguf.vocabulary import GGUFError
from server.targets.packed_model import pack_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed (make gguf)")

from server.bench.packed_gguf import write_packed_gguf  # noqa: E402
from server.targets.stock_target import unpacked_model  # noqa: E402


@pytest.mark.parametrize("weights", ["int4", "int8", "bf16"])
def test_llama_cpp_gets_the_same_weights(save_model: Callable[..., Path], tmp_path: Path, weights: str) -> None:
    model = tiny_llama()
    model.config.intermediate_size = 160
    torch.manual_seed(0)
    folder = save_model(type(model)(model.config).eval(), "gguf")
    packed = pack_model(folder, weights)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(write_packed_gguf(packed, tmp_path / "x.gguf")).tensors}
    layer = unpacked_model(packed).float().model.layers[1]
    heads, width = model.config.num_attention_heads, layer.self_attn.q_proj.in_features
    query = layer.self_attn.q_proj.weight.reshape(heads, 2, -1, width).transpose(1, 2).reshape(-1, width)
    for name, wanted in (
        ("attn_q", query), ("attn_v", layer.self_attn.v_proj.weight), ("attn_output", layer.self_attn.o_proj.weight),
        ("ffn_gate", layer.mlp.gate_proj.weight), ("ffn_up", layer.mlp.up_proj.weight),
        ("ffn_down", layer.mlp.down_proj.weight), ("ffn_norm", layer.post_attention_layernorm.weight),
    ):  # fmt: skip
        tensor = stored[f"blk.1.{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # unpacking rounds to bf16
        np.testing.assert_allclose(values.reshape(wanted.shape), wanted.numpy(), rtol=0.005, atol=1e-5)


def test_other_groups_and_architectures_are_refused(save_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.hidden_size, model.config.intermediate_size = 64, 128
    folder = save_model(type(model)(model.config), "groups")
    with pytest.raises(GGUFError, match="symmetric groups of 32"):
        write_packed_gguf(pack_model(folder, "int4", group_size=64), tmp_path / "x.gguf")
    qwen = tiny_qwen3()
    qwen.config.intermediate_size, qwen.config.head_dim = 160, 32
    folder = save_model(type(qwen)(qwen.config), "qwen")
    with pytest.raises(GGUFError, match="Qwen3ForCausalLM"):
        write_packed_gguf(pack_model(folder, "int4"), tmp_path / "y.gguf")
