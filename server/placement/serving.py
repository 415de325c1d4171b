"""Where the parts of a server go: from --vram, --drafter-device and the card to places for drafter and layers.

Nothing in here ends a start: what cannot be had is said, and the part stays on the CPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from drafters.checkpoint import NETWORKS, read_config, read_fields
from server.placement.cost import Rates
from server.placement.devices import Card, Placement, PlacementError, find_card, is_device_failure, on_cpu
from server.placement.machine import compute_with, measure_machine
from server.placement.plan import Plan, Request, make_plan, with_stream
from server.placement.shape import STORED, PlanError, TargetShape, read_shape
from server.placement.what_if import MARGIN_BYTES, this_machine
from server.targets.checkpoint import stored_weights
from server.targets.layer_stream import Stream
from server.targets.upper_layers import Split

logger = logging.getLogger(__name__)

READS = (
    "--stream-prefill: the GPU reads prompts in blocks of {} tokens; its rounding is not the CPU's, so an answer to "
    "such a prompt may be in other words than without, or than after the GPU failed"
)
SMALL_MODEL_SHARE = 1.25  # of a small language model's file: what it takes with its keys and values


@dataclass(frozen=True)
class Wanted:
    """What is to be placed. weights None: as stored; drafter: its folder, None for none; vram None: what is free.

    capacity: rows of each of ``num_slots`` slots; rows: of one request's tree.
    """

    target: Path
    weights: str | None
    drafter: Path | None
    drafter_device: str
    vram: int | None
    num_slots: int
    capacity: int
    rows: int
    threads: int | None = None
    stream_prefill: bool = False


@dataclass(frozen=True)
class Placed:
    """head_rows: the tokens that the drafter may draft, the first ones of the vocabulary; None: all it knows.

    split None: the target is on the CPU. reason: why something is not where it was asked to be; empty where it is.
    drafter_bytes: what its files take, 0 without one; stream: where prompts are read, None: on the CPU.
    """

    drafter: Placement
    head_rows: int | None = None
    split: Split | None = None
    plan: Plan | None = None
    reason: str = ""
    drafter_bytes: int = 0
    stream: Stream | None = None


def place_parts(wanted: Wanted) -> Placed:
    """Places by the plan that is expected to be fastest with this drafter, within what the card has."""
    try:
        asked = "--stream-prefill is" * wanted.stream_prefill
        asked = asked if wanted.vram is None else f"--vram {wanted.vram} bytes are"
        card = find_card("auto" if wanted.drafter_device == "cpu" and asked else wanted.drafter_device)
        if card is None and asked:
            raise PlacementError(f"{asked} given, and torch sees no GPU here")
    except PlacementError as error:
        return stays_here(str(error))
    except RuntimeError as error:  # a card that others have filled refuses even to be asked
        if not is_device_failure(error):
            raise
        return stays_here(f"the GPU cannot be used ({type(error).__name__}: {error})")
    return Placed(on_cpu()) if card is None else place_on(card, wanted)


def stays_here(reason: str) -> Placed:
    """Everything on the CPU, and why."""
    logger.warning("%s; everything runs on the CPU", reason)
    return Placed(on_cpu(), reason=reason)


def place_on(card: Card, wanted: Wanted) -> Placed:
    """By a plan for this card."""
    budget, reason = budget_of(card, wanted.vram)
    drafts_there = wanted.drafter is not None and wanted.drafter_device != "cpu"
    blocks, head_rows = (0, None) if wanted.drafter is None or not drafts_there else network_of(wanted.drafter)
    if drafts_there and not blocks and wanted.drafter is not None:
        budget -= small_model_bytes(wanted.drafter)
    try:
        shape = read_shape(str(wanted.target))
        weights = wanted.weights or (STORED if shape.stored_bytes is not None else stored_weights(wanted.target))
        request = Request(
            shape, weights, min(wanted.capacity, shape.max_context), max(budget, 0), pinned_blocks=blocks,
            pinned_rows=wanted.rows if blocks else None, pinned_head=head_rows, slots=wanted.num_slots,
        )  # fmt: skip
        rates = rates_here(card, wanted.threads)
        if wanted.stream_prefill:
            request, why_not = with_stream(request, rates)
            reason = "; ".join(filter(None, (reason, why_not)))
            logger.warning("%s", why_not or READS.format(request.stream_block))
        plan = make_plan(request, rates)
    except PlanError as error:
        return stays_here(f"{card.name}: {error}")
    split = plan_split(plan, card)
    streams = plan.placement.stream_bytes > 0
    there = card.drafter if split is None else split.place  # of one type, drafter and layers share the head
    placed = Placed(
        there if drafts_there else on_cpu(), plan_head(plan, shape, head_rows), split, plan, reason,
        stream=Stream(card.layers, plan.request.stream_block) if streams else None,
    )  # fmt: skip
    logger.info("%s, budget %.2f GiB: %s", card.name, budget / 2**30, describe(placed))
    return placed


def budget_of(card: Card, vram: int | None) -> tuple[int, str]:
    """Bytes that may be taken, and why they are fewer than asked for."""
    free = max(card.free_bytes - MARGIN_BYTES, 0)
    if vram is None or vram <= free:
        return (free if vram is None else vram), ""
    reason = (
        f"--vram {vram} bytes are more than {card.name} has: {card.free_bytes} of {card.memory_bytes} are free, and "
        f"{MARGIN_BYTES} stay so"
    )
    logger.warning("%s; %d bytes are used", reason, free)
    return free, reason


def network_of(folder: Path) -> tuple[int, int | None]:
    """Blocks of a trained drafter and how many tokens it can draft, None for all; 0 for a language model."""
    if read_fields(folder).get("model_type") not in NETWORKS:
        return 0, None
    config = read_config(folder)
    return config.num_blocks, config.draft_vocab_size


def small_model_bytes(folder: Path) -> int:
    """What a small language model takes as a drafter, by its files."""
    return int(SMALL_MODEL_SHARE * sum(file.stat().st_size for file in folder.glob("*.safetensors")))


def plan_head(plan: Plan, shape: TargetShape, own: int | None) -> int | None:
    """How far the plan trims a drafter's head that is not trimmed already."""
    choice = plan.placement.choice
    return choice.head_rows if own is None and choice.num_blocks and choice.head_rows < shape.vocab_size else None


def plan_split(plan: Plan, card: Card) -> Split | None:
    """Where the plan cuts the target."""
    layers = plan.placement.choice.gpu_layers
    return Split(plan.request.shape.num_layers - layers, card.layers) if layers else None


def rates_here(card: Card, threads: int | None) -> Rates:
    """The machine as it is measured now, in about a second."""
    compute_with(threads)
    return this_machine(measure_machine(), card.device.index or 0).rates()


def describe(placed: Placed) -> str:
    """One line for the log."""
    split, plan = placed.split, placed.plan
    layers = "the target on the CPU" if split is None else f"layers from {split.first} on on {split.place.device}"
    taken = "" if plan is None else f", {plan.placement.gpu_bytes} bytes of GPU memory planned"
    head = "" if placed.head_rows is None else f" (its first {placed.head_rows} tokens)"
    reads = "" if placed.stream is None else f", prompts read there in blocks of {placed.stream.block}"
    return f"the drafter on {placed.drafter.device}{head}, {layers}{reads}{taken}"
