"""``eval drafter`` on a tiny random target: figures of a drafter that knows everything and one that knows nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from doubles import OracleDrafter, tiny_llama
from drafters.dovetail import DovetailDrafter
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.proposal import Budget
from server.bench.contestants import Case, EngineContestant
from server.bench.draft_cost import draft_step_ms
from server.bench.drafter_plot import plot_evaluation
from server.bench.evaluate_drafter import DrafterEvalOptions, evaluate_drafters, grid_name, parse_grid
from server.bench.prompts import Prompt
from server.bench.texts import BenchError
from server.commands.evaluate_drafter import show
from server.engine.engine import Engine, EngineOptions
from server.engine.request import SamplingParams
from server.targets.torch_target import TorchTarget

MAX_TOKENS = 20
PROMPTS = [Prompt("a", text="hello"), Prompt("b", text="there"), Prompt("long", text="x" * 200)]
GRID = (Budget(6, 2, 3), Budget(3, 1, 1))


class LetterCodec:
    """One token a letter."""

    stop_ids = frozenset({66})

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 60 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(65 + token_id) for token_id in token_ids)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TorchTarget:
    folder = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(folder)
    return TorchTarget.load(folder, "fp32", num_slots=1, capacity=160)


def evaluate(target: TorchTarget, drafters: dict[str, Any], **options: Any) -> dict[str, Any]:
    wanted = DrafterEvalOptions("mine", **({"grid": GRID, "max_tokens": MAX_TOKENS, "repeats": 1} | options))
    return evaluate_drafters(target, drafters, 128, LetterCodec(), PROMPTS, wanted, lambda *_: None)  # type: ignore[arg-type]


def texts_of(target: TorchTarget) -> list[list[int]]:
    plain = EngineContestant("plain", Engine(target, None, EngineOptions(1, 128)))
    prompts = [tuple(LetterCodec().encode(prompt.text or "")) for prompt in PROMPTS[:2]]
    return [[*ids, *plain.run(Case("case", ids, MAX_TOKENS)).token_ids] for ids in prompts]


@pytest.fixture(scope="module")
def report(target: TorchTarget) -> dict[str, Any]:
    texts = texts_of(target)
    network = DovetailNetwork(DovetailConfig(64, 67, 32, 2, 1, 32))
    trained = DovetailDrafter(network, target.embedding(), target.lm_head(), 1, 160)
    drafters = {"knows": OracleDrafter(texts, 67), "wrong": OracleDrafter(texts, 67, wrong=True), "random": trained}
    return evaluate(target, drafters)


def settings_of(report: dict[str, Any], label: str) -> list[dict[str, Any]]:
    (entry,) = [entry for entry in report["drafters"] if entry["drafter"] == label]
    settings: list[dict[str, Any]] = entry["settings"]
    return settings


def test_report_has_the_promised_keys(report: dict[str, Any]) -> None:
    assert {"hardware", "target", "conditions", "plain", "ngram", "repeated_4gram_share", "drafters"} == set(report)
    for figures in [*settings_of(report, "random"), report["ngram"]]:
        assert {
            "top_k", "depth", "rows", "acceptance_length", "tokens_per_s", "speedup", "equal_texts", "texts",
            "rows_per_round", "draft_ms_per_round", "verify_ms_per_round", "draft_ms_per_step",
            "acceptance_per_depth", "calibration",
        } <= set(figures)  # fmt: skip
        assert figures["equal_texts"] == figures["texts"] == 2
    conditions = json.loads(json.dumps(report))["conditions"]
    assert (conditions["texts"], conditions["texts_too_long"], conditions["trees"]) == (2, 1, "fixed")


def test_a_drafter_that_knows_is_accepted_at_every_depth(report: dict[str, Any]) -> None:
    deep, shallow = settings_of(report, "knows")
    assert [row["share"] for row in deep["acceptance_per_depth"]] == [1.0] * 4  # depth 3: four tokens below the root
    assert [row["share"] for row in shallow["acceptance_per_depth"]] == [1.0] * 2
    assert deep["acceptance_length"] > shallow["acceptance_length"] > 2
    assert deep["calibration"]["ece"] == pytest.approx(0.03, abs=0.02)  # says 0.99 and 0.05; accepted: 1 and 0


def test_a_drafter_that_is_wrong_is_overconfident(report: dict[str, Any]) -> None:
    for figures in settings_of(report, "wrong"):
        assert figures["acceptance_length"] == 1.0
        (first,) = figures["acceptance_per_depth"]
        assert (first["depth"], first["accepted"], first["share"]) == (1, 0, 0.0)
        assert figures["calibration"]["ece"] > 0.4


def test_lookup_has_no_probabilities_to_calibrate(report: dict[str, Any]) -> None:
    assert report["ngram"]["calibration"] is None
    assert (report["ngram"]["top_k"], report["ngram"]["depth"], report["ngram"]["rows"]) == (2, 3, 6)


def test_sampled_texts_are_the_same_for_every_drafter(target: TorchTarget) -> None:
    network = DovetailNetwork(DovetailConfig(64, 67, 32, 2, 1, 32))
    drafter = DovetailDrafter(network, target.embedding(), target.lm_head(), 1, 160)
    sampled = evaluate(target, {"random": drafter}, sampling=SamplingParams(temperature=1.0, seed=3))
    for figures in settings_of(sampled, "random"):
        assert figures["equal_texts"] == figures["texts"] == 2
    assert (sampled["conditions"]["temperature"], sampled["conditions"]["seed"]) == (1.0, 3)


def test_draft_step_leaves_the_slot_empty_and_asks_for_whole_trees(target: TorchTarget) -> None:
    asked: list[Budget] = []

    class Asked(OracleDrafter):
        def propose(self, states: Any, budget: Budget) -> Any:
            asked.append(budget)
            return super().propose(states, budget)

    assert draft_step_ms(target, Asked([], 67), Budget(3, 2, 3), repeats=2) is not None
    assert asked[:2] == [Budget(15, 2, 0), Budget(15, 2, 3)]
    assert target.slots.lengths[0] == 0
    assert draft_step_ms(target, Asked([], 67), Budget(3, 2, 0)) is None


def test_grid_reads_what_it_writes() -> None:
    assert parse_grid("4x5x16, 1x4x5") == (Budget(16, 4, 5), Budget(5, 1, 4))
    assert [grid_name(budget) for budget in parse_grid("4x5x16,1x0x2")] == ["4x5x16", "1x0x2"]


@pytest.mark.parametrize("text", ["", "4x5", "4x5x16x2", "ax5x16", "4x5x16,", "0x5x16", "-1x5x16"])
def test_grids_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BenchError, match="top-k"):
        parse_grid(text)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"grid": ()}, "the grid needs at least one tree size"),
        ({"grid": (Budget(), Budget())}, "none of them twice"),
        ({"grid": (Budget(1),)}, "a tree of 1 row"),
        ({"repeats": 0}, "repeats 0"),
        ({"max_tokens": 1}, "max tokens 1"),
        ({"sampling": SamplingParams(temperature=1.0)}, "only with a seed"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        DrafterEvalOptions("mine", **wrong)


def test_no_prompt_fits(target: TorchTarget) -> None:
    options = DrafterEvalOptions("mine", GRID, MAX_TOKENS, 1)
    with pytest.raises(BenchError, match="none of the 1 prompts"):
        evaluate_drafters(
            target, {"x": OracleDrafter([], 67)}, 30, LetterCodec(), PROMPTS[2:], options, lambda *_: None  # type: ignore[arg-type]
        )  # fmt: skip


def test_tables_and_plot_name_every_drafter(report: dict[str, Any], tmp_path: Path) -> None:
    console = Console(record=True, width=140, markup=False)
    show(report, console)
    text = console.export_text()
    for word in ("knows", "wrong", "random", "n-gram", "2x3x6", "acceptance length:", report["hardware"]["cpu"]):
        assert word in text
    plot_evaluation(report, tmp_path / "drafter.png")
    assert (tmp_path / "drafter.png").read_bytes()[:4] == b"\x89PNG"
