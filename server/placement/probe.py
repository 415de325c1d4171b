"""What one layer and the head of a model cost on this machine, measured: the CPU's half of a prediction.

Rooflines know bandwidth and the arithmetic peak; what a format costs to unpack, what threads lose by waiting for others
and what attention adds, only a layer itself can say. A few layers are enough: a pass is so many of them, then the head.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

from kernels.decoder_layer import LayerPass, LayerStack, PackedDecoderLayer, decoder_layers, head_argmax
from kernels.linear_lowbit import PackedWeight
from kernels.tree_attention import KVSlots, tree_segment

COPIES_BYTES = 320 * 2**20  # of copies together, so that a pass finds no more in caches than the model's would


class LayerProbe:
    """Copies of some of a model's layers in turn, as many as the model has or as fill the caches, and its head."""

    def __init__(
        self, layers: Sequence[PackedDecoderLayer], head: PackedWeight, num_layers: int, longest: int, most_rows: int
    ) -> None:
        """``longest``: most positions behind the rows of a pass, of which there are ``most_rows`` at most."""
        layer = layers[0]
        self.head = head
        self.copies = max(1, min(num_layers, -(-COPIES_BYTES // max(layer.packed_bytes, 1))))
        self.stack = LayerStack([copied(layers[number % len(layers)]) for number in range(self.copies)])
        self.slots = KVSlots(
            1, longest + most_rows, self.copies, layer.form.num_kv_heads, layer.form.head_dim, torch.bfloat16,
            torch.device("cpu"),
        )  # fmt: skip
        self.slots.keys.normal_()
        self.slots.values.normal_()
        turned = max(1, self.stack.num_tables), most_rows, layer.form.head_dim
        self.angles = torch.ones(turned), torch.zeros(turned)
        self.states = torch.randn(most_rows, self.stack.hidden_size)

    def times(self, rows: int, context: int) -> tuple[float, float]:
        """Milliseconds, once, of one layer behind so many positions and of the head with its arg-max, over rows."""
        hidden = self.states[:rows].clone()
        chain = tree_segment(0, context, range(-1, rows - 1), torch.device("cpu"))
        row_pass = LayerPass(self.slots, [chain], *self.angles, range(rows))
        layers_ms = milliseconds(lambda: decoder_layers(hidden, self.stack, row_pass))
        return layers_ms / self.copies, milliseconds(lambda: head_argmax(self.states[:rows], self.head))


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


def milliseconds(work: Callable[[], object]) -> float:
    """What it takes."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3
