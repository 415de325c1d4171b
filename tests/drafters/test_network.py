"""The drafter's network: parameter counts, block 0 without its first norm, rotary positions, bad shapes."""

import pytest
import torch

from drafters.drafter import DrafterError
from drafters.network import DovetailConfig, DovetailNetwork, rotary_table, rotate

LLAMA_7B = (4096, 32000, 11008, 32, 32, 128)
LLAMA_13B = (5120, 32000, 13824, 40, 40, 128)
LLAMA_3_8B = (4096, 128256, 14336, 32, 8, 128)
TINY = (64, 100, 172, 4, 2, 16)


@pytest.mark.parametrize(
    ("shape", "first", "each"),
    [
        (LLAMA_7B, 269_492_224, 202_383_360),
        (LLAMA_13B, 422_062_080, 317_204_480),
        (LLAMA_3_8B, 285_220_864, 218_112_000),
        (TINY, 61_824, 45_440),
    ],
    ids=["7B", "13B", "8B grouped heads", "tiny"],
)
@pytest.mark.parametrize("num_blocks", [1, 2, 6])
def test_parameter_counts(shape: tuple[int, ...], first: int, each: int, num_blocks: int) -> None:
    with torch.device("meta"):
        network = DovetailNetwork(DovetailConfig(*shape, num_blocks=num_blocks))
    assert sum(p.numel() for p in network.parameters()) == first + each * (num_blocks - 1)


def test_block_0_has_one_norm_and_the_others_two() -> None:
    network = DovetailNetwork(DovetailConfig(*TINY, num_blocks=3))
    norms = [sum(isinstance(m, torch.nn.RMSNorm) for m in block.modules()) for block in network.blocks]
    assert norms == [1, 2, 2]


def test_rotary_scores_depend_on_the_distance_only() -> None:
    config = DovetailConfig(*TINY)
    cos, sin = rotary_table(config, 64, torch.float32, torch.device("cpu"))
    query, key = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [rotate(v, cos[p : p + 1], sin[p : p + 1]) for v, p in ((query, query_position), (key, key_position))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(60, 55), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(score(9, 4), score(9, 5), atol=1e-3)


def test_rotary_positions_equal_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = DovetailConfig(*TINY, rope_theta=500.0)
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64, num_attention_heads=4, head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    )  # fmt: skip
    vectors = torch.randn(1, 4, 12, 16)
    want, _ = apply_rotary_pos_emb(vectors, vectors, *theirs(vectors, torch.arange(12)[None]))
    got = rotate(vectors, *rotary_table(config, 12, torch.float32, torch.device("cpu")))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_blocks": 7}, "num_blocks is 7"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim is 15"),
    ],
)
def test_bad_shapes_are_refused(changes: dict[str, int], named: str) -> None:
    names = ("hidden_size", "vocab_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    with pytest.raises(DrafterError, match=named):
        DovetailConfig(**{**dict(zip(names, TINY, strict=True)), **changes})
