"""llama.cpp as the verifier: the same text as alone, whatever is drafted, and nothing left behind."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from doubles import OracleDrafter
from drafters.proposal import Budget, Proposal
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.targets.llama_cpp.sequences import SequenceIds, leaves_below
from server.targets.target import PrefillChunk, TargetError, VerifyRows

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra gguf)")

from server.targets.llama_cpp.target import LlamaCppTarget

IDS = [5, 9, 40, 77, 3, 99, 60, 61, 62, 12]
PROMPTS = ([5, 9, 40], [77], [30, 31, 32, 30, 31, 32, 30], [5, 9, 40, 66, 7])
NOTHING = Proposal((), (), ())
TREE = Proposal((7, 8, 9, 10, 11), (None, 0, None, 2, 2), (0.0,) * 5)
PATHS = {(0, 1, 2): (7, 8), (0, 3, 4): (9, 10), (0, 3, 5): (9, 11)}
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def file(tiny_gguf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("llama_cpp") / "tiny.gguf", GGMLQuantizationType.F32)


@pytest.fixture(scope="module")
def loaded(file: Path) -> LlamaCppTarget:
    return LlamaCppTarget.load(file, 4, 160, 1)


@pytest.fixture
def target(loaded: LlamaCppTarget) -> Iterator[LlamaCppTarget]:
    """Whatever a test did, released slots hold nothing."""
    yield loaded
    for slot in range(4):
        loaded.release(slot)
    loaded.check_integrity()


def plain_row(target: LlamaCppTarget, slot: int, token_id: int) -> torch.Tensor:
    (verified,) = target.verify([VerifyRows(slot, token_id, NOTHING)])
    target.keep(slot, [0])
    return verified.logits(0)


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """The library adds up in the order in which cells lie; a row that sees a wrong one is off by about 1."""
    return bool((got - want).abs().max() < 1e-2)


def test_leaves_are_sequences() -> None:
    assert leaves_below(TREE.row_parents) == [[0, 1, 2], [0], [0], [1, 2], [1], [2]]
    ids = SequenceIds(2, 5)
    assert ids.lend(2) == [2, 3]
    with pytest.raises(ValueError, match="1 sequence ids left"):
        ids.lend(2)
    ids.take_back([3])
    assert ids.lend(1) == [3]


def test_logits_and_features_are_the_models(target: LlamaCppTarget, tiny_gguf: Any) -> None:
    model = tiny_gguf.model(GGMLQuantizationType.F32)
    with torch.inference_mode():
        hidden = model.model(torch.tensor([IDS])).last_hidden_state[0]
        logits = model.lm_head(hidden[-1])
    got = target.prefill(PrefillChunk(0, IDS))
    torch.testing.assert_close(got.features, hidden, atol=1e-2, rtol=1e-2)  # keys and values in fp16
    torch.testing.assert_close(got.logits, logits, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(target.lm_head(), model.lm_head.weight)


def test_rows_of_a_tree_see_their_ancestors_alone(target: LlamaCppTarget) -> None:
    for slot in (0, 1, 2):
        target.prefill(PrefillChunk(slot, IDS))
    tree, other = target.verify([VerifyRows(0, 6, TREE), VerifyRows(2, 20, TREE)])
    for rows, path in PATHS.items():
        target.release(3)
        target.prefill(PrefillChunk(3, IDS))
        for row, token_id in zip(rows, (6, *path), strict=True):
            assert near(tree.logits(row), plain_row(target, 3, token_id))
    assert not near(other.logits(0), tree.logits(0))


@pytest.mark.parametrize("rows", PATHS)
def test_a_kept_path_is_what_plain_decoding_leaves(rows: tuple[int, ...], target: LlamaCppTarget) -> None:
    for slot in (0, 1):
        target.prefill(PrefillChunk(slot, IDS))
    target.verify([VerifyRows(0, 6, TREE)])
    target.keep(0, rows)
    for token_id in (6, *PATHS[rows]):
        plain_row(target, 1, token_id)
    assert near(plain_row(target, 0, 33), plain_row(target, 1, 33))
    assert target.lengths[:2] == [14, 14]


def test_rows_read_are_written_elsewhere(target: LlamaCppTarget) -> None:
    target.prefill(PrefillChunk(0, IDS))
    pages = [target.read_rows(0, 0, 4), target.read_rows(0, 4, 10)]
    for page in pages:
        target.write_rows(1, page)
    assert near(plain_row(target, 0, 33), plain_row(target, 1, 33))
    with pytest.raises(TargetError, match="cannot follow the 0 rows of slot 2"):
        target.write_rows(2, pages[1])


def test_what_cannot_run_leaves_nothing(target: LlamaCppTarget) -> None:
    target.prefill(PrefillChunk(0, IDS))
    with pytest.raises(TargetError, match="invalid token"):
        target.prefill(PrefillChunk(1, [3, 10**6]))
    with pytest.raises(TargetError, match="invalid token"):
        target.verify([VerifyRows(0, 10**6, TREE)])
    bush = Proposal((7,) * 300, (None,) * 300, (0.0,) * 300)
    with pytest.raises(TargetError, match=r"299 more branches.*--rows"):
        target.verify([VerifyRows(0, 6, bush)])
    with pytest.raises(TargetError, match="no rows"):
        target.keep(0, [0])
    assert target.lengths == [10, 0, 0, 0]
    assert len(target.ids.free) == 256 - 4
    target.prefill(PrefillChunk(1, IDS))
    assert near(plain_row(target, 0, 33), plain_row(target, 1, 33))


def run(target: LlamaCppTarget, drafter: OracleDrafter | None, cache_bytes: int = 0) -> list[list[int]]:
    options = EngineOptions(4, 120, Budget(12, 3, 3), prefill_chunk=3, cache_bytes=cache_bytes)
    engine = Engine(target, drafter, options)
    results = generate(engine, [Request(f"r{i}", p, 16, GREEDY) for i, p in enumerate(PROMPTS)])
    engine.check_integrity()
    target.check_integrity()
    return [list(results[f"r{i}"].token_ids) for i in range(len(PROMPTS))]


def test_the_text_does_not_depend_on_drafts(target: LlamaCppTarget) -> None:
    plain = run(target, None)
    texts = [[*prompt, *text] for prompt, text in zip(PROMPTS, plain, strict=True)]
    oracle = OracleDrafter(texts, target.info.vocab_size)
    assert run(target, oracle) == plain
    assert run(target, OracleDrafter(texts, target.info.vocab_size, wrong=True)) == plain
    assert run(target, oracle, cache_bytes=1 << 24) == plain


def test_many_requests_with_cancels_leave_no_cell_behind(target: LlamaCppTarget) -> None:
    generator = random.Random(0)
    oracle = OracleDrafter([[*p, *range(20, 40)] for p in PROMPTS], target.info.vocab_size)
    options = EngineOptions(4, 120, Budget(12, 3, 3), prefill_chunk=4, lookup=True, cache_bytes=1 << 20)
    engine = Engine(target, oracle, options)
    waiting = [f"r{i}" for i in range(200)]
    running: list[str] = []
    finished = 0
    while waiting or engine.scheduler.has_work:
        for _ in range(min(generator.randint(0, 3), len(waiting))):
            name = waiting.pop()
            sampling = SamplingParams(temperature=generator.choice([0, 1]), seed=1)
            engine.submit(Request(name, generator.choice(PROMPTS), generator.randint(1, 12), sampling))
            running.append(name)
        if running and generator.random() < 0.3:
            engine.cancel(running.pop(generator.randrange(len(running))))
        finished += sum(not hasattr(event, "token_ids") for event in engine.step())
    engine.check_integrity()
    target.check_integrity()
    assert 50 < finished < 200


def test_files_that_would_end_the_process_are_refused(tiny_gguf: Any, tmp_path: Path) -> None:
    cases = {
        "heads.gguf": ({"architecture": "gemma", "heads": 0}, "cannot be run by llama.cpp"),
        "lost.gguf": ({"architecture": "nonsense"}, "unknown model architecture: 'nonsense'"),
        "causal.gguf": ({"extra": lambda writer: writer.add_causal_attention(False)}, "is an embedding model"),
    }
    for name, (settings, words) in cases.items():
        file = tiny_gguf.write(tmp_path / name, GGMLQuantizationType.F32, **settings)
        with pytest.raises(TargetError, match=words) as caught:
            LlamaCppTarget.load(file, 1, 64, 1)
        assert name in str(caught.value)
