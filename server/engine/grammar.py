"""Grammars that an answer must follow: compiled for one tokenizer, then asked before every token what may come next.

A tree's rows are asked along the path that is being accepted, so every verified row that counts is masked by the state
of its own branch; a branch that is left is rolled back. No torch here.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer, grammar_from
from tokenizers import Tokenizer

from server.engine.digits import DigitBounds
from server.engine.request import GrammarStuck
from server.engine.schema import IN_GRAMMAR, check_expression, held, held_in_grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Kind = Literal["json_schema", "regex", "choice", "grammar", "lark"]

WITH_SCHEMAS: tuple[Kind, ...] = ("json_schema", "lark")  # the kinds whose JSON we write the rules of
MAX_COMPILED = 64
MAX_REASON = 200  # characters
# One way to write blanks: a small model given the choice may never end them.
BLANKS: JsonCompileOptions = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


class GrammarError(ValueError):
    """A schema, an expression or a grammar that cannot be compiled; the message says why."""


class Grammar:
    """A grammar and how far one answer has gone in it; digits: bounds of its numbers, None where it bounds them itself.
    One thread uses it.
    """

    def __init__(self, matcher: LLMatcher, num_tokens: int, digits: DigitBounds | None) -> None:
        self.matcher = matcher
        self.num_tokens = num_tokens
        self.digits = digits
        self.consumed: list[int] = []

    def allowed(self, output_ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[vocabulary] whether each token may follow these. Errors: GrammarStuck where none may, or too much work."""
        self._go_to(output_ids)
        allowed = self._mask()
        if self.digits is None:
            return allowed
        return self.digits.apply(allowed, output_ids, lambda token_id: self._may_end([*output_ids, token_id]))

    def forced(self, output_ids: Sequence[int]) -> Sequence[int]:
        """Tokens that must follow, as far as there is no choice; the model may still cut the same text otherwise."""
        self._go_to(output_ids)
        token_ids: list[int] = self.matcher.compute_ff_tokens()
        return token_ids

    def follows(self, output_ids: Sequence[int], token_ids: Sequence[int]) -> int:
        """How many of these tokens may follow, from the first on."""
        self._go_to(output_ids)
        return int(self.matcher.validate_tokens(list(token_ids)))

    def _mask(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """What may follow where the matcher stands."""
        mask = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            raise GrammarStuck(f"The grammar cannot go on: {first_line(self.matcher.get_error())}")
        return np.unpackbits(np.frombuffer(mask, np.uint8), count=self.num_tokens, bitorder="little").astype(bool)

    def _may_end(self, output_ids: Sequence[int]) -> bool:
        """Whether a number at the end of these may end with them."""
        assert self.digits is not None
        self._go_to(output_ids)
        return bool((self._mask() & (self.digits.leading == 0)).any())

    def _go_to(self, output_ids: Sequence[int]) -> None:
        """Stand behind these tokens: what the answer did not take is rolled back."""
        same = 0
        for before, now in zip(self.consumed, output_ids, strict=False):
            if before != now:
                break
            same += 1
        if same < len(self.consumed):
            self.matcher.rollback(len(self.consumed) - same)
        for token_id in output_ids[same:]:
            self.matcher.consume_token(token_id)
        self.consumed = list(output_ids)


class GrammarCompiler:
    """Compiles for one tokenizer and remembers the last grammars. May be called from several threads."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int]) -> None:
        self.tokenizer = LLTokenizer(tokenizer.to_str(), eos_token=sorted(stop_ids))
        self.digits = DigitBounds(self.tokenizer)
        self.lock = threading.Lock()
        self.compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def compile(self, kind: Kind, source: str | Mapping[str, Any] | Sequence[str]) -> Grammar:
        """A grammar at its beginning. Errors: GrammarError."""
        text = source if isinstance(source, str) else json.dumps(source)
        with self.lock:
            matcher = self.compiled.get((kind, text))
        if matcher is None:  # outside the lock: it may take seconds, and the event loop asks for what is there
            matcher = self._compile(kind, text)
        with self.lock:
            self.compiled[kind, text] = matcher
            self.compiled.move_to_end((kind, text))
            if len(self.compiled) > MAX_COMPILED:
                self.compiled.popitem(last=False)
            digits = self.digits if kind in WITH_SCHEMAS else None
            return Grammar(matcher.deep_copy(), self.tokenizer.vocab_size, digits)

    def _compile(self, kind: Kind, text: str) -> LLMatcher:
        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(held(text)), overrides=BLANKS)
            else:
                if kind in ("regex", "grammar"):
                    check_expression(IN_GRAMMAR.split(text)[0])
                grammar = grammar_from(kind, held_in_grammar(text, BLANKS) if kind in ("grammar", "lark") else text)
        except ValueError as error:
            raise GrammarError(first_line(str(error))) from error
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(first_line(matcher.get_error()))
        begun = matcher.deep_copy()
        begun.compute_bitmask()
        if begun.is_error():
            raise GrammarError("no answer can follow it")
        return matcher


def first_line(text: str) -> str:
    """What the library says before it shows its state; of a fault in an expression, which is shown first, the last."""
    lines = text.splitlines() or [""]
    return (f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0])[:MAX_REASON]
