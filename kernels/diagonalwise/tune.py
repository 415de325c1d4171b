"""Choose how each depthwise layer of a model is computed, by measuring once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from kernels.diagonalwise.layer import DiagonalwiseConv2d, is_depthwise
from kernels.diagonalwise.replacement import native, replace_layers
from kernels.diagonalwise.timing import Step, Timing, compare

NATIVE = "native"
TUNED = "tuned"
GROUP_WIDTHS = (8, 16, 32)

Build = Callable[[nn.Conv2d], nn.Conv2d]
Compare = Callable[[Mapping[str, Step], torch.device], Mapping[str, Timing]]


@dataclass(frozen=True)
class LayerKey:
    """What a measurement depends on. ``trains`` says whether the backward passes were timed as well."""

    input_shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    device: str
    dtype: str
    channels_last: bool
    trains: bool


@dataclass(frozen=True)
class Choice:
    """The contender taken for one layer, and the times of all."""

    layer: str
    chosen: str
    timings: Mapping[str, Timing]


@dataclass
class TuningTable:
    """Measurements made so far; hand the same table to several calls of ``tune`` and nothing is measured twice."""

    timings: dict[LayerKey, Mapping[str, Timing]] = field(default_factory=dict)


def tune(
    model: nn.Module,
    images: Tensor,
    *,
    table: TuningTable | None = None,
    measure: Compare = compare,
) -> list[Choice]:
    """Replace each depthwise layer of ``model``, in place, by the fastest way to compute it; report the choices.

    ``images`` is a batch as the model will see it (shape, device, dtype, layout); in training mode forward and backward
    are timed together, otherwise forward alone. A layer leaves torch's own implementation only for a contender that
    beats it beyond noise (``Timing.clearly_beats``), and layers of equal geometry are measured once. Layers that win
    alone may lose beside others; where the whole model is clearly slower for them, all stay native.
    """
    table = TuningTable() if table is None else table
    builders = contenders(images.device)
    replace_layers(model, native)
    choices = []
    for name, (layer, x) in layer_inputs(model, images).items():
        key = layer_key(layer, x, trains=model.training)
        if key not in table.timings:
            table.timings[key] = measure(layer_steps(layer, x, builders, model.training), x.device)
        timings = {label: timing for label, timing in table.timings[key].items() if label in builders}
        chosen = fastest(timings)
        model.set_submodule(name, builders[chosen](layer))
        choices.append(Choice(name, chosen, timings))
    if any(choice.chosen != NATIVE for choice in choices) and loses_as_a_whole(model, images, measure):
        replace_layers(model, native)
        return [replace(choice, chosen=NATIVE) for choice in choices]
    return choices


def loses_as_a_whole(model: nn.Module, images: Tensor, measure: Compare) -> bool:
    """Whether a tuned ``model`` is slower beyond noise than the same with native layers; both are copies."""
    tuned, plain = deepcopy(model), deepcopy(model)
    replace_layers(plain, native)
    steps: dict[str, Step] = {NATIVE: partial(model_step, plain, images), TUNED: partial(model_step, tuned, images)}
    timings = measure(steps, images.device)
    return timings[NATIVE].clearly_beats(timings[TUNED])


def model_step(model: nn.Module, images: Tensor) -> None:
    """Forward, and in training mode, where the model answers a tensor, the gradients to its parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.set_grad_enabled(model.training):
        output = model(images)
    if isinstance(output, Tensor) and output.requires_grad:
        torch.autograd.grad(output.sum(), parameters, allow_unused=True)


def fastest(timings: Mapping[str, Timing]) -> str:
    """The contender with the lowest median among those that clearly beat native; native where none does."""
    winners = [name for name, timing in timings.items() if timing.clearly_beats(timings[NATIVE])]
    return min(winners, key=lambda name: timings[name].median_ms, default=NATIVE)


def contenders(device: torch.device) -> dict[str, Build]:
    """How a depthwise layer can be computed on ``device``. Triton needs a GPU; its interpreter is for tests."""
    builders: dict[str, Build] = {NATIVE: native}
    for width in GROUP_WIDTHS:
        builders[f"diagonalwise_m{width}"] = partial(DiagonalwiseConv2d.replacing, channels_per_group=width)
    if device.type == "cuda" and find_spec("triton") is not None:
        from kernels.diagonalwise.triton import TritonDepthwiseConv2d

        builders["triton"] = TritonDepthwiseConv2d.replacing
    return builders


def layer_inputs(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Conv2d, Tensor]]:
    """Every depthwise layer with an input of the shape, dtype and layout it meets, found by one forward pass."""
    found: dict[str, tuple[nn.Conv2d, Tensor]] = {}

    def note(name: str, layer: nn.Conv2d, inputs: tuple[Any, ...]) -> None:
        found[name] = (layer, inputs[0].detach().clone(memory_format=torch.preserve_format))

    hooks = [
        layer.register_forward_pre_hook(partial(note, name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and is_depthwise(layer)
    ]
    state = {name: tensor.clone() for name, tensor in model.named_buffers()}
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for name, tensor in model.named_buffers():
            tensor.copy_(state[name])  # a forward pass in training mode moves the running statistics
    return found


def layer_key(layer: nn.Conv2d, x: Tensor, trains: bool) -> LayerKey:
    """What the measurement of ``layer`` on ``x`` depends on."""
    padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
    return LayerKey(
        input_shape=tuple(x.shape),
        kernel_size=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=padding,
        dilation=tuple(layer.dilation),
        device=str(x.device),
        dtype=str(x.dtype),
        channels_last=x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous(),
        trains=trains,
    )


def layer_steps(layer: nn.Conv2d, x: Tensor, builders: Mapping[str, Build], trains: bool) -> dict[str, Step]:
    """One call for each contender: forward, and with ``trains`` both gradients."""
    steps: dict[str, Step] = {}
    for name, build in builders.items():
        try:
            contender = build(deepcopy(layer).to(x.dtype))
        except ValueError:
            continue  # this contender does not take such layers
        steps[name] = partial(train_step if trains else forward_step, contender, x.clone().requires_grad_(trains))
    return steps


def forward_step(layer: nn.Module, x: Tensor) -> None:
    """Forward alone."""
    with torch.no_grad():
        layer(x)


def train_step(layer: nn.Module, x: Tensor) -> None:
    """Forward, and the gradients to input and weight."""
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
