"""Does the claim of 2018 still hold? Depthwise layers computed in every way at hand, layer by layer and in whole nets.

A cell is one layer geometry at one batch size, type, layout and pass. Contenders of a cell take turns (``timing``), and
before a cell is timed the answers of every contender are compared with native in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonalwise.layer import DiagonalwiseConv2d, MaskedDiagonalwiseConv2d
from kernels.diagonalwise.replacement import refactorize
from kernels.diagonalwise.timing import Step, Timing, compare
from kernels.diagonalwise.tune import NATIVE, Build, contenders, tune

# "tf32" is fp32 whose products NVIDIA's tensor cores round; "fp32" keeps them from it.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCHES = (1, 16, 64, 256)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "input_gradient", "weight_gradient", "step")
TOLERANCE = 1e-9
TUNED_LAYERS = 10  # roughly the different depthwise layers of a network, which share its time


class WrongAnswerError(AssertionError):
    """A contender does not compute the depthwise convolution."""


@dataclass(frozen=True)
class Geometry:
    """One depthwise layer: channels, side of its square input, stride, side of its filters."""

    channels: int
    side: int
    stride: int
    kernel: int = 3

    def build(self) -> nn.Conv2d:
        """The layer, without bias, padded by half its kernel."""
        return nn.Conv2d(
            self.channels, self.channels, self.kernel, self.stride, self.kernel // 2, groups=self.channels, bias=False
        )


def layers_of(kernel: int, *places: tuple[int, int, int]) -> tuple[Geometry, ...]:
    """Geometries of (channels, side, stride)."""
    return tuple(Geometry(channels, side, stride, kernel) for channels, side, stride in places)


GRID: dict[str, tuple[Geometry, ...]] = {
    "mobilenet_v1_x1_0": layers_of(
        3, (32, 112, 1), (64, 112, 2), (128, 56, 1), (128, 56, 2), (256, 28, 1), (256, 28, 2), (512, 14, 1),
        (512, 14, 2), (1024, 7, 1),
    ),
    "fd_mobilenet_x1_0": layers_of(
        3, (32, 112, 2), (64, 56, 2), (128, 28, 1), (128, 28, 2), (256, 14, 1), (256, 14, 2), (512, 7, 1)
    ),
    "snet146": layers_of(
        5, (24, 80, 2), (66, 80, 2), (66, 40, 1), (132, 40, 2), (132, 20, 1), (264, 20, 2), (264, 10, 1)
    ),
    "menet_228_12x1_g3": layers_of(3, (57, 56, 2), (57, 28, 1), (114, 28, 2), (114, 14, 1), (228, 14, 2), (228, 7, 1)),
}  # fmt: skip


@dataclass(frozen=True)
class BenchOptions:
    """Which part of the grid.

    ``compiled`` adds torch.compile of native and refactored layers, on a GPU also with max-autotune, which takes long.
    ``limit_s`` bounds the time of a cell: fewer repeats, at least three.
    """

    networks: tuple[str, ...] = tuple(GRID)
    batches: tuple[int, ...] = (1, 16, 64)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    passes: tuple[str, ...] = PASSES
    compiled: bool = False
    warmups: int = 2
    repeats: int = 30
    limit_s: float = math.inf

    def __post_init__(self) -> None:
        for name, allowed in (("networks", GRID), ("dtypes", DTYPES), ("layouts", LAYOUTS), ("passes", PASSES)):
            unknown = sorted(set(getattr(self, name)) - set(allowed))
            if unknown:
                raise ValueError(f"{name} {', '.join(unknown)} are not known; allowed are {', '.join(allowed)}")


@dataclass(frozen=True)
class Cell:
    """Times of all contenders in one cell. ``megabytes`` is what an ideal kernel would move."""

    network: str
    geometry: Geometry
    batch: int
    dtype: str
    layout: str
    work: str
    megabytes: float
    timings: Mapping[str, Timing]

    def ratio(self, name: str) -> float:
        """Time of a contender over native's; under 1 it wins."""
        return self.timings[name].median_ms / self.timings[NATIVE].median_ms


def bench_layers(
    options: BenchOptions, device: torch.device, progress: Callable[[Cell], None] | None = None
) -> list[Cell]:
    """Measure every cell of the chosen grid on ``device``. Errors: WrongAnswerError before anything wrong is timed."""
    cells = []
    for network, geometry in cells_of(options):
        builders = layer_contenders(geometry, device, options.compiled)
        check_answers(geometry, builders, device)
        dtypes = [dtype for dtype in options.dtypes if dtype not in needs_gpu(device)]
        axes = (options.batches, dtypes, options.layouts, options.passes)
        for batch, dtype, layout, work in itertools.product(*axes):
            x = torch.randn(batch, geometry.channels, geometry.side, geometry.side, device=device, dtype=DTYPES[dtype])
            x = x.contiguous(memory_format=LAYOUTS[layout])
            layer = geometry.build().to(device, DTYPES[dtype])
            # Past a few recompilations of one function torch.compile would quietly stay with eager mode.
            torch.compiler.reset()
            steps = {name: layer_step(build(deepcopy(layer)), x, work) for name, build in builders.items()}
            with torch.backends.cudnn.flags(allow_tf32=dtype == "tf32"):
                timings = compare(steps, device, options.warmups, options.repeats, options.limit_s)
            cells.append(
                Cell(network, geometry, batch, dtype, layout, work, ideal_megabytes(x, geometry, work), timings)
            )
            if progress is not None:
                progress(cells[-1])
    return cells


def needs_gpu(device: torch.device) -> dict[str, str]:
    """Types and contenders that ``device`` cannot run, each with the reason; none on an NVIDIA GPU."""
    if device.type == "cuda":
        return {}
    return {
        "tf32": "tensor cores are NVIDIA's",
        "triton": "needs a GPU; Triton's interpreter shows answers, not speed",
        "max-autotune": "torch.compile has its convolution templates for GPUs only",
        "cudnn": "the choice between cuDNN's and torch's own depthwise kernels exists on NVIDIA GPUs only",
    }


def not_run(options: BenchOptions, device: torch.device) -> dict[str, str]:
    """What of the whole grid these options and this device leave out, each with the reason."""
    unasked: dict[str, set[Any]] = {
        "networks": set(GRID) - set(options.networks), "batches": set(BATCHES) - set(options.batches),
        "dtypes": set(DTYPES) - set(options.dtypes) - set(needs_gpu(device)),
        "layouts": set(LAYOUTS) - set(options.layouts), "passes": set(PASSES) - set(options.passes),
    }  # fmt: skip
    left_out = {
        f"{axis} {', '.join(sorted(map(str, values)))}": "not asked for" for axis, values in unasked.items() if values
    }
    if not options.compiled:
        left_out["torch.compile"] = "not asked for"
    return needs_gpu(device) | left_out


def cells_of(options: BenchOptions) -> Iterator[tuple[str, Geometry]]:
    """Every chosen layer with the network it comes from."""
    return ((network, geometry) for network in options.networks for geometry in GRID[network])


def layer_contenders(geometry: Geometry, device: torch.device, compiled: bool) -> dict[str, Build]:
    """What ``tune`` may choose from, the dense form, the authors' masked form, and compiled ones."""
    builders = contenders(device)
    builders["diagonalwise_dense"] = partial(DiagonalwiseConv2d.replacing, channels_per_group=geometry.channels)
    builders["masked"] = MaskedDiagonalwiseConv2d.replacing
    if compiled:
        modes = ("default",) if device.type == "cpu" else ("default", "max-autotune")
        for name, mode in itertools.product((NATIVE, "diagonalwise_m32"), modes):
            builders[f"{name}_{mode}_compiled"] = partial(compile_after, builders[name], mode)
    return builders


def compile_after(build: Build, mode: str, layer: nn.Conv2d) -> nn.Conv2d:
    """The built layer under torch.compile in ``mode``."""
    built = build(layer)
    built.compile(mode=mode)
    return built


def check_answers(geometry: Geometry, builders: Mapping[str, Build], device: torch.device) -> None:
    """Output and both gradients of every contender against native, in float64 on two small images."""
    layer = geometry.build().to(device, torch.float64)
    x = torch.randn(2, geometry.channels, 9, 9, device=device, dtype=torch.float64)
    expected = answers(deepcopy(layer), x)
    for name, build in builders.items():
        for ours, theirs in zip(answers(build(deepcopy(layer)), x), expected, strict=True):
            if not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
                raise WrongAnswerError(f"{name} is wrong for {geometry}: off by {(ours - theirs).abs().max():.1e}")


def answers(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, ...]:
    """Output, input gradient and summed filter gradient of one contender."""
    x = x.clone().requires_grad_()
    y = layer(x)
    dx, dw = torch.autograd.grad(y, [x, layer.weight], torch.cos(y.detach()))
    return y.detach(), dx, dw.sum(1)


def layer_step(layer: nn.Conv2d, x: Tensor, work: str) -> Step:
    """The call that one pass times. Gradient passes include the forward pass they need."""
    x = x.detach().requires_grad_(work in ("input_gradient", "step"))
    layer.requires_grad_(work in ("weight_gradient", "step"))
    wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]

    def step() -> None:
        y = layer(x)
        if wanted:
            torch.autograd.grad(y, wanted, torch.ones_like(y))

    return step


def ideal_megabytes(x: Tensor, geometry: Geometry, work: str) -> float:
    """Bytes of input and output, once for every pass over them, in millions."""
    output = x.numel() // geometry.stride**2
    passes = {"forward": 1, "input_gradient": 2, "weight_gradient": 2, "step": 3}[work]
    return passes * x.element_size() * (x.numel() + output) / 1e6


def bench_nets(
    networks: Mapping[str, Callable[[], nn.Module]],
    device: torch.device,
    *,
    batch: int,
    image_size: int = 224,
    warmups: int = 1,
    repeats: int = 10,
    limit_s: float = math.inf,
    compiled: bool = False,
) -> dict[str, dict[str, Timing]]:
    """One training step (forward, loss, gradients) of whole networks: native, refactored, tuned; both layouts.

    ``networks`` makes classifiers of images [B, 3, H, W] by name. A win of a layer that vanishes here is no win.
    ``limit_s`` bounds the time of each network's comparison, and of each layer's when tuning is measured. ``compiled``
    adds the native and the refactored network under torch.compile.
    """
    measure = partial(compare, warmups=1, repeats=repeats, limit_s=limit_s / TUNED_LAYERS)
    results = {}
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    for name, make in networks.items():
        steps: dict[str, Step] = {}
        for layout, memory_format in LAYOUTS.items():
            images = torch.randn(batch, 3, image_size, image_size, device=device).contiguous(
                memory_format=memory_format
            )
            plain = make().to(device).train()
            plain.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch takes it, its stubs do not
            tuned = deepcopy(plain)
            tune(tuned, images, measure=measure)
            ways = {NATIVE: plain, "refactored": refactorize(deepcopy(plain)), "tuned": tuned}
            if compiled:
                ways |= {f"compiled_{way}": compile_copy(ways[way]) for way in (NATIVE, "refactored")}
            steps |= {f"{way}_{layout}": partial(net_step, model, images, labels) for way, model in ways.items()}
        torch.compiler.reset()
        results[name] = compare(steps, device, warmups, repeats, limit_s)
    return results


def compile_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` under torch.compile; its first step compiles."""
    copy = deepcopy(model)
    copy.compile()
    return copy


def net_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward, cross-entropy, gradients to all parameters."""
    torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
