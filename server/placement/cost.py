"""What a placement would cost in time: a roofline of the CPU, the GPU and the bus, and assumptions about drafting.

Times are milliseconds. Everything is a pure function of a target's shape, a placement and a ``Rates``; the page
docs/placement.md has the formulas and says where each constant comes from.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from server.placement.shape import FP16, STORED, WEIGHT_BYTES, TargetShape

# Multiply-adds of one instruction relative to 8-bit dot products, and the share of the peak that kernels reach.
DOT_SHARE = {"fp32": 0.25, "bf16": 0.5, "int8": 1.0, "int4": 1.0, STORED: 1.0}
REACHED_SHARE = 0.7
# torch's fp32 products with 2 to 16 rows took 2.42 times as long as with one (mean, measured on two cores).
TORCH_ROWS_FACTOR = 2.42
GPU_CALL_MS = 0.2  # a drafter's level on the GPU: launches, and the choice of tokens
CPU_CALL_MS = 0.05
# Of a round beside layers, head and drafting, measured on two cores: rows put together, embedded and handed out; what
# the engine does with them.
PASS_MS, ROUND_MS = 0.2, 0.1
# Acceptance length at 16 rows by number of blocks: five and six are the paper's (HumanEval), the others assumed.
ACCEPTANCE = {0: 1.0, 1: 5.0, 2: 5.3, 3: 5.55, 4: 5.75, 5: 5.9, 6: 5.98}
TRIMMED_LOSS = 0.05  # of the drafted tokens, where a trimmed head cannot draft all of them (assumed)
ACCEPTANCE_ROWS, ROW_DECAY = 16, 0.83  # a further row is worth that share of the one before (assumed)


@dataclass(frozen=True)
class MeasuredCosts:
    """Milliseconds by rows of one layer and of the head, and of a pass and of a round beside those."""

    layer_ms: Mapping[int, float]
    head_ms: Mapping[int, float]
    pass_ms: float
    round_ms: float


@dataclass(frozen=True)
class Rates:
    """A machine as costs see it; the bus is the GPU's. ``native``: our kernels, else torch's eager products.

    acceptance: the acceptance length at 16 rows where it is known, instead of the assumption.
    """

    stream_gb_per_s: float
    dot_gmac_per_s: float
    gpu_gb_per_s: float = 0.0
    gpu_tflops: float = 0.0
    bus_gb_per_s: float = 6.0
    bus_latency_us: float = 20.0
    native: bool = True
    acceptance: float | None = None


@dataclass(frozen=True)
class Choice:
    """What is placed: drafter blocks (0: plain decoding), its head's rows, target layers on the GPU, rows of a pass.

    The layers on the GPU are the last ones, with the final norm and the head. Without a GPU the drafter is on the CPU.
    """

    num_blocks: int
    head_rows: int
    gpu_layers: int
    rows: int
    depth: int
    on_gpu: bool


@dataclass(frozen=True)
class Prediction:
    """Times of one round, and what comes of them."""

    tokens_per_s: float
    verify_ms: float
    draft_ms: float
    transfer_ms: float
    acceptance_length: float


def predict(shape: TargetShape, weights: str, context: int, rates: Rates, choice: Choice) -> Prediction:
    """The speed of one placement, batch 1, with ``context`` positions behind the root."""
    verify = verify_ms(shape, weights, context, rates, choice, choice.rows)
    draft = draft_ms(shape, context, rates, choice)
    accepted = acceptance_length(choice, rates, shape.vocab_size)
    transfer = transfer_ms(shape, rates, choice, accepted)
    seconds = (verify + draft + transfer + ROUND_MS) / 1e3
    return Prediction(accepted / seconds, verify, draft, transfer, accepted)


def verify_ms(shape: TargetShape, weights: str, context: int, rates: Rates, choice: Choice, rows: int) -> float:
    """One pass over the target: the CPU's layers, then the GPU's."""
    head_on_gpu = choice.gpu_layers > 0
    cpu = cpu_ms(shape, weights, context, rates, shape.num_layers - choice.gpu_layers, not head_on_gpu, rows)
    if not head_on_gpu:
        return cpu
    gpu_parameters = choice.gpu_layers * shape.layer_parameters + shape.head_parameters
    gpu_kv = context * shape.kv_elements(choice.gpu_layers) * FP16
    return cpu + gpu_ms(gpu_parameters, gpu_kv, rows, rates)


def cpu_ms(
    shape: TargetShape, weights: str, context: int, rates: Rates, cpu_layers: int, has_head: bool, rows: int
) -> float:
    """The CPU's layers, and the head where it is there: bound by memory or by arithmetic."""
    layers = cpu_layers * shape.layer_parameters
    parameters = layers + has_head * shape.head_parameters
    num_bytes = layers * shape.weight_bytes(weights) + has_head * shape.head_bytes(weights)
    kv_bytes = context * shape.kv_bytes(cpu_layers, weights)
    streaming = (num_bytes + kv_bytes) / rates.stream_gb_per_s / 1e6
    if not rates.native:
        return PASS_MS + streaming * (1.0 if rows == 1 else TORCH_ROWS_FACTOR)
    peak = rates.dot_gmac_per_s * DOT_SHARE[weights] * REACHED_SHARE
    return PASS_MS + max(streaming, rows * parameters / peak / 1e6)


def measured_ms(costs: MeasuredCosts, num_layers: int, rows: float) -> float:
    """A pass on the CPU alone, from what was measured of its parts instead of the roofline."""
    return costs.pass_ms + num_layers * between(costs.layer_ms, rows) + between(costs.head_ms, rows)


def between(measured: Mapping[int, float], rows: float) -> float:
    """Linear between measured numbers of rows, and on along the last two beyond them."""
    known = sorted(measured)
    place = min(max(bisect_left(known, rows), 1), len(known) - 1)
    low, high = known[place - 1], known[place]
    return measured[low] + (measured[high] - measured[low]) * (rows - low) / (high - low)


def draft_ms(shape: TargetShape, context: int, rates: Rates, choice: Choice) -> float:
    """All levels of one tree: each reads the drafter and its head once."""
    if choice.num_blocks == 0:
        return 0.0
    parameters = shape.drafter_parameters(choice.num_blocks) + choice.head_rows * shape.hidden_size
    kv_bytes = context * shape.kv_elements(choice.num_blocks) * FP16
    if choice.on_gpu:
        level = gpu_ms(parameters, kv_bytes, min(choice.rows, ACCEPTANCE_ROWS), rates) + GPU_CALL_MS
    else:
        level = (parameters * WEIGHT_BYTES["int8"] + kv_bytes) / rates.stream_gb_per_s / 1e6 + CPU_CALL_MS
    return (choice.depth + 1) * level


def streaming_break_even(shape: TargetShape, weights: str, rates: Rates) -> int | None:
    """Prompt tokens from which on a GPU, to which packed layers are streamed, reads a prompt sooner than the CPU.

    None without a GPU, and where the CPU is always first.
    """
    if not rates.gpu_tflops:
        return None
    parameters = shape.num_layers * shape.layer_parameters
    bus_ms = parameters * shape.weight_bytes(weights) / rates.bus_gb_per_s / 1e6
    cpu_token_ms = parameters / (rates.dot_gmac_per_s * DOT_SHARE[weights] * REACHED_SHARE) / 1e6
    gpu_token_ms = 2 * parameters / rates.gpu_tflops / 1e9
    return math.ceil(bus_ms / (cpu_token_ms - gpu_token_ms)) if cpu_token_ms > gpu_token_ms else None


def gpu_ms(parameters: int, kv_bytes: float, rows: int, rates: Rates) -> float:
    """fp16 layers on the GPU: bound by its memory or by its arithmetic."""
    streaming = (parameters * FP16 + kv_bytes) / rates.gpu_gb_per_s / 1e6
    arithmetic = 2 * rows * parameters / rates.gpu_tflops / 1e9
    return max(streaming, arithmetic)


def transfer_ms(shape: TargetShape, rates: Rates, choice: Choice, accepted: float) -> float:
    """Hidden states over the bus: accepted features to the drafter, and all rows to the GPU's layers and back; ids."""
    if not choice.on_gpu:
        return 0.0
    num_rows = (accepted if choice.num_blocks else 0) + (2 * choice.rows if choice.gpu_layers else 0)
    num_bytes = num_rows * shape.hidden_size * FP16 + choice.rows * 16
    return num_bytes / rates.bus_gb_per_s / 1e6 + 2 * rates.bus_latency_us / 1e3


def acceptance_length(choice: Choice, rates: Rates, vocab_size: int) -> float:
    """Tokens a round, by blocks, rows and depth; at most one more than the tree is deep."""
    if choice.num_blocks == 0 or choice.rows == 1:
        return 1.0
    whole = rates.acceptance or ACCEPTANCE[choice.num_blocks]
    whole = 1 + (whole - 1) * (1 - TRIMMED_LOSS if choice.head_rows < vocab_size else 1)
    share = (1 - ROW_DECAY ** (choice.rows - 1)) / (1 - ROW_DECAY ** (ACCEPTANCE_ROWS - 1))
    return 1 + (whole - 1) * min(share, (choice.depth + 1) / (whole - 1))
