"""The memory estimate: against what autograd keeps, and the sizes that a 7B-shape target's drafters must fit."""

from typing import Any

import pytest
import torch

from drafters.network import DovetailConfig, DovetailNetwork
from drafters.train.drafter_task import DrafterTask
from drafters.train.feature_source import OnTheFlySource, training_layers
from drafters.train.memory import MemoryEstimate, activations, estimate_memory
from drafters.train.options import LossOptions
from kernels.training import TrainingOptions

GB = 10**9
LENGTH, VOCAB = 128, 50


def kept_bytes(config: DovetailConfig, steps: int, mixed: bool) -> int:
    """Bytes of all storages that the forward pass of one window leaves for the backward pass, weights aside."""
    hidden = config.hidden_size
    embedding = torch.randn(VOCAB, hidden, dtype=torch.bfloat16 if mixed else torch.float32)
    unused: Any = None
    source = OnTheFlySource(unused, embedding, embedding, "tiny", unused)
    task = DrafterTask(DovetailNetwork(config), source, LossOptions(unrolled_steps=steps))
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids, mask = torch.randint(0, VOCAB, (1, LENGTH)), torch.ones(1, LENGTH)
    features = torch.randn(1, LENGTH, hidden * len(training_layers(config.features)))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        task(ids, mask, features)
    for parameter in [*task.parameters(), embedding]:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 1), ({"num_blocks": 3, "num_kv_heads": 2}, 1), ({"fusion": "linear", "num_blocks": 2}, 3),
     ({"features": "low+mid+high"}, 4)],
    ids=["one block", "three blocks", "linear unrolled", "three layers unrolled"],
)  # fmt: skip
def test_activations_are_what_autograd_keeps(changes: dict[str, Any], steps: int, mixed: bool) -> None:
    shape = {"intermediate_size": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16} | changes
    config = DovetailConfig(hidden_size=64, vocab_size=VOCAB, **shape)
    a = 2 if mixed else 4
    width = 64 * len(config.feature_layers)
    estimated = activations(config, LENGTH, LENGTH, a, steps)
    # Counted besides: the batch itself, the widest gradient, the weights' copies and, dropped again before the
    # backward pass, a single chunk's probabilities and log-probabilities.
    estimated -= LENGTH * (4 * (2 * width + 64) + 4 * a * 256)
    estimated += LENGTH * VOCAB * 4 * 2 * steps
    estimated += 2 * mixed * sum(parameter.numel() for parameter in DovetailNetwork(config).parameters())
    assert estimated == pytest.approx(kept_bytes(config, steps, mixed), rel=0.05)


def estimate_7b(num_blocks: int, **changes: Any) -> MemoryEstimate:
    config = DovetailConfig(4096, 32_000, 11_008, 32, 32, 128, num_blocks=num_blocks)
    options = TrainingOptions("out", steps=1, **{"batch_size": 1, "precision": "bf16"} | changes)
    return estimate_memory(config, options, length=2048)


@pytest.mark.parametrize(("num_blocks", "limit_gb"), [(1, 16), (2, 16), (3, 16), (5, 24)])
def test_drafters_of_a_7b_target_fit_the_gpus_they_must_fit(num_blocks: int, limit_gb: int) -> None:
    """In bf16 at batch 1 of 2048 tokens; the target is in main memory and lends embedding and head in bf16."""
    assert estimate_7b(num_blocks).total < limit_gb * GB


def test_the_parts_of_an_estimate() -> None:
    estimate = estimate_7b(3)
    assert estimate.gradients == 4 * 674_258_944  # reference count of DGF+2
    assert estimate.parameters == 6 * 674_258_944
    assert estimate.optimizer == 8 * 674_258_944
    assert estimate.borrowed == 2 * 2 * 32_000 * 4096
    assert estimate.logits < 0.5 * GB < 2 * 4 * 2048 * 32_000  # of all positions, both sides alone take more
    assert estimate_7b(3, precision="fp32").parameters == 4 * 674_258_944
    assert estimate_7b(3, optimizer="sgd").optimizer == 4 * 674_258_944
    assert estimate_7b(3, optimizer="muon").optimizer == pytest.approx(4 * 674_258_944, rel=1e-3)
    assert str(estimate).startswith(f"{estimate.total / 1e9:.2f} GB (parameters 4.05, gradients 2.70")


def test_steps_batch_and_processes_cost_memory() -> None:
    config = DovetailConfig(64, 50, 256, 4, 2, 16)
    options = TrainingOptions("out", steps=1, batch_size=2)
    once, thrice = (estimate_memory(config, options, 128, unrolled_steps=steps) for steps in (1, 3))
    assert thrice.activations > 3 * once.activations / 1.2
    assert thrice.parameters == once.parameters
    assert estimate_memory(config, options, 128, num_processes=2).gradients == 2 * once.gradients
