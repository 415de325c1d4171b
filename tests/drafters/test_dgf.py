"""Dynamic Gating Fusion: hand-computed values and what must hold for any weights."""

import pytest
import torch

from drafters.dgf import DynamicGatingFusion


def fusion_with_identity(gate: torch.Tensor) -> DynamicGatingFusion:
    fusion = DynamicGatingFusion(2)
    with torch.no_grad():
        fusion.feature_proj.weight.copy_(torch.eye(2))
        fusion.embedding_proj.weight.copy_(torch.eye(2))
        fusion.gate_proj.weight.copy_(gate)
    return fusion


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (torch.zeros(2, 4), [0.79709442, -0.07228991]),
        (torch.cat((torch.eye(2), torch.zeros(2, 2)), dim=1), [0.89086057, 0.35642084]),
    ],
    ids=["closed gate weights", "gate reads the feature"],
)
def test_hand_computed_values(gate: torch.Tensor, expected: list[float]) -> None:
    got = fusion_with_identity(gate)(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=0)


def test_result_lies_between_the_branches() -> None:
    torch.manual_seed(0)
    fusion = DynamicGatingFusion(16)
    features, embeddings = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    fused = fusion(features, embeddings)
    feature_branch = fusion.feature_proj(features)
    token_branch = torch.nn.functional.silu(fusion.embedding_proj(fusion.embedding_norm(embeddings)))
    low, high = torch.minimum(feature_branch, token_branch), torch.maximum(feature_branch, token_branch)
    assert fused.shape == features.shape
    assert bool(((fused >= low - 1e-6) & (fused <= high + 1e-6)).all())


def test_only_the_scale_of_the_embedding_is_forgotten() -> None:
    torch.manual_seed(0)
    fusion = DynamicGatingFusion(16)
    features, embeddings = torch.randn(5, 16), torch.randn(5, 16)
    fused = fusion(features, embeddings)
    torch.testing.assert_close(fusion(features, embeddings * 7.0), fused, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fusion(features * 7.0, embeddings), fused, atol=1e-2)


def test_xavier_uniform_bounds() -> None:
    torch.manual_seed(0)
    fusion = DynamicGatingFusion(64)
    for weight, bound in ((fusion.feature_proj.weight, (6 / 128) ** 0.5), (fusion.gate_proj.weight, (6 / 192) ** 0.5)):
        assert 0.9 * bound < weight.abs().max() <= bound


def test_parameter_count() -> None:
    assert sum(p.numel() for p in DynamicGatingFusion(64).parameters()) == 4 * 64**2 + 64
