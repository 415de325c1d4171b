"""Digits have an end: an answer that repeats one closes its number, and still follows its schema."""

import json
import re

import jsonschema
import numpy as np
import pytest

from server.engine.digits import DigitBounds
from server.engine.grammar import GrammarCompiler, GrammarError


@pytest.fixture(scope="module")
def compiler(codec):
    return GrammarCompiler(codec.tokenizer, codec.stop_ids)


def answer(compiler, codec, schema, wanted, begin="", most=250):
    """What a model writes behind ``begin`` that wants the letters of ``wanted`` more than any other, the first most;
    None without an end."""
    tokens = compiler.digits.tokens
    order = [*(tokens.index(letter.encode()) for letter in wanted), *range(len(tokens))]
    grammar = compiler.compile("json_schema", schema)
    output_ids = [tokens.index(letter.encode()) for letter in begin]
    while len(output_ids) < most:
        allowed = grammar.allowed(output_ids)
        token_id = next(token_id for token_id in order if allowed[token_id])
        if token_id in codec.stop_ids:
            return codec.decode(output_ids)
        output_ids.append(token_id)
    return None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},  # a double takes twenty nines for 1
        {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 100},
        {"type": "number", "exclusiveMinimum": 0},  # 0.000... may not end without another digit
        {"type": "number", "exclusiveMinimum": 3},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
        {"type": "number", "exclusiveMinimum": -5.5, "exclusiveMaximum": -5},
        {"type": "number", "minimum": 0.30000000000000004, "maximum": 0.31},
        {"type": "number", "minimum": 1e-7, "maximum": 2e-7},
        {"type": "number", "minimum": -1e308, "maximum": 1e308},
        {"type": "number", "minimum": -1e30, "maximum": 1e30},
        {"type": "number", "minimum": 0, "exclusiveMinimum": True},  # as older drafts write it
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "minimum": 2**53 + 1},
        {"type": "integer", "minimum": 10**18},
        {"type": "integer", "multipleOf": 7},
        {"type": "integer", "multipleOf": 100},
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        {"enum": [10**22, 10.5, 2**53]},
        {"anyOf": [{"type": "null"}, {"type": "number", "maximum": -2.5}]},
    ],
    ids=str,
)
def test_numbers_end_and_follow_their_schema(compiler, codec, schema):
    followed = {key: value for key, value in schema.items() if value is not True}
    for wanted in ("0", "1.", "9e+", "9.", "-0.", "-9", "5e-"):
        text = answer(compiler, codec, schema, wanted)
        jsonschema.validate(json.loads(text), followed)
        assert max(map(len, re.findall(r"[0-9]+", text))) <= 24
        assert all(len(digits) <= 2 for digits in re.findall(r"[eE][+-]?([0-9]+)", text))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"const": -(2**63)}, "-9223372036854775808"),  # this one ended the process
        ({"enum": ["a", {"b": [2**53 + 1]}]}, "9007199254740993"),
        ({"type": "integer", "minimum": 10**25}, "minimum is 10"),
        ({"type": "number", "maximum": -1e20}, "maximum is -1e"),
        ({"type": "integer", "multipleOf": -3}, "above 0"),
        ({"allOf": [{"type": "integer", "multipleOf": 65537}, {"multipleOf": 65539}]}, "65537, 65539"),
        ({"type": "string", "minLength": 2**40}, "at most 1000000"),
        ({"type": "string", "pattern": ".*" * 3000}, "3000 repetitions"),  # minutes, and then refused
    ],
    ids=str,
)
def test_what_cannot_be_held_to_is_refused(compiler, schema, words):
    properties = {"const": schema, "x": {"type": "array", "prefixItems": [schema]}}
    inner = json.dumps(schema)
    for kind, source in (("json_schema", {"properties": properties}), ("grammar", f"start: %json {inner}")):
        with pytest.raises(GrammarError, match=re.escape(words)):
            compiler.compile(kind, source)


def test_what_only_looks_like_a_fault_is_answered(compiler, codec):
    """Names are no keywords, examples hold anything, and a step beside another that it divides is one step."""
    names = {"const": {"type": "null"}, "minimum": {"enum": [2**53]}, "multipleOf": {"const": {"minLength": 2**50}}}
    schema = {
        "type": "object", "properties": names, "required": [*names], "additionalProperties": False,
        "examples": [{"const": 2**63}], "default": {"minimum": 10**30},
    }  # fmt: skip
    written = '{"const": null, "minimum": 9007199254740992, "multipleOf": {"minLength": 1125899906842624}}'
    assert answer(compiler, codec, schema, "") == written
    both = {"allOf": [{"type": "integer", "multipleOf": 5}, {"multipleOf": 10}], "minimum": 11, "maximum": 20}
    assert answer(compiler, codec, both, "") == "20"


@pytest.mark.parametrize(
    ("schema", "begin", "wanted", "text"),
    [
        ({"format": "date-time"}, '"2022-01-01T00:00:00.', "0", r'"2022-01-01T00:00:00\.0{9}[Zz+-].*"'),
        ({"format": "time"}, '"11:11:11', ".1", r'"11:11:11\.1{9}[^0-9].*"'),
        ({"format": "duration"}, '"P', "1", r'"P1{40}[YMWD]"'),
        ({"pattern": "^[0-9]+$"}, '"', "3", '"3{40}"'),
        ({"pattern": "^[0-9]+,[0-9]+$"}, '"', "3", '"3{40},3{40}"'),
        ({"pattern": "^[0-9]+$", "minLength": 60}, '"', "3", '"3{60}"'),
        ({"pattern": "^[0-9a-f]+$", "maxLength": 64}, '"', "0", '"0{64}"'),  # letters may stand there too: it is free
        ({"maxLength": 90}, '"', "7", '"7{90}"'),
    ],
    ids=str,
)
def test_texts_of_digits_end_as_their_form_says(compiler, codec, schema, begin, wanted, text):
    assert re.fullmatch(text, answer(compiler, codec, {"type": "string"} | schema, wanted, begin))


def test_a_token_of_several_digits_goes_no_further(compiler, codec):
    """Behind 19 digits a token of three has no place, one digit has."""

    class Tokens:
        vocab_size = 13
        tokens = (*(str(digit).encode() for digit in range(10)), b"000", b",", b"")

        def is_special_token(self, token_id):
            return token_id == 12

        def decode_bytes(self, token_ids):
            return self.tokens[token_ids[0]]

    bounds, everything = DigitBounds(Tokens()), np.ones(13, bool)
    kept = [
        bounds.apply(everything, [1] * count, lambda token_id: False).nonzero()[0].tolist() for count in (17, 19, 20)
    ]
    assert kept == [list(range(13)), [*range(10), 11, 12], [11, 12]]


def test_text_beside_calls_keeps_its_digits(compiler):
    """In an answer that may be text or a call only the call's numbers have an end."""
    tokens = compiler.digits.tokens
    grammar = compiler.compile("lark", 'start: TEXT | "<" %json {"type": "integer"}\nTEXT: /[^<](.|\\n)*/')
    three, call = tokens.index(b"3"), tokens.index(b"<")
    assert grammar.allowed([three] * 60)[three]
    assert grammar.allowed([call, *[three] * 19])[three] and not grammar.allowed([call, *[three] * 20])[three]
