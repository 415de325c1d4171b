"""The target's inner vectors for drafters that want more than the last: read where they pass, nothing recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from server.targets.target import TargetError

LAST = "last"


def tapped_layers(num_layers: int) -> dict[str, int]:
    """Feature layer -> decoder layer whose INPUT it is: layers 2, L/2 and L - 3, as EAGLE-3's checkpoints expect.

    Empty for models too shallow to have three different ones. Source: EAGLE-3 (arXiv 2503.01840) and its code.
    """
    layers = {"low": 2, "mid": num_layers // 2, "high": num_layers - 3}
    return layers if layers["low"] < layers["mid"] < layers["high"] else {}


class FeatureTap:
    """Hooks on the decoder layers that are wanted; with ``last`` alone there are none, and passes cost nothing more."""

    def __init__(self, base_model: nn.Module, num_layers: int) -> None:
        stacks = [part for part in base_model.children() if isinstance(part, nn.ModuleList) and len(part) == num_layers]
        # The stack, not its layers: a target that packs them must be able to drop them.
        self.stack = stacks[0] if stacks else None
        self.layers = tapped_layers(num_layers) if stacks else {}
        self.available: tuple[str, ...] = (LAST, *self.layers)
        self.selected: tuple[str, ...] = (LAST,)
        self.wanted: dict[int, str] = {}
        self.hooks: list[Any] = []
        self.captured: dict[str, Tensor] = {}

    def select(self, layers: Sequence[str]) -> None:
        """Capture these from the next pass on. Errors: TargetError for a layer that is not ``available``."""
        if unknown := sorted(set(layers) - set(self.available)):
            raise TargetError(
                f"this target has no feature layers {', '.join(unknown)}; it gives {', '.join(self.available)}"
            )
        for hook in self.hooks:
            hook.remove()
        self.selected = tuple(layers)
        self.captured = {}
        wanted = {self.layers[name]: name for name in self.selected if name != LAST}
        self.wanted = wanted
        stack = self.stack
        self.hooks = (
            []
            if stack is None
            else [stack[layer].register_forward_pre_hook(self._catcher(layer), with_kwargs=True) for layer in wanted]
        )

    def record(self, layer: int, hidden: Tensor) -> None:
        """Keep the input [rows, hidden] of a decoder layer if it is wanted; for passes that call no such module."""
        if layer in self.wanted:
            self.captured[self.wanted[layer]] = hidden.clone()  # native layers work in place

    def features(self, last: Tensor) -> Tensor:
        """The selected layers of the pass that gave ``last`` [rows, hidden], side by side."""
        if self.selected == (LAST,):
            return last
        found = [last if name == LAST else self.captured[name] for name in self.selected]
        return torch.cat([part.to(last.device, last.dtype) for part in found], dim=-1)  # a split target has two devices

    def _catcher(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def catch(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hidden: Tensor = arguments[0] if arguments else keywords["hidden_states"]
            self.captured[self.wanted[layer]] = hidden[0]

        return catch
