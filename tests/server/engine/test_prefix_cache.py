"""No prompt is read twice, and a hit changes no bit: pages by themselves, and behind the engine."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from doubles import OracleDrafter, tiny_llama
from drafters.proposal import Budget
from kernels import native
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.pages import PageTree
from server.engine.prefix_cache import rows_of
from server.engine.request import Request, SamplingParams
from server.targets.native_target import NativeTarget
from server.targets.target import PrefillChunk, Prefilled
from server.targets.torch_target import TorchTarget

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=1.0, seed=5)
SYSTEM = [(7 * i) % 67 for i in range(100)]


def test_pages_are_found_shared_and_dropped_by_age() -> None:
    tree = PageTree(2, limit_bytes=4)
    read: list[int] = []

    def content(start: int) -> tuple[int, int]:
        read.append(start)
        return start, 1

    tree.add([1, 2, 3, 4, 5], content)
    assert [page.content for page in tree.find([1, 2, 3, 4, 9])] == [0, 2]
    assert tree.find([1]) == tree.find([2, 2]) == tree.find([1, 2, 3, 4], "another client") == []
    tree.add([1, 2, 3, 4, 6, 7], content)  # what is there is not read again
    assert read == [0, 2, 4]
    tree.find([1, 2, 3, 4, 6, 7])
    tree.add([8, 8, 9, 9], content)
    assert len(tree.find([8, 8, 9, 9])) == 2
    assert len(tree.find([1, 2, 3, 4, 6, 7])) == 2  # its end went first, its beginning stays
    tree.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_pages_hold_their_limit_whatever_comes(seed: int) -> None:
    chooser, tree = random.Random(seed), PageTree(3, limit_bytes=40)
    for _ in range(2000):
        text = [chooser.randrange(2) for _ in range(chooser.randrange(15))]
        salt = chooser.choice(["", "a"])
        found = tree.find(text, salt)
        assert [page.content for page in found] == [tuple(text[: 3 * i + 3]) for i in range(len(found))]
        tree.add(text, lambda start, text=text: (tuple(text[: start + 3]), chooser.randrange(1, 50)), salt)  # type: ignore[misc]
        tree.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_a_pages_features_are_found_in_pieces_of_any_size(seed: int) -> None:
    chooser = random.Random(seed)
    pieces = [torch.rand(chooser.choice([1, 1, 2, 3, 16, 40]), 3) for _ in range(30)]
    whole = torch.cat(pieces)
    for _ in range(50):
        start = chooser.randrange(len(whole))
        stop = chooser.randrange(start, len(whole)) + 1
        found = rows_of(pieces, len(whole), start, stop)
        assert torch.equal(found, whole[start:stop])
        assert found.data_ptr() not in [piece.data_ptr() for piece in pieces], "a copy"


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def target(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> TorchTarget:
    folder = save_model(tiny_llama(), f"cache-{request.param}")
    if request.param == "fp32":
        return TorchTarget.load(folder, "fp32", 3, 250)
    if native.library() is None:
        pytest.skip("the native kernels are not built")
    return NativeTarget.load(folder, "bf16", 3, 250)


def texts(engine: Engine, requests: list[Request]) -> list[tuple[int, ...]]:
    results = generate(engine, requests)
    engine.check_integrity()
    return [tuple(results[request.request_id].token_ids) for request in requests]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_hit_changes_no_bit_of_the_text(
    target: TorchTarget, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[*SYSTEM, i, 3, i] for i in range(4)]
    plain = Engine(target, None, EngineOptions(1, 220, prefill_chunk=32))
    first = [Request(f"a{i}", p, 20, sampling) for i, p in enumerate(prompts)]
    want = texts(plain, first)
    turns = [Request(f"b{i}", [*p, *t, 1, 2], 20, sampling) for i, (p, t) in enumerate(zip(prompts, want, strict=True))]
    want_turns = texts(plain, turns)
    chunks: list[int] = []
    prefill = target.prefill

    def counted(chunk: PrefillChunk) -> Prefilled:
        chunks.append(len(chunk.token_ids))
        return prefill(chunk)

    monkeypatch.setattr(target, "prefill", counted)
    known = [[*r.prompt_ids, *t] for r, t in zip([*first, *turns], [*want, *want_turns], strict=True)]
    options = EngineOptions(3, 220, Budget(8, 2, 2), prefill_chunk=32, lookup=True, cache_bytes=10**8)
    engine = Engine(target, OracleDrafter(known, 67), options)
    assert texts(engine, first) == want
    # Whole pages are known: of the prompt that all share, then of each one's own text but its last token.
    size = 16 if target.info.exact_rows else 32
    assert sum(chunks) == len(prompts[0]) + 3 * (len(prompts[0]) - len(SYSTEM) // size * size)
    chunks.clear()
    assert texts(engine, turns) == want_turns
    own = [len(r.prompt_ids) - 3 if target.info.exact_rows else len(prompts[0]) for r in turns]
    assert sum(chunks) == sum(len(r.prompt_ids) - n // size * size for r, n in zip(turns, own, strict=True))
    salted = [Request("salted", prompts[0], 20, sampling, cache_salt="mine")]
    chunks.clear()
    assert texts(engine, salted) == want[:1]
    assert sum(chunks) == len(prompts[0])


def test_choices_of_one_prompt_cost_one_prefill_and_say_so(target: TorchTarget) -> None:
    engine = Engine(target, None, EngineOptions(3, 220, prefill_chunk=32, cache_bytes=10**8))
    requests = [Request(f"r{i}", SYSTEM, 5, SAMPLED, choice=i) for i in range(4)]
    results = generate(engine, requests)
    assert [results[r.request_id].finished.stats.cached for r in requests] == [0, 96, 96, 96]


def test_slots_are_never_read_where_nothing_was_written(target: TorchTarget) -> None:
    want = texts(Engine(target, None, EngineOptions(1, 220)), [Request("a", SYSTEM, 10, GREEDY)])
    for store in target.slots.stores:
        store.fill_(float("nan") if store.is_floating_point() else 127)
    assert texts(Engine(target, None, EngineOptions(1, 220)), [Request("a", SYSTEM, 10, GREEDY)]) == want
    assert not torch.is_inference_mode_enabled()
