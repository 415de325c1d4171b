"""Serving places its parts by --vram and goes on wherever it can, on a fake card."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from doubles import OracleDrafter, save_word_tokenizer, tiny_llama
from drafters.checkpoint import save_drafter
from drafters.dovetail import load_drafter as load_dovetail
from drafters.drafter import DraftState, Observation
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget
from fake_device import fake_device
from kernels import native
from server.engine.ahead import AheadDrafter
from server.engine.completion import generate
from server.engine.engine import Engine
from server.engine.request import Request, SamplingParams
from server.launch import load_parts
from server.placement import plan, serving
from server.placement.cost import Rates
from server.placement.devices import Card, Placement, PlacementError, find_card, on_cpu
from server.placement.moving_drafter import MovingDrafter
from server.placement.plan import WORKSPACE_BYTES
from server.placement.serving import Placed, Wanted, place_parts
from server.placement.what_if import MARGIN_BYTES
from server.placement.whereabouts import placement_status
from server.settings import Settings
from server.targets.split_target import SplitTarget

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native layers are not built")

DEVICE = torch.device("fake", 0)
GIB = 2**30
PROMPT, GREEDY = [1, 2, 3, 4, 5], SamplingParams(temperature=0)
SLOW_CPU = Rates(0.01, 0.1, gpu_gb_per_s=200.0, gpu_tflops=5.0)


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    folder = save_model(tiny_llama(num_layers=4), "served")
    save_word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("drafter")
    save_drafter(DovetailNetwork(DovetailConfig(64, 67, 172, 4, 2, 16)), folder)
    return folder


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A card with so much free memory; its CPU is slow enough for every layer to pay."""

    def put(free_bytes: int) -> None:
        found = Card(DEVICE, "fake card", 8 * GIB, free_bytes, torch.float32)
        monkeypatch.setattr(serving, "find_card", lambda name: None if name == "cpu" else found)
        monkeypatch.setattr(serving, "rates_here", lambda card, threads: SLOW_CPU)

    return put


def settings(folder: Path, drafter: Path | None, **more: object) -> Settings:
    named = "none" if drafter is None else str(drafter)
    values = {"target": str(folder), "drafter": named, "trees": "fixed", "lookup": False, "context": 64, "max_seqs": 2}
    return Settings(**(values | more))  # type: ignore[arg-type]


def text(engine: Engine, number: int = 0) -> tuple[int, ...]:
    return generate(engine, [Request(f"r{number}", PROMPT, 10, GREEDY)])[f"r{number}"].token_ids


def wanted(folder: Path, drafter: Path | None, vram: int | None, device: str = "auto") -> Wanted:
    return Wanted(folder, None, drafter, device, vram, 2, 72, 8)


def test_a_plan_is_executed_within_its_budget_and_the_text_is_the_cpus(
    folder: Path, drafter: Path, card: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    want = text(load_parts(settings(folder, None, drafter_device="cpu"))[0])
    card(4 * GIB)
    budgets = [WORKSPACE_BYTES + size for size in (330_000, 2_000_000)]
    layers = []
    for budget in budgets:
        with fake_device(limit=2 * budget) as device:
            engine, placed = load_parts(settings(folder, drafter, vram=budget))
            loaded = device.used
            assert text(engine) == want
            assert placed.plan is not None and placed.plan.placement.gpu_bytes <= budget
            # Layers and drafter are held in fp32 on this card, which has twice the planned two bytes.
            assert loaded <= 2 * (placed.plan.placement.gpu_bytes - WORKSPACE_BYTES) + 100_000
            assert device.peak - loaded < WORKSPACE_BYTES
            status = placement_status(engine, placed, {})
            size = sum(file.stat().st_size for file in drafter.glob("*.safetensors"))
            assert status["drafter"] == {"device": "fake:0", "reason": "", "bytes": size} and not status["reason"]
            assert status["bus_bytes"]["up"] > 0
            layers.append(status.get("gpu_layers", {"layers": 0})["layers"])
    assert layers[0] < layers[1] == 4, "more memory, more layers"


def test_prompts_are_read_on_the_card_where_that_is_asked_for(
    folder: Path, card: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def without_layers(request: plan.Request, rates: Rates) -> plan.Plan:
        return plan.make_plan(dataclasses.replace(request, pinned_layers=0), rates)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(serving, "make_plan", without_layers)
    prompt = [i % 60 for i in range(150)]

    def answer(engine: Engine) -> tuple[int, ...]:
        return generate(engine, [Request("long", prompt, 10, GREEDY)])["long"].token_ids

    want = answer(load_parts(settings(folder, None, drafter_device="cpu", context=200))[0])
    card(4 * GIB)
    with fake_device() as device:
        engine, placed = load_parts(settings(folder, None, context=200, stream_prefill=True))
        assert placed.plan is not None and placed.plan.placement.stream_bytes > 0
        assert placed.stream is not None and placed.stream.block == engine.target.info.stream_block == 128
        assert "in blocks of 128 tokens; its rounding is not the CPU's" in caplog.text
        assert answer(engine) == want and device.up_bytes > 0
        prompts = placement_status(engine, placed, {})["prompts"]
        assert prompts["block"] == 128 and prompts["bus_bytes"]["down"] > 0 and not prompts["reason"]
    assert place_parts(wanted(folder, None, None)).stream is None


@pytest.mark.parametrize(
    ("free", "vram", "reason"),
    [
        (GIB, 60 * 2**20, "the smallest needs"),
        (GIB, 3 * GIB, f"are more than fake card has: {GIB} of {8 * GIB} are free"),
        (MARGIN_BYTES // 2, None, "0 bytes hold no plan"),
    ],
)
def test_what_a_card_does_not_hold_is_said_and_goes_elsewhere(
    folder: Path, drafter: Path, card: Callable[[int], None], caplog: pytest.LogCaptureFixture,
    free: int, vram: int | None, reason: str,
) -> None:  # fmt: skip
    card(free)
    placed = place_parts(wanted(folder, drafter, vram))
    assert reason in placed.reason and reason in caplog.text
    assert (placed.plan is None) == (placed.drafter.device.type == "cpu") == (vram != 3 * GIB)


@pytest.mark.parametrize(
    ("device", "vram", "reason"),
    [("cuda:0", None, "cuda:0 is asked for"), ("auto", GIB, "torch sees no GPU here"), ("auto", None, "")],
)
def test_without_a_card_the_service_starts_all_the_same(
    folder: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch, device: str, vram: int | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placed = place_parts(wanted(folder, drafter, vram, device))
    assert placed.drafter.device.type == "cpu" and placed.split is None
    assert (reason in placed.reason) and bool(placed.reason) == bool(reason)


def test_a_card_that_others_have_filled_is_left_alone(
    folder: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str) -> Card:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(serving, "find_card", full)
    placed = place_parts(wanted(folder, drafter, GIB))
    assert placed.drafter.device.type == "cpu" and "OutOfMemoryError: CUDA out of memory" in placed.reason


def test_a_card_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(PlacementError, match="cuda:3 is asked for; this machine has 1 CUDA devices"):
        find_card("cuda:3")


def test_the_drafter_alone_can_stay_on_the_cpu(folder: Path, drafter: Path, card: Callable[[int], None]) -> None:
    card(4 * GIB)
    found: dict[str, Placed] = {
        "cpu": place_parts(wanted(folder, drafter, None, "cpu")),
        "layers": place_parts(wanted(folder, drafter, GIB, "cpu")),
        "plain": place_parts(wanted(folder, None, None)),
    }
    assert found["cpu"].plan is None and found["cpu"].split is None
    for name in ("layers", "plain"):
        split = found[name].split
        assert split is not None and split.first == 0
    assert found["layers"].drafter.device.type == "cpu"


def test_a_drafter_moves_to_the_cpu_when_its_device_dies_and_back_when_it_lives(
    folder: Path, drafter: Path, card: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card(4 * GIB)
    monkeypatch.setattr(serving, "plan_split", lambda plan, card: None)
    with fake_device() as device:
        engine, placed = load_parts(settings(folder, drafter))
        ahead = engine.drafting.drafter
        moving = ahead.drafter if isinstance(ahead, AheadDrafter) else None
        assert isinstance(moving, MovingDrafter) and not isinstance(engine.target, SplitTarget)
        moment = [0.0]
        moving.now = lambda: moment[0]
        want = text(engine)
        drafted = engine.scheduler  # the engine goes on as it is
        device.dies_at = device.operations + 60
        assert text(engine, 1) == want and drafted is engine.scheduler
        assert moving.recovery.reason.startswith("DeviceLost") and engine.drafting.status.state == "on"
        wait(moving)
        assert text(engine, 2) == want
        assert placement_status(engine, placed, {})["drafter"]["device"] == "cpu"
        assert "fallen off the bus" in json.dumps(placement_status(engine, placed, {}))
        device.dies_at, device.dead, moment[0] = None, False, 2.0
        assert text(engine, 3) == want
        wait(moving)
        assert text(engine, 4) == want
        assert moving.device == "fake:0" and not moving.recovery.reason


def wait(moving: MovingDrafter) -> None:
    """Until the drafter that is being made is there."""
    if moving.loading is not None:
        moving.loading[1].exception()


def test_a_round_of_drafting_moves_features_once_and_ids(drafter: Path) -> None:
    with fake_device() as device:
        embedding = torch.randn(67, 64)
        found = load_dovetail(drafter, embedding, embedding, DEVICE, torch.float16, 1, 64)
        found.observe([Observation(0, torch.randn(4, 64), [1, 2, 3, 4])])
        up, down = device.up_bytes, device.down_bytes
        features = torch.randn(6, 64)
        found.observe([Observation(0, features, [5, 6, 7, 8, 9, 10])])
        # Features in fp16, token and position of each, and from where to where the last output goes.
        assert device.up_bytes - up == 6 * 64 * 2 + 6 * 16 + 16 and device.down_bytes == down
        up = device.up_bytes
        tree = found.propose([DraftState(0, [10])], Budget(8, 2, 4))[0]
        levels, children = 4, 2
        assert len(tree) == 7 and device.down_bytes - down <= (1 + levels * children) * children * 8, "ids and scores"
        assert device.up_bytes - up <= levels * children * (24 + levels * children) + 8, "token, parent, position, mask"


def test_requests_that_lost_their_drafter_are_not_drafted_for_and_new_ones_are() -> None:
    from drafters.drafter import DraftState, Observation
    from drafters.proposal import Budget

    class Dying(OracleDrafter):
        def observe(self, batch: object) -> None:
            raise torch.OutOfMemoryError("no more memory")

    there, here = Placement(DEVICE, torch.float16), on_cpu()
    known = [[1, 2, 3, 4]]
    moving = MovingDrafter(lambda place: (Dying if place is there else OracleDrafter)(known, 9), there, here, time.time)
    assert len(moving.propose([DraftState(0, [1, 2])], Budget(3, 1, 2))[0]) == 2
    moving.observe([Observation(0, torch.zeros(1, 4), [2])])
    assert moving.device == "none" and moving.propose([DraftState(0, [1, 2])], Budget(3, 1, 2))[0].token_ids == ()
    wait(moving)
    states = [DraftState(0, [1, 2]), DraftState(1, [1, 2])]
    lost, fresh = moving.propose(states, Budget(3, 1, 2))
    assert moving.device == "cpu" and len(lost) == 0 and len(fresh) == 2
    moving.release(0)
    assert len(moving.propose(states[:1], Budget(3, 1, 2))[0]) == 2, "the slot has another request now"
