"""The whole benchmark on a tiny random target: what it reports, and that it reports nothing else as Dovetail's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doubles import LetterCodec, OracleDrafter, tiny_llama
from server.bench.prompts import Prompt
from server.bench.report import BenchError, BenchOptions, measure, predicted_json
from server.bench.simulated import chain_length
from server.commands.bench import check_lossless, show
from server.engine.engine import Engine, EngineOptions
from server.engine.request import SamplingParams
from server.placement.cost import MeasuredCosts
from server.targets.torch_target import TorchTarget

PROMPTS = [Prompt("text", text="hello"), Prompt("chat", turns=("hi", "more")), Prompt("long", text="x" * 130)]


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    return save_model(tiny_llama(), "bench")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    target = TorchTarget.load(folder, "fp32", num_slots=1, capacity=160)
    return Engine(target, OracleDrafter([], 67), EngineOptions(max_seqs=1, context_length=128))


def run(engine: Engine, folder: Path, **options: Any) -> dict[str, Any]:
    settings = BenchOptions("mine", max_tokens=12, repeats=2, **options)
    return measure(engine, folder, LetterCodec(), PROMPTS, settings, lambda *_: None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report(engine: Engine, folder: Path) -> dict[str, Any]:
    return run(engine, folder, peers=["transformers"], simulate_acceptance=3.0)


def test_report_has_the_promised_keys(report: dict[str, Any]) -> None:
    assert {"hardware", "target", "drafter", "plain", "dovetail", "speedup", "verify_ms", "peers"} <= set(report)
    assert {"repeated_4gram_share", "ngram_acceptance_length"} <= set(report)
    shares = {"draft_share", "verify_share", "other_share"}
    assert {"tokens_per_s", "acceptance_length"} | shares <= set(report["dovetail"])
    assert sum(report["dovetail"][share] for share in shares) == pytest.approx(1, abs=0.01)
    assert {"1", "8", "16"} <= set(report["verify_ms"])
    assert report["predicted"] is None, "its layers are not the native ones"
    assert json.loads(json.dumps(report))["conditions"]["texts"] == 3


def test_a_prediction_is_made_of_the_rounds_as_they_were(engine: Engine) -> None:
    drafted = Engine(engine.target, None, engine.options)
    drafted.clock.rounds, drafted.clock.draft_s, drafted.clock.other_s = 4, 0.006, 0.002
    drafted.counts.rounds_of.update({1: 3, 8: 1})
    layers = engine.target.info.num_layers
    costs = [MeasuredCosts({1: layer_ms, 8: 2 * layer_ms}, {1: 3.0, 8: 5.0}, 0.2, 0.1) for layer_ms in (1.0, 1.5)]
    found = predicted_json(costs, drafted, 2.0)
    assert found is not None and found["verify_ms"] == {"1": 3.2 + layers, "8": 5.2 + 2 * layers}
    assert found["plain_tokens_per_s"] == pytest.approx(1e3 / (3.3 + 1.5 * layers), abs=1e-3)
    rounds_ms = 3 * (3.2 + 1.5 * layers) + 5.2 + 3 * layers + 8
    assert found["tokens_per_s"] == pytest.approx(1e3 * 8 / rounds_ms, abs=1e-3)


def test_every_contestant_gave_the_targets_text(report: dict[str, Any]) -> None:
    for figures in (report["plain"], report["dovetail"], report["peers"]["transformers"]):
        assert figures["equal_texts"] == figures["texts"] == 6  # three texts, two repeats
    assert report["conditions"]["texts_too_long"] == 1


def test_simulated_acceptance_is_felt(report: dict[str, Any], engine: Engine, folder: Path) -> None:
    def measured(length: float) -> float:
        found: float = run(engine, folder, peers=[], simulate_acceptance=length)["dovetail"]["acceptance_length"]
        return found

    longest = chain_length(engine.options.budget) + 1
    assert measured(1) == 1 < report["dovetail"]["acceptance_length"] < measured(longest)
    assert report["speedup"] == pytest.approx(
        report["dovetail"]["tokens_per_s"] / report["plain"]["tokens_per_s"], rel=0.01
    )


def test_lookup_takes_part_and_sampled_chats_are_the_same_texts_for_everyone_here(engine: Engine, folder: Path) -> None:
    sampling = SamplingParams(temperature=0.7, seed=3)
    found = run(engine, folder, peers=["lookup", "transformers"], sampling=sampling, chat=True)
    for name in ("plain", "lookup", "dovetail"):
        assert found[name]["equal_texts"] == found[name]["texts"] == 6
    assert found["lookup"]["acceptance_length"] >= 1.0
    assert found["peers"]["transformers"]["equal_texts"] is None  # its sampling draws other numbers
    conditions = found["conditions"]
    assert (conditions["chat"], conditions["temperature"], conditions["seed"]) == (True, 0.7, 3)
    with pytest.raises(BenchError, match="only with a seed"):
        BenchOptions("mine", sampling=SamplingParams(temperature=0.7))


def test_missing_peer_is_reported_with_its_reason(engine: Engine, folder: Path) -> None:
    skipped = run(engine, folder, peers=["llama.cpp"])["peers"]["llama.cpp"]["skipped"]
    assert "tokenizer.json" in skipped or "not installed" in skipped


def test_no_drafter_nothing_to_compare(engine: Engine, folder: Path) -> None:
    with pytest.raises(BenchError, match="--drafter"):
        run(Engine(engine.target, None, engine.options), folder, peers=[])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"peers": ["vllm"]}, "unknown peer vllm"), ({"repeats": 0}, "repeats 0"), ({"max_tokens": 1}, "max tokens 1")],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        BenchOptions("mine", **wrong)


@pytest.fixture
def shown(report: dict[str, Any]) -> Iterator[str]:
    from rich.console import Console

    console = Console(record=True, width=120, markup=False)
    show(report, console)
    yield console.export_text()


def test_table_names_everyone_and_the_conditions(shown: str, report: dict[str, Any]) -> None:
    for word in ("plain", "dovetail", "transformers", "acceptance length", "n-gram", report["hardware"]["cpu"]):
        assert word in shown


def test_a_changed_text_fails_the_run(report: dict[str, Any]) -> None:
    check_lossless(report)
    changed = report | {"dovetail": report["dovetail"] | {"equal_texts": 5}}
    from typer import Exit

    with pytest.raises(Exit):
        check_lossless(changed)
