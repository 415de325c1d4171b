"""A target in two parts, the upper one on a fake second device: the same text for every cut, and whatever fails."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles import OracleDrafter, tiny_llama
from drafters.drafter import Drafter
from drafters.proposal import Budget, Proposal
from fake_device import FakeDevice, fake_device
from kernels import native
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.placement.devices import Placement
from server.targets.native_target import NativeTarget
from server.targets.packed_model import pack_model
from server.targets.split_target import SplitTarget
from server.targets.target import PrefillChunk, VerifyRows
from server.targets.upper_layers import Split

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native layers are not built")

DEVICE = torch.device("fake", 0)
LAYERS, HIDDEN, TOKENS = 4, 64, 9
PROMPTS = ([1, 2, 3, 4, 5], [1, 2, 3, 4, 9])  # the second's first page is the first's, where pages are kept
SAMPLING = [SamplingParams(temperature=0), SamplingParams(temperature=1.1, top_p=0.95, seed=3)]
TREE = Proposal((7, 8, 9, 10), (None, None, 0, 2), (-1.0,) * 4)


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    return save_model(tiny_llama(num_layers=LAYERS), "split")


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[list[tuple[int, ...]]]:
    """Of the target on the CPU alone, for each sampling."""
    target = NativeTarget.load(folder, "fp32", 3, 96)
    return [run(target, None, sampling) for sampling in SAMPLING]


def split_target(folder: Path, first: int, dtype: torch.dtype = torch.float32) -> SplitTarget:
    split = Split(first, Placement(DEVICE, dtype))
    return SplitTarget(pack_model(folder, "fp32"), "split", 3, 96, None, split, now=lambda: 0.0)


def run(
    target: NativeTarget, drafter: Drafter | None, sampling: SamplingParams, cache_bytes: int = 0
) -> list[tuple[int, ...]]:
    options = EngineOptions(2, 64, Budget(6, 2, 3), prefill_chunk=4, cache_bytes=cache_bytes)
    engine = Engine(target, drafter, options)
    found = generate(engine, [Request(f"r{i}", p, TOKENS, sampling) for i, p in enumerate(PROMPTS)])
    engine.check_integrity()
    return [found[f"r{i}"].token_ids for i in range(len(PROMPTS))]


def oracle(texts: Sequence[tuple[int, ...]]) -> OracleDrafter:
    return OracleDrafter([[*p, *t] for p, t in zip(PROMPTS, texts, strict=True)], 67)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_text_is_the_same_wherever_the_target_is_cut(
    folder: Path, texts: list[list[tuple[int, ...]]], first: int
) -> None:
    with fake_device():
        target = split_target(folder, first)
        for sampling, want in zip(SAMPLING, texts, strict=True):
            assert run(target, oracle(want), sampling, cache_bytes=10**6) == want
        assert run(target, None, sampling) == want
        assert target.upper_state.layers == LAYERS - first and not target.upper_state.reason


def test_a_pass_moves_the_rows_hidden_states_once_each_way_and_little_else(folder: Path) -> None:
    with fake_device() as device:
        target = split_target(folder, 2, torch.float16)
        target.prefill(PrefillChunk(0, [1, 2, 3, 4]))
        up, down = device.up_bytes, device.down_bytes
        target.verify([VerifyRows(0, 5, TREE)])[0].argmax()
        rows = TREE.num_rows
        assert device.up_bytes - up == rows * HIDDEN * 2 + rows * 8 + rows * rows, "hidden states, positions, mask"
        assert device.down_bytes - down == rows * HIDDEN * 2 + rows * 8, "features and greedy tokens"
        up, down = device.up_bytes, device.down_bytes
        target.keep(0, [0, 1, 3])
        assert (device.up_bytes - up, device.down_bytes - down) == (8, 0), "which row moves"


def test_inner_features_of_both_sides_are_the_same(save_model: Callable[..., Path]) -> None:
    deep = save_model(tiny_llama(num_layers=8), "deep")
    whole = NativeTarget.load(deep, "fp32", 3, 96)
    with fake_device():
        split = split_target(deep, 3)
        wanted = ("low", "mid", "high", "last")  # the inputs of layers 2, 4 and 5
        features = []
        for target in (whole, split):
            target.select_features(wanted)
            features.append(target.prefill(PrefillChunk(0, [1, 2, 3])).features)
        assert features[0].shape == (3, 4 * HIDDEN) and split.upper is not None
        assert torch.allclose(*features, atol=1e-4)


@settings(max_examples=8)
@given(
    st.integers(0, LAYERS - 1), st.integers(1, 1500), st.booleans(), st.sampled_from([0, 10**6]), st.booleans()
)  # fmt: skip
def test_a_device_that_dies_at_any_operation_changes_no_token(
    folder: Path, texts: list[list[tuple[int, ...]]], first: int, later: int, sampled: bool, cached: int, drafts: bool
) -> None:
    want = texts[sampled]
    with fake_device() as device:
        target = split_target(folder, first)
        device.dies_at = device.operations + later
        assert run(target, oracle(want) if drafts else None, SAMPLING[sampled], cached) == want
        assert device.dead == (target.upper is None) == ("fallen off the bus" in target.upper_state.reason)


def test_a_device_comes_back_when_it_works_and_no_request_runs(
    folder: Path, texts: list[list[tuple[int, ...]]]
) -> None:
    moment = [0.0]
    with fake_device() as device:
        target = split_target(folder, 2)
        target.now = lambda: moment[0]
        device.dies_at = device.operations + 50
        assert run(target, None, SAMPLING[0]) == texts[0]
        assert target.upper is None
        moment[0] = 1.5
        target.prefill(PrefillChunk(0, [1]))
        target.release(0)
        assert target.recovery.pause_s == 2.0, "it was tried in vain"
        device.dies_at, device.dead, moment[0] = None, False, 3.0
        target.prefill(PrefillChunk(0, [1, 2]))
        assert target.upper is None, "not before the pause is over"
        target.release(0)
        moment[0] = 4.0
        assert run(target, None, SAMPLING[0]) == texts[0]
        assert target.upper is not None and target.upper_state.layers == 2 and not target.recovery.reason


def test_a_card_that_others_fill_while_it_serves_is_left_and_taken_again(
    folder: Path, texts: list[list[tuple[int, ...]]]
) -> None:
    moment = [0.0]
    with fake_device() as device:
        target = split_target(folder, 1)
        target.now = lambda: moment[0]
        assert run(target, None, SAMPLING[0]) == texts[0] and target.upper is not None
        device.limit = device.used
        assert run(target, oracle(texts[1]), SAMPLING[1]) == texts[1]
        assert target.upper_state.layers == 0 and "out of memory" in target.upper_state.reason
        device.limit, moment[0] = 1 << 40, 2.0
        assert run(target, None, SAMPLING[0]) == texts[0] and target.upper_state.layers == LAYERS - 1


def test_a_mistake_in_the_layers_is_not_taken_for_a_lost_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_device():
        target = split_target(folder, 2)
        assert target.upper is not None
        monkeypatch.setattr(target.upper, "norm", torch.nn.Linear(5, 5).to(DEVICE))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            target.prefill(PrefillChunk(0, [1, 2]))
        assert target.upper_state.layers == 2 and not target.upper_state.reason


def test_a_device_that_is_too_small_leaves_the_layers_where_they_are(
    folder: Path, texts: list[list[tuple[int, ...]]], caplog: pytest.LogCaptureFixture
) -> None:
    with fake_device(limit=100_000):
        target = split_target(folder, 1)
        assert target.upper is None and "out of memory" in target.upper_state.reason
        assert "layers 1 to 3 go on on the CPU" in caplog.text
        assert run(target, None, SAMPLING[0]) == texts[0]


def test_what_lies_on_the_device_is_what_is_counted(folder: Path) -> None:
    def used(first: int, device: FakeDevice) -> int:
        gc.collect()  # what an earlier target left
        before = device.used
        target = split_target(folder, first, torch.float16)
        assert target.upper is not None
        return device.used - before

    with fake_device() as device:
        difference = used(1, device) - used(3, device)
    block = 2 * (HIDDEN * 64 + HIDDEN * 32) * 1 + 3 * HIDDEN * 172 + 2 * HIDDEN
    assert difference == 2 * (2 * block + 2 * 2 * 3 * 96 * 32), "fp16 weights, keys and values of two layers"
