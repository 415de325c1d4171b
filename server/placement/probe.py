"""What one layer and the head of a model cost on this machine, measured: the CPU's half of a prediction.

Rooflines know bandwidth and the arithmetic peak; what a format costs to unpack, what threads lose by waiting for others
and what attention adds, only a layer itself can say. One layer is enough: a pass is so many of them, then the head.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.decoder_layer import LayerPass, LayerStack, PackedDecoderLayer, decoder_layers, head_argmax
from kernels.linear_lowbit import PackedWeight
from kernels.tree_attention import KVSlots, causal_segment

ROWS = (1, 2, 4, 8, 16)
COPIES_BYTES = 320 * 2**20  # of copies together, so that a pass finds no more in caches than the model's would
REPEATS = 5


@dataclass(frozen=True)
class Probe:
    """Milliseconds by rows of a pass: of one layer at ``context``, and of the head with its arg-max."""

    layer_ms: dict[int, float]
    head_ms: dict[int, float]
    context: int


def probe(layers: Sequence[PackedDecoderLayer], head: PackedWeight, num_layers: int, context: int) -> Probe:
    """Medians over a few passes of copies of these layers in turn, as many as the model has or as fill the caches."""
    layer = layers[0]
    copies = max(1, min(num_layers, -(-COPIES_BYTES // max(layer.packed_bytes, 1))))
    stack = LayerStack([copied(layers[number % len(layers)]) for number in range(copies)])
    slots = KVSlots(
        1, context + max(ROWS), copies, layer.num_kv_heads, layer.head_dim, torch.bfloat16, torch.device("cpu")
    )
    slots.keys.normal_()
    slots.values.normal_()
    angles = torch.ones(max(ROWS), layer.head_dim), torch.zeros(max(ROWS), layer.head_dim)

    def run(rows: int) -> None:
        hidden = torch.randn(rows, stack.hidden_size)
        segment = causal_segment(0, context, rows)
        decoder_layers(hidden, stack, LayerPass(slots, [segment], *angles, range(rows)))

    states = torch.randn(max(ROWS), stack.hidden_size)
    of_a_layer = {rows: taken / copies for rows, taken in timed(run).items()}
    return Probe(of_a_layer, timed(lambda rows: head_argmax(states[:rows], head)), context)


def copied(layer: PackedDecoderLayer) -> PackedDecoderLayer:
    """The same layer in memory of its own."""
    return dataclasses.replace(
        layer,
        qkv=tuple(map(own_matrix, layer.qkv)),
        output=own_matrix(layer.output),
        gate_up=tuple(map(own_matrix, layer.gate_up)),
        down=own_matrix(layer.down),
    )


def own_matrix(weight: PackedWeight) -> PackedWeight:
    """The same matrix in memory of its own."""
    return dataclasses.replace(weight, data=weight.data.clone())


def timed(work: Callable[[int], object]) -> dict[int, float]:
    """Median milliseconds for each number of rows, which take turns; the first turn warms up."""
    samples: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for repeat in range(REPEATS + 1):
        for rows in ROWS:
            started = time.perf_counter()
            work(rows)
            if repeat:
                samples[rows].append((time.perf_counter() - started) * 1e3)
    return {rows: statistics.median(taken) for rows, taken in samples.items()}
