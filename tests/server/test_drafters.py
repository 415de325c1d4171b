"""Every kind of drafter behind the engine: the text stays the target's; ``--drafter`` finds the right kind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from doubles import OracleDrafter, save_word_tokenizer, tiny_llama, tiny_qwen3
from drafters.checkpoint import save_drafter
from drafters.dovetail import DovetailDrafter
from drafters.drafter import Drafter, DrafterError, DraftState
from drafters.eagle import EagleConfig, EagleNetwork
from drafters.native import NativeDrafter
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.ngram import Copied, NGramDrafter
from drafters.proposal import Budget
from drafters.small_lm import SmallLMDrafter
from kernels import native
from server.engine import drafting
from server.engine.completion import Completion, generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.launch import LaunchError, load_drafter
from server.placement.devices import on_cpu
from server.targets.context import DrafterRoom
from server.targets.torch_target import TorchTarget

PROMPTS = ([1, 2, 3, 4, 5], [9], [30, 31, 32, 30, 31, 32, 30], [5, 4, 3, 2, 1, 0, 66])
NUM_TOKENS = 20
CAPACITY = 160
ROOM = DrafterRoom(4, CAPACITY, 4 * CAPACITY, 1e9)
MODES = {"greedy": SamplingParams(temperature=0), "sampled": SamplingParams(temperature=1.2, top_p=0.95, seed=7)}


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    folder = save_model(tiny_llama(), "target")
    save_word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def target(folder: Path) -> TorchTarget:
    return TorchTarget.load(folder, "fp32", num_slots=4, capacity=CAPACITY)


@pytest.fixture(scope="module")
def dovetail_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dovetail")
    save_drafter(DovetailNetwork(DovetailConfig(64, 67, 96, 4, 2, 16)), folder)
    return folder


@pytest.fixture
def load(target: TorchTarget, folder: Path) -> Callable[[str], Drafter | None]:
    return lambda name: load_drafter(target, folder, name, on_cpu(), ROOM)


def run(
    target: TorchTarget, drafter: Drafter | None, mode: str, budget: Budget | None = None, lookup: bool = False
) -> list[Completion]:
    options = EngineOptions(4, 120, budget or Budget(), prefill_chunk=3, lookup=lookup)
    requests = [Request(f"r{i}", p, NUM_TOKENS, MODES[mode]) for i, p in enumerate(PROMPTS)]
    results = generate(Engine(target, drafter, options), requests)
    return [results[f"r{i}"] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("mode", MODES)
def test_the_text_is_the_targets_whatever_drafts(
    load: Callable[[str], Drafter],
    target: TorchTarget,
    save_model: Callable[..., Path],
    dovetail_folder: Path,
    mode: str,
) -> None:
    other = save_model(tiny_qwen3(), "other")
    save_word_tokenizer(other)
    want = [result.token_ids for result in run(target, None, mode)]
    names = [(str(dovetail_folder), False), (str(other), False), ("ngram", False)]
    for name, lookup in [*names, (str(dovetail_folder), True), (str(other), True), ("none", True)]:
        results = run(target, load(name), mode, lookup=lookup)
        assert [result.token_ids for result in results] == want
        assert sum(result.finished.stats.drafted for result in results) > 0


def test_a_language_model_equal_to_the_target_is_always_right(
    load: Callable[[str], Drafter], target: TorchTarget, folder: Path
) -> None:
    for result in run(target, load(str(folder)), "greedy", Budget(rows=5, top_k=1, depth=3)):
        assert result.finished.stats.rounds == -(-(NUM_TOKENS - 1) // 5)


def test_a_right_chain_is_accepted_beside_a_wrong_tree(target: TorchTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[*p, *r.token_ids] for p, r in zip(PROMPTS, run(target, None, "greedy"), strict=True)]

    class KnowingLookup(NGramDrafter):
        """Copies from the finished texts instead of the past."""

        def lookup(self, state: DraftState, count: int) -> Copied:
            known = next(text for text in texts if text[: len(state.token_ids)] == list(state.token_ids))
            return Copied(tuple(known[len(state.token_ids) :][:count]), 3)

    monkeypatch.setattr(drafting, "NGramDrafter", KnowingLookup)
    wrong = OracleDrafter(texts, 67, wrong=True)
    budget = Budget(rows=16, top_k=1, depth=3)
    alone = run(target, wrong, "greedy", budget)
    joined = run(target, wrong, "greedy", budget, lookup=True)
    assert [r.token_ids for r in joined] == [r.token_ids for r in alone]
    assert all(r.finished.stats.acceptance_length == 1 for r in alone)
    assert all(r.finished.stats.acceptance_length > 4 for r in joined)


def test_names_lead_to_their_kind(load: Callable[[str], Drafter | None], folder: Path, dovetail_folder: Path) -> None:
    assert load("none") is None
    assert isinstance(load("ngram"), NGramDrafter)
    assert isinstance(load(str(folder)), SmallLMDrafter)
    dovetail = load(str(dovetail_folder))
    assert dovetail is not None
    assert dovetail.name == "dovetail"
    assert isinstance(dovetail, DovetailDrafter if native.library() is None else NativeDrafter)
    with pytest.raises(LaunchError, match="lookup joins the trees of every drafter"):
        load(f"hybrid:{dovetail_folder}")
    with pytest.raises(LaunchError, match=r"neither a folder, nor a \.gguf file, nor a hub id"):
        load("./nowhere")


def test_an_eagle_3_drafter_reads_three_layers_of_a_deep_target_and_none_of_a_shallow_one(
    load: Callable[[str], Drafter], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_drafter(EagleNetwork(EagleConfig(64, 67, 96, 4, 2, 16, draft_vocab_size=30)), tmp_path)
    with pytest.raises(LaunchError, match=r"features high, low, mid; .* gives last"):
        load(str(tmp_path))
    folder = save_model(tiny_llama(num_layers=8), "deep")
    deep = TorchTarget.load(folder, "fp32", num_slots=4, capacity=CAPACITY)
    want = [result.token_ids for result in run(deep, None, "greedy")]
    results = run(deep, load_drafter(deep, folder, str(tmp_path), on_cpu(), ROOM), "greedy")
    assert [result.token_ids for result in results] == want
    assert sum(result.finished.stats.drafted for result in results) > 0


def test_a_folder_that_is_neither_says_so(load: Callable[[str], Drafter | None], tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match=r"config\.json does not exist"):
        load(str(tmp_path))
