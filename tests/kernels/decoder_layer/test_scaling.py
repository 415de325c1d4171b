import copy

import pytest
import torch
from torch import nn

from doubles import tiny_llama, tiny_qwen3
from kernels.decoder_layer import pack_decoder_layer, packing_errors, unpack_decoder_layer
from kernels.decoder_layer.scaling import record_inputs, scale_layer


def layer_of(model: nn.Module, heads: int) -> tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    config = model.config
    config.intermediate_size, config.head_dim, config.num_key_value_heads = 96, 32, heads
    torch.manual_seed(0)
    whole = type(model)(config).eval()
    hidden = torch.randn(1, 40, config.hidden_size)
    hidden[..., 3] *= 30  # a channel that matters more than others
    return whole.model.layers[0], hidden, whole.model.rotary_emb(hidden, torch.arange(40)[None])


@torch.inference_mode()
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
@pytest.mark.parametrize("heads", [2, 4])
def test_scaling_keeps_the_layer_in_floats_and_lowers_the_error_in_codes(make: object, heads: int) -> None:
    layer, hidden, angles = layer_of(make(), heads)

    def run() -> torch.Tensor:
        return layer(hidden, position_embeddings=angles, attention_mask=None)

    wanted = run()
    shared = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    originals = list(layer.parameters())
    found = scale_layer(layer, record_inputs(layer, run), 4, 32)
    torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-4)
    assert {scaled.name for scaled in found} >= {"qkv", "gate_up", "down"}
    assert ("output" in {scaled.name for scaled in found}) == (heads == 4)
    assert all(scaled.error <= scaled.plain_error for scaled in found)
    assert any(scaled.power > 0 and scaled.error < 0.9 * scaled.plain_error for scaled in found)
    for (name, value), original in zip(shared.items(), originals, strict=True):
        assert torch.equal(value, original), f"{name} was written to"


def test_unpacking_gives_back_what_was_packed() -> None:
    layer, _, _ = layer_of(tiny_qwen3(), 2)
    packed = pack_decoder_layer(layer, 8)
    other = copy.deepcopy(layer).to("meta")
    unpack_decoder_layer(packed, other, torch.float32)
    for (name, value), original in zip(other.named_parameters(), layer.parameters(), strict=True):
        assert (value - original).norm() <= 0.01 * original.norm(), name
    assert all(error.relative < 1e-3 for error in packing_errors(other, packed).values())
