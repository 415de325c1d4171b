"""The study of answers held to schemas: its schemas, what it counts, and that it finds a fault that is planted."""

import json
from typing import Any

import jsonschema
import pytest

from doubles import OracleDrafter, tiny_llama
from drafters.proposal import Budget
from server.bench.schemas import NUM_LEVELS, SchemaCase, schema_cases
from server.bench.structured import DRAFTED, PLAIN, SAMPLED, Study, StudyOptions, StudyReport
from server.bench.texts import BenchError
from server.engine.engine import Engine, EngineOptions
from server.engine.grammar import GrammarCompiler
from server.targets.torch_target import TorchTarget

SMALL = [{"type": "boolean"}, {"enum": ["a", "b"]}, {"type": "integer", "minimum": 3, "maximum": 90}]
CASES = [SchemaCase(f"small-{number}", 1, schema, "one") for number, schema in enumerate(SMALL)]
CASES.append(SchemaCase("endless", 2, {"type": "string", "minLength": 90}, "two"))


@pytest.fixture(scope="module")
def target(save_model):
    return TorchTarget.load(save_model(tiny_llama(320), "structured"), "fp32", num_slots=2, capacity=300)


def study(target, codec, file) -> dict[str, Any]:
    engine = Engine(target, OracleDrafter([], 320, wrong=True), EngineOptions(2, 250, Budget(6, 2, 2), lookup=True))
    report = StudyReport(file, "t", "d", options := StudyOptions(len(CASES), max_tokens=60, streams=2))
    Study(engine, codec, options, report).run(CASES, lambda *_: None)
    return report.finish({"cpu": "none"})


def test_schemas_grow_more_difficult_and_are_the_same_for_a_seed(codec):
    cases, more = schema_cases(60), schema_cases(90)
    assert cases == more[:60]
    assert schema_cases(6, seed=1) != cases[:6]
    assert {case.level for case in cases} == set(range(1, NUM_LEVELS + 1))
    compiler = GrammarCompiler(codec.tokenizer, codec.stop_ids)
    sizes = dict.fromkeys(range(1, NUM_LEVELS + 1), 0)
    for case in cases:
        jsonschema.Draft202012Validator.check_schema(case.schema)
        assert compiler.compile("json_schema", case.schema).allowed([]).any()
        assert json.dumps(case.schema) in case.request
        sizes[case.level] += len(json.dumps(case.schema))
    assert sizes[1] < sizes[3] < sizes[5]
    words = json.dumps([case.schema for case in more])
    for word in (
        "anyOf",
        "$ref",
        "prefixItems",
        "enum",
        "const",
        "pattern",
        "date-time",
        "exclusiveMaximum",
        "multipleOf",
    ):
        assert f'"{word}"' in words or f'"format": "{word}"' in words


def test_a_study_counts_what_finishes_and_goes_on_where_it_ended(target, codec, tmp_path):
    found = study(target, codec, tmp_path / "r.json")
    assert (found["invalid"], found["differences"], found["schemas"]) == ([], [], len(CASES))
    assert [entry[:3] for entry in found["unfinished"]] == [
        ["endless", mode, "length"] for mode in (PLAIN, DRAFTED, SAMPLED)
    ]
    for mode in (PLAIN, DRAFTED, SAMPLED):
        counts = found["answers"][mode]
        assert (counts["texts"], counts["finished"], counts["valid"], counts["finished_share"]) == (4, 3, 3, 0.75)
    assert all(counts["tokens_per_s"] > 0 for counts in found["answers"].values())
    assert found["answers"][PLAIN]["drafted"] == 0 < found["answers"][DRAFTED]["accepted"]
    assert found["levels"]["1"]["texts"] == 6
    assert study(target, codec, tmp_path / "r.json") == found
    half = StudyReport(tmp_path / "r.json", "t", "d", StudyOptions(len(CASES), max_tokens=60, streams=2))
    half.spent(PLAIN, 5.0)
    half.forget_unsaved()
    assert half.content == found
    with pytest.raises(BenchError, match="another study"):
        StudyReport(tmp_path / "r.json", "t", "d", StudyOptions(seed=5))


def test_an_answer_that_breaks_its_schema_is_named(target, codec, tmp_path, monkeypatch):
    right = GrammarCompiler.compile

    def careless(self, kind, source):
        return right(self, kind, {"enum": ["c"]} if source == SMALL[1] else source)

    monkeypatch.setattr(GrammarCompiler, "compile", careless)
    found = study(target, codec, tmp_path / "r.json")
    assert {entry[0] for entry in found["invalid"]} == {"small-1"}
    assert found["answers"][PLAIN]["valid"] == 2
