"""The search for texts that serving changes: it finds none where there is none, one that is planted, and goes on."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from doubles import LetterCodec, OracleDrafter, tiny_llama
from drafters.proposal import Budget
from server import cli, launch
from server.bench.lossless import Report, Search, SearchOptions, search_prompts
from server.bench.near_ties import TIE_ROUNDED, near_tie, row_movement, seeded_gap
from server.bench.prompts import Prompt, load_prompts
from server.bench.texts import BenchError
from server.engine import acceptance
from server.engine.engine import Engine, EngineOptions
from server.engine.request import SamplingParams
from server.settings import Settings
from server.targets.target import Verified, VerifyRows, share_out
from server.targets.torch_target import TorchTarget

OPTIONS = SearchOptions(("mine",), limit=6, max_tokens=12, streams=(1, 2))
PROMPTS = [Prompt(f"p{i}", text="hello"[i % 5 :]) for i in range(4)]
PROMPTS += [Prompt("chat", turns=("good", "bye")), Prompt("long", text="x" * 99)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TorchTarget:
    folder = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(folder)
    return TorchTarget.load(folder, "fp32", num_slots=2, capacity=100)


def engine_on(target: Any) -> Engine:
    options = EngineOptions(2, 80, Budget(6, 2, 2), prefill_chunk=4, lookup=True, cache_bytes=10**7)
    return Engine(target, OracleDrafter([], 67), options)


def search(
    target: TorchTarget, report: Report, prompts: list[Prompt] = PROMPTS, options: SearchOptions = OPTIONS
) -> dict[str, Any]:
    Search(engine_on(target), LetterCodec(), options, report).run(prompts, lambda *_: None)  # type: ignore[arg-type]
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


@dataclasses.dataclass
class Outputs:
    """What a pass gives, with logits of its own."""

    features: Tensor
    moved: Tensor

    def argmax(self) -> list[int]:
        return self.moved.argmax(dim=1).tolist()

    def logits(self, row_ids: Sequence[int]) -> Tensor:
        return self.moved[list(row_ids)]


class RoundedTarget:
    """Rows that are not alone come out otherwise, no difference of two logits by as much as a near-tie."""

    def __init__(self, target: TorchTarget) -> None:
        self.target = target
        self.info = dataclasses.replace(target.info, weights="Q4_1", exact_rows=False)
        by = 0.49 * TIE_ROUNDED
        self.noise = torch.empty(67).uniform_(-by, by, generator=torch.Generator().manual_seed(0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def verify(self, rows: Sequence[VerifyRows]) -> list[Verified]:
        outputs = self.target.verify(rows)[0].outputs
        logits = outputs.logits(range(sum(part.proposal.num_rows for part in rows)))
        moved = logits + self.noise if len(logits) > 1 else logits
        return share_out(Outputs(outputs.features, moved), rows)


def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first child is taken for the target's own choice where that is none."""
    right = acceptance.child_with
    monkeypatch.setattr(
        acceptance, "child_with", lambda proposal, row, token_id: right(proposal, row, token_id)
        or next(iter(proposal.children[row]), None),
    )  # fmt: skip


def test_where_rows_are_rounded_near_ties_are_counted_apart_from_faults(
    target: TorchTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Settings] = []
    rounded = RoundedTarget(target)
    monkeypatch.setattr(launch, "load_engine", lambda settings: asked.append(settings) or engine_on(rounded))
    monkeypatch.setattr(launch, "load_codec", lambda path: LetterCodec())
    monkeypatch.setattr(launch, "resolve_target", lambda target: tmp_path)
    suite = tmp_path / "mine.jsonl"
    suite.write_text(
        "".join(json.dumps({"prompt": "hello to everyone here"[i:] + " again" * 5}) + "\n" for i in range(4))
    )

    def run(name: str) -> tuple[int, dict[str, Any]]:
        command = ["eval", "lossless", str(tmp_path), "--engine", "llama.cpp", "--suite", str(suite)]
        command += ["--max-tokens", "24", "--streams", "2", "--json", str(tmp_path / name)]
        result = CliRunner().invoke(cli.app, command)
        return result.exit_code, json.loads(result.stdout.splitlines()[-1])

    code, report = run("right.json")
    assert asked[0].engine == "llama.cpp"
    assert (code, report["faults"]) == (0, 0)
    found = report["counter_examples"]
    assert {entry["mode"] for entry in found} == {"greedy", "seeded"}
    for mode, told in report["near_ties"].items():
        gaps = [abs(entry["gap"]) for entry in found if entry["mode"] == mode]
        assert (told["texts"], told["largest_gap"]) == (len(gaps), max(gaps))
        assert max(gaps) < TIE_ROUNDED
    near = report["weights"]["Q4_1"]["near_tie"]
    assert near["below"] == TIE_ROUNDED > near["movement"]["largest"] > near["movement"]["median"] > 0

    careless(monkeypatch)
    code, report = run("wrong.json")
    assert code == 1
    assert report["faults"] > 0
    assert any(entry["mode"] == "greedy" and entry["gap"] > 2 * TIE_ROUNDED for entry in report["counter_examples"])


def test_rows_that_are_the_same_in_any_company_do_not_move(target: TorchTarget) -> None:
    text = [(7 * i) % 67 for i in range(31)]
    assert max(row_movement(target, text, 8)) < 1e-4 == near_tie(target.info)
    assert near_tie(dataclasses.replace(target.info, exact_rows=True)) == 0.0


def test_a_seeded_choice_is_near_a_token_whose_share_is_near_the_number() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    params = SamplingParams(temperature=1.0, seed=0)
    assert seeded_gap(logits, params, 0.4, 0, 1.0) == 0
    gap = seeded_gap(logits, params, 0.4, 1, 0.1)
    assert gap == pytest.approx(math.log(0.5 / 0.5) - math.log(0.4 / 0.6))
    # Logits moved by half of that, up and down, put the edge where the number is.
    moved = torch.softmax(logits + torch.tensor([-gap / 2, gap / 2, gap / 2]), dim=0)
    assert float(moved[0]) == pytest.approx(0.4)
    trimmed = SamplingParams(temperature=0.5, top_p=0.7, seed=0)  # shares 0.66, 0.24, 0.11: the last one is dropped
    assert seeded_gap(logits, trimmed, 0.99, 2, 0.01) is None
    assert seeded_gap(logits, trimmed, 0.99, 2, 2.0) == 0


def test_a_planted_fault_is_found_with_its_place_and_gap(
    target: TorchTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    careless(monkeypatch)
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
