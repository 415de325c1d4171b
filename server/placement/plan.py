"""A budget of GPU memory to what lies where: every sensible placement is priced, the fastest that fits is taken.

Pure functions of a shape, a budget and a machine's rates; no weights are read. No plan exceeds its budget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server.placement.cost import ROUND_MS, Choice, Prediction, Rates, predict, streaming_break_even, verify_ms
from server.placement.shape import FP16, WEIGHT_BYTES, PlanError, TargetShape

MAX_BLOCKS = 6
ROWS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 60)
DEPTHS = (3, 5, 7)
TRIMMED_HEAD = 32_768  # tokens that a trimmed head can draft (FR-Spec: a quarter of a large vocabulary loses little)
WORKSPACE_BYTES = 64 * 2**20  # activations of one round and the allocator's rounding
NUM_ALTERNATIVES = 3
BLOCK_STEP, LEAST_BLOCK = 64, 128  # prompts are streamed in blocks of twice the break-even, and a multiple of 64


@dataclass(frozen=True)
class Request:
    """What is to be planned. budget_bytes None: no GPU. A pin fixes a choice that is searched otherwise.

    context: positions of each of ``slots`` requests; stream_block: positions of a prompt that the GPU reads at once
    with layers streamed to it, 0: the CPU reads.
    """

    shape: TargetShape
    weights: str
    context: int
    budget_bytes: int | None
    pinned_blocks: int | None = None
    pinned_layers: int | None = None
    pinned_rows: int | None = None
    pinned_head: int | None = None
    slots: int = 1
    stream_block: int = 0

    def __post_init__(self) -> None:
        self.shape.weight_bytes(self.weights)
        if not 1 <= self.context <= self.shape.max_context:
            raise PlanError(
                f"a context of {self.context} is asked for; {self.shape.name} allows 1 to {self.shape.max_context}"
            )
        if self.pinned_blocks is not None and not 0 <= self.pinned_blocks <= MAX_BLOCKS:
            raise PlanError(f"blocks={self.pinned_blocks}: a drafter has 1 to {MAX_BLOCKS}, and 0 is no drafter")
        if self.pinned_layers is not None and not 0 <= self.pinned_layers <= self.shape.num_layers:
            raise PlanError(f"layers={self.pinned_layers}: {self.shape.name} has {self.shape.num_layers}")
        if self.pinned_layers and self.budget_bytes is None:
            raise PlanError(f"layers={self.pinned_layers}: without GPU memory (vram) every layer is on the CPU")
        if self.pinned_rows is not None and self.pinned_rows < 1:
            raise PlanError(f"rows={self.pinned_rows}: a pass has at least the root")


@dataclass(frozen=True)
class Placement:
    """Bytes by place.

    drafter_bytes: fp16 with the copies of embedding and head, on the CPU int8 without the embedding; gpu_layer_bytes:
    the target's layers on the GPU with the norm, and the whole head where the drafter's copy is trimmed; gpu_kv_bytes:
    keys and values of both; cpu_bytes: all of the target's weights, keys and values of the layers that the CPU
    computes, what crossed to the others, and the drafter where there is no GPU; stream_bytes: what the CPU's layers
    pass through on the GPU, with one layer's keys and values and a block's activations.
    """

    choice: Choice
    drafter_bytes: int
    gpu_layer_bytes: int
    gpu_kv_bytes: int
    cpu_bytes: int
    stream_bytes: int = 0

    @property
    def gpu_bytes(self) -> int:
        """All that must fit into the budget."""
        if not self.choice.on_gpu:
            return 0
        placed = self.drafter_bytes + self.gpu_layer_bytes + self.gpu_kv_bytes
        return placed + self.stream_bytes + WORKSPACE_BYTES


@dataclass(frozen=True)
class Plan:
    """A placement with its predicted times; ``alternatives`` are the runners-up, best first."""

    request: Request
    placement: Placement
    prediction: Prediction
    plain_tokens_per_s: float
    alternatives: tuple[Plan, ...] = ()

    def json(self) -> dict[str, Any]:
        """The plan as ``dovetail plan`` prints it."""
        choice, placed, found = self.placement.choice, self.placement, self.prediction
        return {
            "shape": dataclasses.asdict(self.request.shape),
            "weights": self.request.weights,
            "context": self.request.context,
            "budget_bytes": self.request.budget_bytes,
            "placement": {
                "drafter_device": "gpu" if choice.on_gpu else "cpu",
                "drafter_blocks": choice.num_blocks,
                "drafter_head_tokens": choice.head_rows,
                "drafter_bytes": placed.drafter_bytes,
                "gpu_layers": choice.gpu_layers,
                "gpu_layer_bytes": placed.gpu_layer_bytes,
                "gpu_kv_bytes": placed.gpu_kv_bytes,
                "stream_bytes": placed.stream_bytes,
                "gpu_bytes": placed.gpu_bytes,
                "cpu_bytes": placed.cpu_bytes,
                "rows": choice.rows,
                "depth": choice.depth,
            },
            "predicted": {
                "tokens_per_s": round(found.tokens_per_s, 3),
                "plain_tokens_per_s": round(self.plain_tokens_per_s, 3),
                "speedup": round(found.tokens_per_s / self.plain_tokens_per_s, 3),
                "acceptance_length": round(found.acceptance_length, 3),
                "verify_ms": round(found.verify_ms, 3),
                "draft_ms": round(found.draft_ms, 3),
                "transfer_ms": round(found.transfer_ms, 4),
            },
            "alternatives": [
                {key: plan.json()[key] for key in ("placement", "predicted")} for plan in self.alternatives
            ],
        }


def make_plan(request: Request, rates: Rates) -> Plan:
    """The fastest placement that fits, with the runners-up of other drafters or layers.

    Errors: PlanError where the budget holds no drafter, with the bytes that would be enough.
    """
    placements = [place(request, choice) for choice in choices(request)]
    fitting = [each for each in placements if request.budget_bytes is None or each.gpu_bytes <= request.budget_bytes]
    if not fitting:
        least = min(each.gpu_bytes for each in placements)
        raise PlanError(
            f"{request.budget_bytes} bytes hold no plan for {request.shape.name} at a context of {request.context}: "
            f"the smallest needs {least} bytes ({least / 2**30:.2f} GiB); give more, shorten the context, or plan "
            "without a GPU"
        )
    plain = plain_tokens_per_s(request, rates)
    plans = [
        Plan(request, each, predict(request.shape, request.weights, request.context, rates, each.choice), plain)
        for each in fitting
    ]
    plans.sort(key=lambda plan: (-plan.prediction.tokens_per_s, plan.placement.gpu_bytes))
    runners_up: dict[tuple[int, int, int], Plan] = {}
    for plan in plans:
        choice = plan.placement.choice
        runners_up.setdefault((choice.num_blocks, choice.head_rows, choice.gpu_layers), plan)
    best, *others = runners_up.values()
    return dataclasses.replace(best, alternatives=tuple(others[:NUM_ALTERNATIVES]))


def with_stream(request: Request, rates: Rates) -> tuple[Request, str]:
    """The request with prompts read by the GPU, where that pays and fits; else as it is, and why."""
    least = streaming_break_even(request.shape, request.weights, rates)
    block = 0 if least is None else max(BLOCK_STEP * math.ceil(2 * least / BLOCK_STEP), LEAST_BLOCK)
    streamed = dataclasses.replace(request, stream_block=block)
    if least is None:
        reason = "the CPU reads a prompt of any length sooner than layers reach a GPU"
    elif block > request.context:
        reason = f"streaming layers to the GPU pays from {block} tokens on, and a prompt has {request.context} at most"
    else:
        try:
            make_plan(streamed, rates)
        except PlanError as error:
            reason = f"no room for layers that pass through: {error}"
        else:
            return streamed, ""
    return request, f"--stream-prefill is not followed: {reason}"


def choices(request: Request) -> Iterator[Choice]:
    """Every placement worth pricing: blocks, head, layers on the GPU, tree sizes."""
    shape, on_gpu = request.shape, request.budget_bytes is not None
    # Without a GPU a drafter takes the CPU's time, so decoding plainly is one of the choices.
    blocks = range(on_gpu, MAX_BLOCKS + 1) if request.pinned_blocks is None else (request.pinned_blocks,)
    heads = sorted({min(TRIMMED_HEAD, shape.vocab_size), shape.vocab_size})
    heads = heads if request.pinned_head is None else [request.pinned_head]
    layers = range(shape.num_layers + 1 if on_gpu else 1) if request.pinned_layers is None else (request.pinned_layers,)
    rows = ROWS if request.pinned_rows is None else (request.pinned_rows,)
    for num_blocks, gpu_layers in itertools.product(blocks, layers):
        if num_blocks == 0:
            yield Choice(0, shape.vocab_size, gpu_layers, 1, 0, on_gpu)
            continue
        for head, num_rows, depth in itertools.product(heads, rows, DEPTHS):
            yield Choice(num_blocks, head, gpu_layers, num_rows, depth, on_gpu)


def place(request: Request, choice: Choice) -> Placement:
    """The bytes of one choice."""
    shape, context = request.shape, request.context * request.slots
    drafter = 0
    if choice.num_blocks:
        with_head = shape.drafter_parameters(choice.num_blocks) + choice.head_rows * shape.hidden_size
        embedding = shape.vocab_size * shape.hidden_size
        # On the CPU the embedding is the target's own, and the native drafter holds the rest in bytes.
        drafter = FP16 * (with_head + embedding) if choice.on_gpu else round(with_head * WEIGHT_BYTES["int8"])
    layers = 0
    if choice.gpu_layers:
        own_head = shape.head_parameters if choice.num_blocks == 0 or choice.head_rows < shape.vocab_size else 0
        layers = FP16 * (choice.gpu_layers * shape.layer_parameters + shape.hidden_size + own_head)
    kv_layers = choice.num_blocks + choice.gpu_layers
    kv = FP16 * context * shape.kv_elements(kv_layers)
    # Main memory keeps every layer, so that the text outlives the card, and for each position what went up to it.
    weights = request.weights
    crossed = FP16 * context * shape.hidden_size if choice.gpu_layers else 0
    cached = context * shape.kv_bytes(shape.num_layers - choice.gpu_layers, weights)
    in_memory = shape.target_bytes(weights) + cached + crossed
    cpu = round(in_memory)
    if choice.on_gpu:
        streams = request.stream_block and choice.gpu_layers < shape.num_layers
        return Placement(choice, drafter, layers, kv, cpu, stream_bytes(request) if streams else 0)
    return Placement(choice, drafter, 0, 0, cpu + drafter + kv)


def stream_bytes(request: Request) -> int:
    """Two buffers of a packed layer, that layer in fp16, its keys and values of one request, and a block's rows.

    Of a row are counted: its hidden states before and after, what attention and the MLP make of them, and its mask.
    """
    shape, block = request.shape, request.stream_block
    packed = shape.block_parameters * shape.weight_bytes(request.weights) + 2 * 4 * shape.hidden_size
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    group = shape.num_heads // shape.num_kv_heads
    row = 6 * shape.hidden_size + 3 * shape.intermediate_size + 2 * heads + 2 * (group + 1) * request.context
    kept = 3 * request.context * shape.kv_elements(1)  # the layer's own, and those that come and go
    return round(2 * packed) + FP16 * (shape.layer_parameters + kept + block * row)


def plain_tokens_per_s(request: Request, rates: Rates) -> float:
    """Plain decoding with everything on the CPU: what every speed-up is taken over."""
    alone = Choice(0, request.shape.vocab_size, 0, 1, 0, on_gpu=False)
    return 1e3 / (ROUND_MS + verify_ms(request.shape, request.weights, request.context, rates, alone, 1))
