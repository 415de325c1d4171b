"""A language model as drafter comes through the loader of targets: native layers, GGUF files, and whom it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from doubles import save_word_tokenizer, tiny_llama
from drafters.drafter import DrafterError, DraftState
from drafters.proposal import Budget
from drafters.small_lm import SmallLMDrafter
from kernels import native
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.language_drafter import check_vocabulary, load_language_drafter
from server.launch import load_drafter
from server.placement.devices import Placement, on_cpu
from server.targets.context import DrafterRoom
from server.targets.loading import load_target
from server.targets.native_target import NativeTarget
from server.targets.torch_target import TorchTarget
from server.text import TextError

TEXTS = {0: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 2: [30, 31]}
BUDGET = Budget(rows=12, top_k=3, depth=3)
ROOM = DrafterRoom(1, 64, 64, 1e9)


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    config = tiny_llama().config
    config.intermediate_size, config.head_dim = 160, 32
    torch.manual_seed(1)
    folder = save_model(type(tiny_llama())(config).eval(), "small")
    save_word_tokenizer(folder)
    return folder


def trees(drafter: SmallLMDrafter) -> list[Any]:
    """First of a text, then of what it has become, so that both passes and slots are used."""
    found = []
    for more in ([], [12, 13]):
        states = [DraftState(slot, [*text, *more]) for slot, text in TEXTS.items()]
        found += drafter.propose(states, BUDGET)
    return found


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
def test_the_native_layers_draft_the_trees_of_transformers_layers(folder: Path) -> None:
    drafter = load_language_drafter(folder, 67, on_cpu(), 3, 64)
    assert isinstance(drafter.model, NativeTarget)
    slow = SmallLMDrafter(TorchTarget.load(folder, "fp32", 3, 64), 67)
    for got, want in zip(trees(drafter), trees(slow), strict=True):
        assert (got.token_ids, got.parents) == (want.token_ids, want.parents)
        assert got.log_probs == pytest.approx(want.log_probs, abs=1e-4)
    assert drafter.slots.lengths == slow.slots.lengths == [13, 0, 4]


def test_a_place_that_is_no_cpu_of_ours_gets_transformers_layers(folder: Path) -> None:
    """As an accelerator does: torch's own products, in its type; here the device that every machine has."""
    drafter = load_language_drafter(folder, 67, Placement(torch.device("cpu", 0), torch.float32), 3, 64)
    assert len(trees(drafter)[0]) > 3


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_file_drafts_for_another_one(tiny_gguf: Any, tmp_path: Path, kind: str) -> None:
    path = tiny_gguf.write(tmp_path / "target.gguf", GGMLQuantizationType.Q8_0)
    small = tiny_gguf.write(tmp_path / "small.gguf", GGMLQuantizationType[kind])
    target = load_target(path, None, 2, 120, 1)
    drafter = load_drafter(target, path, str(small), on_cpu(), DrafterRoom(2, 120, 240, 1e9))
    assert isinstance(drafter, SmallLMDrafter)
    with pytest.raises(DrafterError, match=r"small\.gguf takes .* 0 MiB are left"):
        load_drafter(target, path, str(small), on_cpu(), DrafterRoom(2, 120, 240, 1000.0))
    requests = [Request(f"r{i}", [5, 9, 40 + i], 24, SamplingParams(temperature=0.7 * i, seed=i)) for i in range(3)]
    plain, served = (
        generate(Engine(target, each, EngineOptions(2, 100, BUDGET)), requests) for each in (None, drafter)
    )
    assert [r.token_ids for r in served.values()] == [r.token_ids for r in plain.values()]
    stats = served["r0"].finished.stats
    assert stats.drafted > 0
    assert kind != "Q8_0" or stats.acceptance_length > 3  # the target's own codes


@pytest.mark.parametrize("sizes", [(48, 100), (80, 90)], ids=str)
def test_shapes_that_do_not_divide_into_groups_draft_and_verify(
    save_model: Callable[..., Path], sizes: tuple[int, int]
) -> None:
    config = tiny_llama().config
    config.hidden_size, config.intermediate_size = sizes
    config.head_dim = 16
    folder = save_model(type(tiny_llama())(config).eval(), "odd")
    save_word_tokenizer(folder)
    for weights in ("int8", "int4", None):
        target = load_target(folder, weights, 2, 60, 1)
        drafter = load_drafter(target, folder, str(folder), on_cpu(), DrafterRoom(2, 60, 120, 1e9))
        requests = [Request("r", [1, 2, 3], 12, SamplingParams(temperature=0))]
        plain, served = (generate(Engine(target, each, EngineOptions(2, 40)), requests) for each in (None, drafter))
        assert served["r"].token_ids == plain["r"].token_ids
        assert served["r"].finished.stats.accepted > 4


def test_it_drafts_no_further_than_its_own_positions(folder: Path) -> None:
    drafter = load_language_drafter(folder, 67, on_cpu(), 1, 10**6)
    assert drafter.slots.capacity == 256


def test_what_cannot_draft_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    target = load_target(folder, None, 1, 64, 1)
    broken = shutil.copytree(folder, tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DrafterError, match=r"broken cannot be a drafter: .*truncated or damaged"):
        load_drafter(target, folder, str(broken), on_cpu(), ROOM)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(DrafterError, match="holds its weights as a pickle"):
        load_drafter(target, folder, str(broken), on_cpu(), ROOM)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(TextError, match=r"broken/tokenizer\.json does not exist"):
        load_drafter(target, folder, str(broken), on_cpu(), ROOM)


def test_every_token_of_the_target_must_mean_the_same() -> None:
    words = {f"word{i}": i for i in range(5)}
    check_vocabulary(words | {"padding": 5}, words, "small", "big")
    with pytest.raises(DrafterError, match=r"small has another vocabulary than big: token 4 is 'x' there and 'word4'"):
        check_vocabulary({**{f"word{i}": i for i in range(4)}, "x": 4}, words, "small", "big")
    with pytest.raises(DrafterError, match=r"token 4 is None there"):
        check_vocabulary({f"word{i}": i for i in range(4)}, words, "small", "big")
