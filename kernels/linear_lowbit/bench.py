"""Times many rows against one on language-model shapes, ours beside what torch offers, with the machine's limits.

Every round measures streaming bandwidth, the dot-product peak and then each engine at each number of rows, so that a
drift of the machine falls on all alike; medians over the rounds are reported. Weights are random: only their size
matters.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.linear_lowbit.bench_peers import PEERS, Engine, EngineMissing, Size, one_by_one
from kernels.linear_lowbit.cpu import linear
from kernels.linear_lowbit.packed import GROUP_SIZES, PackedWeight, pack, pack_quantised
from kernels.linear_lowbit.reference import QuantisedWeight
from kernels.native import instruction_set, library, num_threads

OURS = "ours"
BITS = {"int4": 4, "int8": 8, "bf16": 16}
GROUP = 32  # as llama.cpp's Q4_0 and Q8_0: the one that speed and accuracy are stated for

Entry = dict[str, Any]
Say = Callable[[str], None]


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
    "smollm2-135m": ModelShape(576, 1536, 30, 9, 3, 49152),
    "0.5B": ModelShape(896, 4864, 24, 14, 2, 151936),  # Qwen2.5's
    "1B": ModelShape(2048, 5632, 16, 32, 8, 32000),
    "3B": ModelShape(3072, 8192, 28, 24, 8, 32000),
    "7B": ModelShape(4096, 11008, 32, 32, 32, 32000),
}


def random_packed(out_features: int, in_features: int, bits: int, group: int) -> PackedWeight:
    """A packed weight of random codes, made without searching for scales."""
    if bits > 8:
        return pack(torch.randn(out_features, in_features) * 0.02, bits, group)
    codes = torch.randint(1, 2**bits, (out_features, in_features), dtype=torch.uint8)
    scale = torch.full((out_features, in_features // group), 0.07 / 2**bits, dtype=torch.float16)
    return pack_quantised(QuantisedWeight(codes, scale, None, bits, group))


def ours(sizes: Sequence[Size], weights: str, group: int) -> Engine:
    """Our kernels. One random matrix for each size, copied, so that every product reads memory of its own."""
    made = {size: random_packed(*size, BITS[weights], group) for size in set(sizes)}
    own = [dataclasses.replace(made[size], data=made[size].data.clone()) for size in sizes]
    num_bytes = sum(packed.data.numel() for packed in own)
    products = [functools.partial(_product, packed) for packed in own]
    return Engine(OURS, weights, group, one_by_one(sizes, products), torch.float32, num_bytes)


def _product(packed: PackedWeight, x: Tensor) -> Tensor:
    return linear(x, packed)


class Limits:
    """Streaming bandwidth and dot-product peak of all threads, measured whenever asked."""

    def __init__(self) -> None:
        # Beyond every cache, and written: fresh zeros would all be read from one page of the system's.
        self._memory = torch.full((1 << 28,), 1, dtype=torch.uint8)
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


# The threads of other engines spin on after their work, and would take the next one's time.
SETTLE_S = 0.2


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch with as many threads as our kernels, for the peers' sake."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_in_turns(
    passes: Mapping[str, Callable[[int], float]], rows: Sequence[int], rounds: int, limits: Limits
) -> dict[tuple[str, int], list[float]]:
    """Milliseconds by (name, rows): every round asks each pass for each number of rows; the first round warms up.

    The numbers of rows take turns in coming first, so that none is always measured right behind another engine.
    """
    samples: dict[tuple[str, int], list[float]] = {(name, count): [] for name in passes for count in rows}
    for round_number in range(rounds + 1):
        limits.measure()
        first = round_number % len(rows)
        for name, timed_pass in passes.items():
            time.sleep(SETTLE_S)
            for count in (*rows[first:], *rows[:first]):
                elapsed = timed_pass(count)
                if round_number > 0:
                    samples[name, count].append(elapsed)
    return samples


def _timed(engine: Engine, widths: set[int]) -> Callable[[int], float]:
    def timed_pass(rows: int) -> float:
        inputs = {width: torch.randn(rows, width).to(engine.dtype) for width in widths}
        start = time.perf_counter()
        engine.run(inputs)
        return (time.perf_counter() - start) * 1e3

    return timed_pass


@dataclass(frozen=True)
class BenchOptions:
    """layers: at most so many of a shape's layers, for models that do not fit; groups: extra group sizes for ours."""

    shapes: Sequence[str] = ("1B",)
    weights: Sequence[str] = ("int4", "int8", "bf16")
    rows: Sequence[int] = (1, 2, 4, 8, 16)
    rounds: int = 7
    layers: int | None = None
    groups: Sequence[int] = ()
    peers: bool = True

    def __post_init__(self) -> None:
        for given, known in ((self.shapes, SHAPES), (self.weights, BITS), (self.groups, GROUP_SIZES)):
            if unknown := set(map(str, given)) - set(map(str, known)):
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(map(str, known))}")
        if not self.rows or min(self.rows) < 1 or self.rounds < 1 or (self.layers is not None and self.layers < 1):
            raise ValueError("rows, rounds and layers must be at least 1")

    def shape(self, name: str) -> ModelShape:
        """The shape with as many layers as are measured."""
        whole = SHAPES[name]
        return dataclasses.replace(whole, num_layers=min(whole.num_layers, self.layers or whole.num_layers))


def bench_products(options: BenchOptions, limits: Limits, say: Say) -> tuple[list[Entry], dict[str, str]]:
    """Entries of scope ``products``, and the engines that could not take part with the reason."""
    results: list[Entry] = []
    skipped: dict[str, str] = {}
    with torch.inference_mode(), torch_threads(num_threads()):
        for name in options.shapes:
            for weights in options.weights:
                say(f"{name} {weights}: products")
                found, missing = _bench_format(name, weights, options, limits)
                results, skipped = results + found, skipped | missing
    return results, skipped


def _bench_format(name: str, weights: str, options: BenchOptions, limits: Limits) -> tuple[list[Entry], dict[str, str]]:
    shape = options.shape(name)
    sizes = shape.matrices()
    engines, skipped = _engines(sizes, weights, options)
    passes = {_key(engine): _timed(engine, {width for _, width in sizes}) for engine in engines}
    samples = measure_in_turns(passes, options.rows, options.rounds, limits)
    results: list[Entry] = []
    for engine in engines:
        fields = {"shape": name, "scope": "products", "weights": weights, "group": engine.group, "context": 0}
        fields |= {"engine": engine.name, "layers": shape.num_layers}
        results += entries(fields, samples, _key(engine), engine.num_bytes)
    return results, skipped


def _engines(sizes: Sequence[Size], weights: str, options: BenchOptions) -> tuple[list[Engine], dict[str, str]]:
    extra = options.groups if weights != "bf16" else ()
    engines = [ours(sizes, weights, group) for group in dict.fromkeys((GROUP, *extra))]
    skipped: dict[str, str] = {}
    for name, create in PEERS[weights].items() if options.peers else ():
        try:
            engines.append(create(sizes, num_threads()))
        except EngineMissing as error:
            skipped[name] = str(error)
    return engines, skipped


def _key(engine: Engine) -> str:
    return f"{engine.name} {engine.group}"


def entries(
    fields: Entry, samples: Mapping[tuple[str, int], Sequence[float]], key: str, num_bytes: int | None = None
) -> list[Entry]:
    """One result for each number of rows: median and best milliseconds, and the bytes a pass streams where known."""
    made = [
        fields | {"rows": rows, "ms": round(statistics.median(times), 3), "ms_best": round(min(times), 3)}
        for (name, rows), times in samples.items()
        if name == key
    ]
    return made if num_bytes is None else [entry | {"bytes": num_bytes} for entry in made]


def describe_machine(limits: Limits) -> Entry:
    """The JSON's head: the machine, and its limits as medians over all rounds, with their range."""
    found: Entry = {"hardware": f"{cpu_name()}, {num_threads()} threads, {instruction_set()}"}
    for name, values, digits in (("stream_gb_per_s", limits.stream, 2), ("dot_gmac_per_s", limits.dots, 1)):
        found[name] = round(statistics.median(values), digits) if values else None
        found[f"{name}_range"] = [round(min(values), digits), round(max(values), digits)] if values else None
    return found


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()
