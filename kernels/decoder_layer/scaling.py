"""Activation-aware scaling of a decoder layer before it is quantised: large inputs get finer weights.

Columns of a weight are multiplied by a factor for each input channel, and what produces that input is divided by it, so
the layer computes the same in floats while the quantiser's error moves to channels that matter less. The factor is the
channel's mean magnitude on a calibration text to a power, found by the error of the outputs. Source: AWQ (arXiv
2306.00978, section 3.2); the grid and the joint search over q, k and v are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.decoder_layer.form import UnsupportedLayer, layer_parts, model_type
from kernels.linear_lowbit.reference import quantise

POWERS = tuple(step / 10 for step in range(10))  # 0 keeps the layer as it is
_FLOOR = 1e-4


@dataclass(frozen=True)
class ScaledInput:
    """One input of the layer whose error was weighed: the power that won, and the outputs' squared error by it.

    error and plain_error are relative to the outputs' square; plain is without scaling.
    """

    name: str
    power: float
    error: float
    plain_error: float


def scale_layer(layer: nn.Module, inputs: Mapping[str, Tensor], bits: int, group_size: int) -> list[ScaledInput]:
    """Scales a layer of transformers in place; `inputs` come from `record_inputs`.

    The weights are replaced, not written to: they may be views of a file.
    """
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    check_scaling(layer)
    norms: Any = (layer.input_layernorm, layer.post_attention_layernorm)
    found = [
        _scale(
            "qkv", inputs["qkv"], (attention.q_proj, attention.k_proj, attention.v_proj), norms[0], bits, group_size
        ),
        _scale("gate_up", inputs["gate_up"], (mlp.gate_proj, mlp.up_proj), norms[1], bits, group_size),
        _scale("down", inputs["down"], (mlp.down_proj,), mlp.up_proj, bits, group_size),
    ]
    if attention.v_proj.out_features == attention.o_proj.in_features:  # grouped heads share the rows of v
        found.insert(1, _scale("output", inputs["output"], (attention.o_proj,), attention.v_proj, bits, group_size))
    return found


def check_scaling(layer: nn.Module) -> None:
    """Raises UnsupportedLayer for a layer whose inputs are not made by a plain norm or by projections of their own."""
    attention: Any = layer.self_attn
    parts = layer_parts(layer)
    plain = {"input_norm", "post_norm", "query_norm", "key_norm"}.issuperset(parts.norms)
    if not plain or len(parts.qkv) != 3 or len(parts.gate_up) != 2 or model_type(attention.config).norm_offset:
        raise UnsupportedLayer(f"{type(layer).__name__} cannot be scaled by a calibration text; convert it without one")


def record_inputs(layer: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """What the four products of the layer get while `run` calls it: fp32 [tokens, channels] by product."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    seen: dict[str, Tensor] = {}

    def catcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0].detach().float().flatten(0, -2)

        return catch

    modules = {"qkv": attention.q_proj, "output": attention.o_proj, "gate_up": mlp.gate_proj, "down": mlp.down_proj}
    hooks = [module.register_forward_pre_hook(catcher(name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _scale(name: str, x: Tensor, consumers: Sequence[Any], producer: Any, bits: int, group_size: int) -> ScaledInput:
    """Finds the factors for `consumers`' shared input x, and moves them into the `producer` (a norm or a linear)."""
    weight = torch.cat([consumer.weight.detach().float() for consumer in consumers])
    magnitude = x.abs().mean(0).clamp_min(_FLOOR)
    wanted = x @ weight.T
    energy = wanted.square().sum().clamp_min(_FLOOR)
    errors: dict[float, float] = {}
    for power in POWERS:
        factor = _factor(magnitude, power)
        kept = quantise(weight * factor, bits, group_size).dequantise() / factor
        errors[power] = float((x @ kept.T - wanted).square().sum() / energy)
    best = min(errors, key=lambda power: errors[power])
    factor = _factor(magnitude, best)
    for consumer in consumers:
        _replace(consumer, "weight", consumer.weight.detach().float() * factor)
    outputs = producer.weight.detach().float()
    _replace(producer, "weight", outputs / (factor if outputs.dim() == 1 else factor[:, None]))
    if getattr(producer, "bias", None) is not None:
        _replace(producer, "bias", producer.bias.detach().float() / factor)
    return ScaledInput(name, best, errors[best], errors[POWERS[0]])


def _factor(magnitude: Tensor, power: float) -> Tensor:
    factor = magnitude.pow(power)
    return factor / (factor.max() * factor.min()).sqrt()


def _replace(module: nn.Module, name: str, values: Tensor) -> None:
    setattr(module, name, nn.Parameter(values, requires_grad=False))
