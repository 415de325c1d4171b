"""Answers held to a grammar: always valid, the same with and without drafts, and an impossible one ends alone."""

import json
import re
import threading

import jsonschema
import pytest

from doubles import OracleDrafter, tiny_llama
from drafters.drafter import Drafter
from drafters.ngram import NGramDrafter
from drafters.proposal import Budget, Proposal
from server.engine.candidates import possible
from server.engine.completion import Completion, generate
from server.engine.engine import Engine, EngineOptions
from server.engine.grammar import GrammarCompiler, GrammarError
from server.engine.request import FinishReason, Request, SamplingParams
from server.targets.torch_target import TorchTarget

VOCAB = 320  # wider than the tokenizer, as embeddings often are
SCHEMAS = [
    {"const": "42"},
    {"enum": ["red", "green", 3, None]},
    {"type": "boolean"},
    {"type": "integer", "minimum": 0, "maximum": 20},
    {"type": "string", "maxLength": 4},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 9}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    {
        "$defs": {"leaf": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"],
                           "additionalProperties": False}},
        "anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}],
    },
]  # fmt: skip
GREEDY, SAMPLED = SamplingParams(temperature=0), SamplingParams(temperature=1.5, seed=5)


@pytest.fixture(scope="module")
def target(save_model):
    return TorchTarget.load(save_model(tiny_llama(VOCAB), "grammar"), "fp32", num_slots=4, capacity=300)


@pytest.fixture(scope="module")
def compiler(codec):
    return GrammarCompiler(codec.tokenizer, codec.stop_ids)


def run(target: TorchTarget, drafter: Drafter | None, requests: list[Request]) -> list[Completion]:
    options = EngineOptions(max_seqs=4, context_length=250, budget=Budget(8, 3, 3))
    engine = Engine(target, drafter, options)
    results = generate(engine, requests)
    engine.check_integrity()
    return [results[request.request_id] for request in requests]


def asked(compiler, codec, sampling, **more):
    return [
        Request(f"r{i}", [5, 6], 60, sampling, codec.stop_ids, grammar=compiler.compile("json_schema", schema), **more)
        for i, schema in enumerate(SCHEMAS)
    ]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_answer_is_valid_and_drafts_change_none(target, compiler, codec, sampling):
    plain = run(target, None, asked(compiler, codec, sampling))
    for schema, answer in zip(SCHEMAS, plain, strict=True):
        assert answer.finished.reason is FinishReason.STOP
        jsonschema.validate(json.loads(codec.decode(answer.token_ids)), schema)
    texts = [[5, 6, *answer.token_ids] for answer in plain]
    for drafter in (OracleDrafter(texts, VOCAB), OracleDrafter(texts, VOCAB, wrong=True), NGramDrafter()):
        drafted = run(target, drafter, asked(compiler, codec, sampling))
        assert [answer.token_ids for answer in drafted] == [answer.token_ids for answer in plain]
    oracle = run(target, OracleDrafter(texts, VOCAB), asked(compiler, codec, sampling))
    assert sum(answer.finished.stats.accepted for answer in oracle) > 10


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", "[ab]{3}-[0-9]{2}", "[ab]{3}-[0-9]{2}"),
        ("choice", ["yes", 'n"o'], 'yes|n"o'),
        ("grammar", 'root ::= "a"{5,5} b\nb ::= "x" | "y"', "a{5}[xy]"),
    ],
)
def test_other_kinds_of_grammar(target, compiler, codec, kind, source, pattern):
    requests = [Request("r", [5], 40, SAMPLED, codec.stop_ids, grammar=compiler.compile(kind, source))]
    (answer,) = run(target, None, requests)
    assert re.fullmatch(pattern, codec.decode(answer.token_ids))


def test_an_impossible_answer_ends_alone(target, compiler, codec):
    class Nothing:
        def allowed(self, output_ids):
            raise ValueError("nothing may follow")

        forced = follows = allowed

    for drafter in (None, NGramDrafter()):
        good = asked(compiler, codec, GREEDY)[:1]
        bad, fine = run(target, drafter, [Request("bad", [5], 9, GREEDY, codec.stop_ids, grammar=Nothing()), *good])
        assert (bad.finished.reason, fine.finished.reason) == (FinishReason.FAILED, FinishReason.STOP)


def test_grammars_are_remembered_and_begin_afresh(compiler):
    first, second = compiler.compile("regex", "ab*"), compiler.compile("regex", "ab*")
    begin = second.allowed([]).nonzero()[0].tolist()
    first.allowed(begin[:1])
    assert second.allowed([]).nonzero()[0].tolist() == begin
    for index in range(80):
        compiler.compile("regex", f"a{{{index}}}")
    assert len(compiler.compiled) == 64
    for kind, source in (("regex", "(a"), ("json_schema", {"type": "hiccup"}), ("grammar", "root = = =")):
        with pytest.raises(GrammarError):
            compiler.compile(kind, source)


def test_an_end_may_not_come_too_early(target, codec):
    bias = SamplingParams(temperature=0, logit_bias={min(codec.stop_ids): 100.0})
    for min_tokens in (0, 7):
        (answer,) = run(target, None, [Request("r", [5], 20, bias, codec.stop_ids, min_tokens=min_tokens)])
        assert len(answer.token_ids) == min_tokens + 1


def test_what_a_grammar_forces_is_drafted(target, compiler, codec):
    """Long keys leave no choice: with no other source of drafts they are verified several at a time."""
    schema = {
        "type": "object",
        "properties": {"temperature_outside": {"type": "boolean"}, "another_long_key": {"enum": ["x", "y"]}},
        "required": ["temperature_outside", "another_long_key"],
        "additionalProperties": False,
    }

    def answer(draft, sampling):
        grammar = compiler.compile("json_schema", schema)
        requests = [Request("r", [5, 6], 100, sampling, codec.stop_ids, grammar=grammar, draft=draft)]
        options = EngineOptions(max_seqs=1, context_length=250, budget=Budget(8, 3, 3), lookup=True)
        return generate(Engine(target, None, options), requests)["r"]

    for sampling in (GREEDY, SAMPLED):
        plain, drafted = answer(False, sampling), answer(True, sampling)
        assert drafted.token_ids == plain.token_ids
        assert drafted.finished.stats.accepted > 0.4 * len(plain.token_ids)
        assert drafted.finished.stats.accepted > 0.7 * drafted.finished.stats.drafted


def test_no_row_is_spent_on_what_the_grammar_forbids(compiler, codec):
    grammar = compiler.compile("regex", "a(b|cd)e")
    a, b, c, d, e = (codec.encode(letter)[0] for letter in "abcde")
    tree = Proposal((a, b, c, b, e, d, c), (None, 0, 0, None, 1, 2, 2), (0.0,) * 7)
    kept = possible(tree, lambda token_ids: grammar.follows([], token_ids))
    assert sorted(kept) == [0, 1, 2, 4, 5]  # not the b at the beginning, nor the second c
    assert grammar.follows([a, b], [e, e]) == 1


def test_a_grammar_that_compiles_slowly_holds_up_no_other(codec, monkeypatch):
    compiler, go = GrammarCompiler(codec.tokenizer, codec.stop_ids), threading.Event()
    compiler.compile("regex", "[a-z]")
    real = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda kind, text: go.wait(60) and real(kind, text))
    slow = threading.Thread(target=compiler.compile, args=("regex", "slow"))
    slow.start()
    assert compiler.compile("regex", "[a-z]").follows([], [codec.tokenizer.token_to_id("a")]) == 1
    assert slow.is_alive()
    go.set()
    slow.join(60)
    assert ("regex", "slow") in compiler.compiled
