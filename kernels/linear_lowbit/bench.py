"""Times many rows against one on language-model shapes, ours beside what torch offers, with the machine's limits.

Every round measures streaming bandwidth, the dot-product peak and then each engine at each number of rows, so that a
drift of the machine falls on all alike; medians over the rounds are reported. Weights are random: only their size
matters.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from kernels.linear_lowbit.cpu import linear
from kernels.linear_lowbit.packed import PackedWeight, pack, pack_quantised
from kernels.linear_lowbit.reference import QuantisedWeight
from kernels.native import instruction_set, library, num_threads

BITS = {"int4": 4, "int8": 8, "bf16": 16}


@dataclass(frozen=True)
class ModelShape:
    """The matrices of a Llama-like model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    def matrices(self) -> list[tuple[int, int]]:
        """[out, in] of every product of one pass, in order; q+k+v and gate+up are one product each."""
        head_dim = self.hidden_size // self.num_heads
        layer = [
            ((self.num_heads + 2 * self.num_kv_heads) * head_dim, self.hidden_size),
            (self.hidden_size, self.hidden_size),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        ]
        return layer * self.num_layers + [(self.vocab_size, self.hidden_size)]


SHAPES = {
    "1B": ModelShape(2048, 5632, 16, 32, 8, 32000),
    "3B": ModelShape(3072, 8192, 28, 24, 8, 32000),
    "7B": ModelShape(4096, 11008, 32, 32, 32, 32000),
}


@dataclass(frozen=True)
class Engine:
    """One contestant: a product for each matrix of the shape, in order."""

    name: str
    weights: str
    group: int | None
    products: list[Callable[[Tensor], Tensor]]
    dtype: torch.dtype


def random_packed(out_features: int, in_features: int, bits: int, group: int) -> PackedWeight:
    """A packed weight of random codes, made without searching for scales."""
    if bits > 8:
        return pack(torch.randn(out_features, in_features), bits, group)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    scale = torch.full((out_features, in_features // group), 0.01, dtype=torch.float16)
    return pack_quantised(QuantisedWeight(codes, scale, None, bits, group))


def ours(shape: ModelShape, weights: str, group: int) -> Engine:
    """Our kernels. One random matrix for each size, copied, so that every product reads memory of its own."""
    made = {size: random_packed(*size, BITS[weights], group) for size in set(shape.matrices())}
    products: list[Callable[[Tensor], Tensor]] = []
    for size in shape.matrices():
        first = made[size]
        own = PackedWeight(first.data.clone(), *size, first.bits, first.group_size)
        products.append(lambda x, own=own: linear(x, own))  # type: ignore[misc]
    return Engine("ours", weights, group, products, torch.float32)


def torch_bf16(shape: ModelShape) -> Engine:
    """torch's own bf16 product."""

    def product(size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        weight = torch.randn(size, dtype=torch.bfloat16)
        return lambda x: nn.functional.linear(x, weight)

    return Engine("torch bf16", "bf16", None, [product(size) for size in shape.matrices()], torch.bfloat16)


def torch_dynamic_int8(shape: ModelShape) -> Engine:
    """torch's dynamically quantised linear: int8 weights, activations quantised per tensor."""
    from torch.ao.nn.quantized.dynamic import Linear

    def product(size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        layer: Any = Linear(size[1], size[0], bias_=False)  # type: ignore[no-untyped-call]
        values = torch.randint(-127, 128, size, dtype=torch.int8).float() * 0.01
        layer.set_weight_bias(torch.quantize_per_tensor(values, 0.01, 0, torch.qint8), None)
        return lambda x: layer(x)  # type: ignore[no-any-return]

    return Engine("torch dynamic int8", "int8", None, [product(size) for size in shape.matrices()], torch.float32)


def torch_int4(shape: ModelShape) -> Engine:
    """torch's int4 product for CPUs, at its usual group of 32."""

    def product(size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        codes = torch.randint(0, 16, size, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.full((size[1] // 32, size[0], 2), 0.01, dtype=torch.bfloat16)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)  # type: ignore[no-any-return]

    return Engine("torch int4pack", "int4", 32, [product(size) for size in shape.matrices()], torch.bfloat16)


PEERS: dict[str, Callable[[ModelShape], Engine]] = {
    "bf16": torch_bf16,
    "int8": torch_dynamic_int8,
    "int4": torch_int4,
}


class Limits:
    """Streaming bandwidth and dot-product peak of all threads, measured whenever asked."""

    def __init__(self) -> None:
        self._memory = torch.zeros(1 << 28, dtype=torch.uint8)  # beyond every cache
        self.stream: list[float] = []
        self.dots: list[float] = []

    def measure(self) -> None:
        """One more sample of each."""
        native = library()
        if native is None:
            return
        start = time.perf_counter()
        native.dovetail_stream(self._memory.data_ptr(), self._memory.numel())
        middle = time.perf_counter()
        count = native.dovetail_dots(20000)
        end = time.perf_counter()
        self.stream.append(self._memory.numel() / (middle - start) / 1e9)
        self.dots.append(count / (end - middle) / 1e9)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch with as many threads as our kernels, for the peers' sake."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_pass(engine: Engine, inputs: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    for product, x in zip(engine.products, inputs, strict=True):
        product(x)
    return (time.perf_counter() - start) * 1e3


def _compare(engines: Sequence[Engine], shape: ModelShape, rows: Sequence[int], rounds: int, limits: Limits) -> Any:
    widths = {width for _, width in shape.matrices()}
    samples: dict[tuple[int, int], list[float]] = {}
    for round_number in range(rounds + 1):
        limits.measure()
        for place, engine in enumerate(engines):
            for count in rows:
                made = {width: torch.randn(count, width).to(engine.dtype) for width in widths}
                elapsed = _time_pass(engine, [made[width] for _, width in shape.matrices()])
                if round_number > 0:  # the first round warms caches and clocks
                    samples.setdefault((place, count), []).append(elapsed)
    return samples


def bench_kernels(
    shapes: Sequence[str] = ("1B",),
    weights: Sequence[str] = ("int4", "int8", "bf16"),
    rows: Sequence[int] = (1, 2, 4, 8, 16, 32),
    group: int = 32,
    rounds: int = 7,
    peers: bool = True,
) -> dict[str, Any]:
    """The JSON of `bench kernels`: limits, and milliseconds of one pass of products for each engine and number of rows.

    Raises ValueError for a shape or weight format that is not known.
    """
    for given, known in ((shapes, SHAPES), (weights, BITS)):
        if unknown := set(given) - set(known):
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    limits, results = Limits(), list[dict[str, Any]]()
    with torch.inference_mode(), torch_threads(num_threads()):
        for name in shapes:
            for kind in weights:
                engines = [ours(SHAPES[name], kind, group)] + ([PEERS[kind](SHAPES[name])] if peers else [])
                samples = _compare(engines, SHAPES[name], rows, rounds, limits)
                results += [
                    {
                        "shape": name, "scope": "products", "weights": kind, "group": engines[place].group,
                        "context": 0, "engine": engines[place].name, "rows": count,
                        "ms": round(statistics.median(times), 3), "ms_best": round(min(times), 3),
                    }
                    for (place, count), times in samples.items()
                ]  # fmt: skip
    return {
        "hardware": f"{platform.processor() or platform.machine()}, {num_threads()} threads, {instruction_set()}",
        "stream_gb_per_s": round(statistics.median(limits.stream), 2) if limits.stream else None,
        "dot_gmac_per_s": round(statistics.median(limits.dots), 1) if limits.dots else None,
        "results": results,
    }


def _curves(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[int, float]]:
    curves: dict[tuple[str, str, str], dict[int, float]] = {}
    for entry in result["results"]:
        curves.setdefault((entry["shape"], entry["weights"], entry["engine"]), {})[entry["rows"]] = entry["ms"]
    return curves


def table(result: dict[str, Any]) -> Table:
    """Milliseconds and T(n) / T(1), one line for each engine."""
    rows = sorted({entry["rows"] for entry in result["results"]})
    limits = f"{result['stream_gb_per_s']} GB/s streamed, {result['dot_gmac_per_s']} G multiply-adds/s"
    view = Table(title=f"{result['hardware']}: {limits}")
    for heading in ("shape", "weights", "engine", *(f"{count} rows, ms" for count in rows)):
        view.add_column(heading, justify="right" if heading.endswith("ms") else "left")
    for (shape, weights, engine), curve in _curves(result).items():
        first = curve[min(curve)]
        cells = [f"{curve[count]:.1f}  x{curve[count] / first:.2f}" if count in curve else "" for count in rows]
        view.add_row(shape, weights, engine, *cells)
    return view


def plot(result: dict[str, Any], path: Path) -> None:
    """T(n) / T(1) over n as an image; needs matplotlib (extra `train`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (shape, weights, engine), curve in _curves(result).items():
        first = curve[min(curve)]
        style = "-" if engine == "ours" else "--"
        axes.plot(
            list(curve), [ms / first for ms in curve.values()], style, marker="o", label=f"{shape} {engine} {weights}"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("rows in one pass")
    axes.set_ylabel("time / time of one row")
    axes.set_title(result["hardware"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
