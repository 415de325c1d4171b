"""Prompts read block by block on a device through which the layers pass, one behind the other, on a fake device."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from doubles import tiny_llama
from drafters.proposal import Budget
from fake_device import FakeDevice, fake_device
from kernels import native
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.placement.devices import Placement
from server.targets.layer_stream import Stream, buffer_bytes
from server.targets.native_target import NativeTarget
from server.targets.packed_model import pack_model
from server.targets.split_target import SplitTarget
from server.targets.target import PrefillChunk
from server.targets.upper_layers import Split

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native layers are not built")

DEVICE = torch.device("fake", 0)
LAYERS, HIDDEN, BLOCK, CAPACITY = 4, 64, 32, 160
CHANCE = random.Random(5)
TEXT = [CHANCE.randrange(67) for _ in range(110)]
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    return save_model(tiny_llama(num_layers=LAYERS), "streamed")


def stream(dtype: torch.dtype = torch.float32) -> Stream:
    return Stream(Placement(DEVICE, dtype), BLOCK)


def streaming(folder: Path, weights: str = "fp32", dtype: torch.dtype = torch.float32) -> NativeTarget:
    return NativeTarget(pack_model(folder, weights), "streamed", 3, CAPACITY, None, stream(dtype))


def answers(
    target: NativeTarget, prompts: list[list[int]], cache_bytes: int = 0, engine: Engine | None = None
) -> list[tuple[int, ...]]:
    engine = engine or Engine(target, None, EngineOptions(3, 140, Budget(6, 2, 3), cache_bytes=cache_bytes))
    requests = [Request(f"r{number}", prompt, 9, GREEDY) for number, prompt in enumerate(prompts)]
    found = generate(engine, requests)
    engine.check_integrity()
    return [found[request.request_id].token_ids for request in requests]


def qwen3() -> Qwen3ForCausalLM:
    """With norms of queries and keys, and widths that 4 bits take."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=67, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: tiny_llama(num_layers=LAYERS), qwen3])
@pytest.mark.parametrize(("weights", "error"), [("fp32", 1e-4), ("int8", 0.15), ("int4", 0.15)])
def test_a_block_read_there_gives_what_the_cpu_gives_up_to_rounding(
    save_model: Callable[..., Path], make: Callable[[], LlamaForCausalLM | Qwen3ForCausalLM], weights: str, error: float
) -> None:
    folder = save_model(make(), "model")
    here = NativeTarget(pack_model(folder, weights), "here", 3, CAPACITY)
    with fake_device():
        there = streaming(folder, weights)
        for target in (here, there):
            for start in (0, BLOCK):
                found = target.prefill(PrefillChunk(1, TEXT[start : start + BLOCK]))
        want = here.prefill(PrefillChunk(1, TEXT[64:70]))
        found = there.prefill(PrefillChunk(1, TEXT[64:70]))
        rows = [[part.float() for part in target.read_rows(1, 0, 2 * BLOCK)] for target in (here, there)]
        for own, other in zip(*rows, strict=True):
            assert (own - other).abs().max() <= error * own.abs().max()
        assert (want.last - found.last).abs().max() <= error * want.last.abs().max()
        assert there.prompts is not None and there.prompts.layers is not None


@settings(max_examples=4)
@given(st.integers(1, 110), st.integers(0, 110), st.booleans(), st.integers(0, 2))
def test_an_answer_depends_on_the_prompt_alone(
    folder: Path, length: int, shared: int, is_split: bool, neighbours: int
) -> None:
    """Neither on what is cached of it, nor on who is read beside it: blocks of the prompt itself decide."""
    prompt, before = TEXT[:length], [*TEXT[:shared], 3, 1, 4]
    with fake_device():

        def make() -> NativeTarget:
            packed = pack_model(folder, "fp32")
            if is_split:
                return SplitTarget(packed, "split", 3, CAPACITY, None, Split(2, stream().place), stream())
            return NativeTarget(packed, "whole", 3, CAPACITY, None, stream())

        alone, busy = make(), make()
        want = answers(alone, [prompt])[0]
        rows = [part.clone() for part in keys_of(alone, prompt)]
        engine = Engine(busy, None, EngineOptions(3, 140, Budget(6, 2, 3), cache_bytes=10**7))
        answers(busy, [before], engine=engine)
        assert answers(busy, [prompt] * (1 + neighbours), engine=engine) == [want] * (1 + neighbours)
        answers(busy, [prompt + [5] * 20], engine=engine)
        assert answers(busy, [prompt], engine=engine)[0] == want
        engine = Engine(busy, None, EngineOptions(3, 140, Budget(6, 2, 3), cache_bytes=10**7))
        for own, other in zip(rows, keys_of(busy, prompt), strict=True):
            assert torch.equal(own, other)


def keys_of(target: NativeTarget, prompt: list[int]) -> tuple[torch.Tensor, ...]:
    """The rows of a prompt as the engine has them read: whole blocks, then the rest."""
    whole = len(prompt) // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        target.prefill(PrefillChunk(0, prompt[start : start + BLOCK]))
    if whole < len(prompt):
        target.prefill(PrefillChunk(0, prompt[whole:]))
    rows = target.read_rows(0, 0, len(prompt))
    target.release(0)
    return rows


def test_only_whole_blocks_of_a_prompt_go_up_and_every_byte_is_counted(folder: Path) -> None:
    with fake_device() as device:
        target = streaming(folder, "int8", torch.float16)
        assert target.prompts is not None and target.info.stream_block == BLOCK
        up, down = device.up_bytes, device.down_bytes
        answers(target, [TEXT[: BLOCK - 1]])
        assert (device.up_bytes, device.down_bytes) == (up, down), "the CPU alone"
        answers(target, [TEXT[: 2 * BLOCK + 5]])
        weights = 2 * sum(map(buffer_bytes, target.stack.layers))
        kept = 2 * LAYERS * 2 * 2 * 16  # keys and values of a position: fp16, two heads of 16
        counted = target.prompts.state["bus_bytes"]
        assert counted["up"] == weights + 2 * BLOCK * HIDDEN * 2 + BLOCK * kept
        assert counted["down"] == 2 * BLOCK * HIDDEN * 2 + 2 * BLOCK * kept
        assert device.up_bytes - up == counted["up"] + 2 * BLOCK * 8, "and the positions"
        assert device.down_bytes - down == counted["down"]


@settings(max_examples=4)
@given(st.integers(1, 700), st.sampled_from([0, 10**7]))
def test_a_device_that_dies_while_it_reads_leaves_the_prompt_to_the_cpu(
    folder: Path, later: int, cache_bytes: int
) -> None:
    prompts = [TEXT[:100], TEXT[:70], TEXT[:100]]
    want = answers(NativeTarget(pack_model(folder, "fp32"), "here", 3, CAPACITY), prompts)
    with fake_device() as device:
        target = streaming(folder)
        device.dies_at = device.operations + later
        assert answers(target, prompts, cache_bytes) == want  # in fp32 both round alike enough
        state = target.prompts.state if target.prompts is not None else {}
        assert device.dead == (state["block"] == 0) == ("fallen off the bus" in state["reason"])


def test_pages_that_the_cpu_read_are_not_taken_for_the_devices(folder: Path) -> None:
    moment = [0.0]
    with fake_device() as device:
        target = streaming(folder, "int8")
        assert target.prompts is not None
        target.prompts.now = lambda: moment[0]
        engine = Engine(target, None, EngineOptions(3, 140, Budget(6, 2, 3), cache_bytes=10**7))
        want = answers(target, [TEXT[:100]], engine=engine)
        device.dead = True
        answers(target, [TEXT[40:80]], engine=engine)
        assert target.info.stream_block == 0 and "tried again" not in target.prompts.recovery.reason
        here = answers(target, [TEXT[:100]], engine=engine)
        assert here == answers(NativeTarget(pack_model(folder, "int8"), "here", 3, CAPACITY), [TEXT[:100]])
        device.dead, moment[0] = False, 2.0
        answers(target, [TEXT[50:60]], engine=engine)
        assert target.info.stream_block == BLOCK and not target.prompts.recovery.reason
        up = device.up_bytes
        assert answers(target, [TEXT[:100]], engine=engine) == want and device.up_bytes == up, "from its own pages"


def test_a_device_too_small_for_a_layer_leaves_prompts_to_the_cpu(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_device(limit=50_000):
        target = streaming(folder)
        assert target.info.stream_block == 0 and "prompts are read on the CPU" in caplog.text
        assert len(answers(target, [TEXT[:70]])[0]) == 9


def test_a_layer_passes_through_in_the_memory_that_is_planned_for(folder: Path) -> None:
    from server.placement.plan import WORKSPACE_BYTES, Request, stream_bytes
    from server.placement.shape import read_shape

    shape = read_shape(str(folder))
    request = Request(shape, "int4", CAPACITY, 1 << 30, stream_block=BLOCK)

    def peak(device: FakeDevice) -> int:
        target = streaming(folder, "int4", torch.float16)
        held = device.used
        answers(target, [TEXT[:100]])
        assert held <= stream_bytes(request) + 4 * CAPACITY * 16 * 2, "with the table of angles"
        return device.peak

    with fake_device() as device:
        assert peak(device) <= stream_bytes(request) + WORKSPACE_BYTES
