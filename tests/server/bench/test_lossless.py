"""The search for texts that serving changes: it finds none where there is none, one that is planted, and goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from doubles import LetterCodec, OracleDrafter, tiny_llama
from drafters.proposal import Budget
from server.bench.lossless import Report, Search, SearchOptions, search_prompts
from server.bench.prompts import Prompt, load_prompts
from server.bench.texts import BenchError
from server.engine import acceptance
from server.engine.engine import Engine, EngineOptions
from server.targets.torch_target import TorchTarget

OPTIONS = SearchOptions(("mine",), limit=6, max_tokens=12, streams=(1, 2))
PROMPTS = [Prompt(f"p{i}", text="hello"[i % 5 :]) for i in range(4)]
PROMPTS += [Prompt("chat", turns=("good", "bye")), Prompt("long", text="x" * 99)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TorchTarget:
    folder = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(folder)
    return TorchTarget.load(folder, "fp32", num_slots=2, capacity=100)


def search(
    target: TorchTarget, report: Report, prompts: list[Prompt] = PROMPTS, options: SearchOptions = OPTIONS
) -> dict[str, Any]:
    served = EngineOptions(2, 80, Budget(6, 2, 2), prefill_chunk=4, lookup=True, cache_bytes=10**7)
    engine = Engine(target, OracleDrafter([], 67), served)
    Search(engine, LetterCodec(), options, report).run(prompts, lambda *_: None)  # type: ignore[arg-type]
    return report.content


def test_a_search_goes_on_where_it_ended_and_finds_nothing_in_a_right_engine(
    target: TorchTarget, tmp_path: Path
) -> None:
    whole = search(target, Report(tmp_path / "whole.json", "t", "d", OPTIONS))
    file = tmp_path / "parts.json"
    search(target, Report(file, "t", "d", OPTIONS), PROMPTS[:4])
    assert json.loads(file.read_text())["weights"]["fp32"]["prompts"] == 4
    parts = search(target, Report(file, "t", "d", OPTIONS))
    assert parts["counter_examples"] == whole["counter_examples"] == []
    for content in (whole, parts):
        counts = content["weights"]["fp32"]
        assert (counts["prompts"], counts["too_long"]) == (6, 2)  # a long prompt, greedy and with a seed
        assert {name: texts["texts"] for name, texts in counts["texts"].items()} == dict.fromkeys(
            ("greedy, 1", "greedy, 2", "seeded, 1", "seeded, 2"), 6
        )
        assert counts["texts"]["greedy, 2"]["drafted"] > 0 < counts["texts"]["seeded, 1"]["cached"]
    assert json.loads(file.read_text()) == parts
    with pytest.raises(BenchError, match="another search"):
        Report(file, "another target", "d", OPTIONS)
    file.write_text("[1")
    with pytest.raises(BenchError, match="cannot be read"):
        Report(file, "t", "d", OPTIONS)


def test_a_planted_fault_is_found_with_its_place_and_gap(
    target: TorchTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first child is taken for the target's own choice, now and then."""
    right = acceptance.child_with

    def careless(proposal: Any, row: int, token_id: int) -> int | None:
        return right(proposal, row, token_id) or next(iter(proposal.children[row]), None)

    monkeypatch.setattr(acceptance, "child_with", careless)
    found = search(target, Report(tmp_path / "r.json", "t", "d", OPTIONS), PROMPTS[:1])["counter_examples"]
    assert {entry["mode"] for entry in found} == {"greedy", "seeded"}
    greedy = next(entry for entry in found if entry["mode"] == "greedy")
    assert greedy["position"] > 0 < greedy["gap"]
    assert greedy["plain"][0] != greedy["served"][0]
    assert not greedy["tie"]


def test_prompts_come_from_all_suites_in_turn() -> None:
    names = [prompt.name for prompt in search_prompts(SearchOptions(limit=500))]
    firsts = [load_prompts(suite, 1)[0].name for suite in ("humaneval", "mt-bench", "gsm8k")]
    assert names[:3] == firsts
    assert len(set(names)) == 500
    with pytest.raises(BenchError, match="one stream at least"):
        SearchOptions(streams=())
    with pytest.raises(BenchError, match="greedy or seeded, not fast"):
        SearchOptions(modes=("fast",))


def test_a_search_of_greedy_texts_alone_writes_no_others(target: TorchTarget, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, modes=("greedy",))
    found = search(target, Report(tmp_path / "r.json", "t", "d", options), PROMPTS[:1], options)
    assert list(found["weights"].popitem()[1]["texts"]) == ["greedy, 1", "greedy, 2"]
