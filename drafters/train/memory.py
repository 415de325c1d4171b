"""What training a drafter takes in memory, told before anything is allocated.

The target is no part of it: it computes its features in main memory, before or beside the training, and lends its
embedding and LM head. Not counted are what the device's driver and allocator keep for themselves (on CUDA about half a
gigabyte).

``a`` is the bytes of an activation: 2 under bf16 or fp16, else 4. The sums follow what autograd keeps of a
``DrafterTask`` for each position; a test counts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

from drafters.network import DovetailConfig, DovetailNetwork
from kernels.training import TrainingOptions

CHUNK_LOGITS = 2**24
"""Logits of one chunk of positions and all steps: 64 MiB in fp32, of which the losses hold a handful of copies."""

FP32 = 4
TARGET_COPIES = 2  # in one chunk: the target's logits and probabilities
DRAFT_COPIES = 4  # and of each step logits, log-probabilities, probabilities and a gradient


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the training device.

    parameters: fp32, with their copies in the type of mixed precision; optimizer: the state of AdamW, Muon or SGD;
    borrowed: the target's embedding and LM head; activations: what the backward pass reads, and the widest gradient in
    flight; logits: the losses' share, for one chunk of positions where they are many.
    """

    parameters: int
    gradients: int
    optimizer: int
    borrowed: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in asdict(self).items())
        return f"{self.total / 1e9:.2f} GB ({parts})"


def estimate_memory(
    config: DovetailConfig,
    options: TrainingOptions,
    length: int,
    unrolled_steps: int = 1,
    borrowed: int | None = None,
    num_processes: int = 1,
) -> MemoryEstimate:
    """The estimate for batches of ``options.batch_size`` samples of ``length`` tokens.

    borrowed: bytes of the target's embedding and LM head, None for untied ones in bf16. Every position is taken to
    count in the loss, so conversations take less.
    """
    with torch.device("meta"):
        network = DovetailNetwork(config)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    mixed = options.precision != "fp32"
    positions = options.batch_size * length
    return MemoryEstimate(
        parameters=num_parameters * (FP32 + 2 * mixed),
        gradients=num_parameters * FP32 * (2 if num_processes > 1 else 1),  # several processes: reduction buckets
        optimizer=sum(optimizer_numbers(network, options.optimizer)) * FP32,
        borrowed=2 * 2 * config.vocab_size * config.hidden_size if borrowed is None else borrowed,
        activations=activations(config, positions, length, 2 if mixed else FP32, unrolled_steps),
        logits=logits(config.vocab_size, positions, unrolled_steps),
    )


def optimizer_numbers(network: nn.Module, optimizer: str) -> Iterator[int]:
    """Numbers of state for each parameter: AdamW keeps two moments, Muon one for a matrix, SGD its momentum."""
    for parameter in network.parameters():
        has_one = optimizer == "sgd" or (optimizer == "muon" and parameter.ndim == 2)
        yield parameter.numel() * (1 if has_one else 2)


def activations(config: DovetailConfig, positions: int, length: int, a: int, steps: int) -> int:
    """Bytes that the forward pass leaves for the backward pass, and the widest gradient of an MLP."""
    hidden, inner, num_layers = config.hidden_size, config.intermediate_size, len(config.feature_layers)
    width = num_layers * hidden
    # Features and noise, what is predicted, its positions that count, and the projection's input.
    inputs = FP32 * (2 * width + 2 * hidden) + (a * width if num_layers > 1 else 0)
    # DGF: the normalised embedding, its cast, both branches, the gate and their products. Linear: both side by side.
    fusion = hidden * (8 * a + FP32) if config.fusion == "dgf" else hidden * 2 * a
    losses = (FP32 + a) * hidden  # predicted features, and their gradient through the LM head
    step = fusion + losses + sum(block_activations(config, index, a) for index in range(config.num_blocks))
    if steps > 1:
        # Fused attention keeps no scores; unrolled steps keep them, their cast if there is one, and the mask.
        cast = 0 if a == FP32 else a
        step += config.num_blocks * length * (config.num_heads * (FP32 + cast) + 1)
    return positions * (inputs + steps * step + 4 * a * inner)


def block_activations(config: DovetailConfig, index: int, a: int) -> int:
    """Bytes of one Llama block, a position."""
    norms = 2 * FP32 * config.hidden_size * (1 if index == 0 else 2)
    attention = 3 * a * (config.num_heads + config.num_kv_heads) * config.head_dim + FP32 * config.num_heads
    return norms + 2 * a * config.hidden_size + attention + 4 * a * config.intermediate_size


def chunk_rows(vocab_size: int, steps: int) -> int:
    """Positions whose logits are computed at a time."""
    return max(1, CHUNK_LOGITS // (vocab_size * steps))


def logits(vocab_size: int, positions: int, steps: int) -> int:
    """Bytes of the losses over the vocabulary, one chunk of them."""
    rows = min(positions, chunk_rows(vocab_size, steps))
    return FP32 * vocab_size * rows * (TARGET_COPIES + DRAFT_COPIES * steps)
