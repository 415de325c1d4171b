"""Calls of tools and reasoning in a model's text: how the families of chat templates write them, and the parser.

The markers are those that the public chat templates of these families use.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from server.api.language.pieces import CallPiece, Piece, ReasoningPiece, TextPiece
from server.engine.stop import num_held

THINK, THINK_END = "<think>", "</think>"
ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True)
class CallFormat:
    """How one family writes calls: JSON between ``begin`` and ``end`` (empty: the JSON's own end).

    ``bare``: an answer that begins with a JSON object is a call as well, if it names one of the tools; ``is_list``: the
    JSON is a list of calls.
    """

    name: str
    begin: str
    end: str = ""
    bare: bool = False
    is_list: bool = False


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>")
FORMATS = (
    HERMES,
    CallFormat("mistral", "[TOOL_CALLS]", is_list=True),
    CallFormat("granite", "<|tool_call|>", is_list=True),
    CallFormat("llama3", "<|python_tag|>", bare=True),
)
GENERIC = CallFormat("generic", "", bare=True)


def call_format(templates: Iterable[str]) -> CallFormat:
    """The format that a model's chat templates write calls in; where they show none, a bare JSON object."""
    source = "\n".join(templates)
    return next((known for known in FORMATS if known.begin in source), GENERIC)


class AnswerParser:
    """Splits a growing text into reasoning, text and calls.

    A call is given when it is complete; text that only looks like one is text. Calls are looked for where ``tools``
    (their names) are given; with ``one_call`` what follows the first is dropped.
    """

    def __init__(
        self, format: CallFormat, tools: Collection[str] = (), *, thinking: bool = False, one_call: bool = False
    ) -> None:
        """``thinking``: the prompt has opened the reasoning already."""
        self.format = format
        self.tools = frozenset(tools)
        self.one_call = one_call
        self.held = ""
        self.opening = ""  # what a call that is being read began with
        self.num_calls = 0
        self.state: Callable[[bool], list[Piece] | None] = self._reasoning if thinking else self._start

    def push(self, text: str) -> list[Piece]:
        """The pieces that this text completes."""
        self.held += text
        return self._run(at_end=False)

    def flush(self) -> list[Piece]:
        """What was held back."""
        pieces = self._run(at_end=True)
        rest, self.held = self.held, ""
        return pieces + self._text(rest)

    def _run(self, at_end: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while (found := self.state(at_end)) is not None:
            pieces += found
        return pieces

    def _start(self, at_end: bool) -> list[Piece] | None:
        """Before anything: blanks are kept back until it is clear whether reasoning or a bare call begins."""
        text = self.held.lstrip()
        if not at_end and (not text or (THINK.startswith(text) and text != THINK)):
            return None
        if text.startswith(THINK):
            self.held, self.state = text[len(THINK) :].lstrip("\n"), self._reasoning
        elif self.tools and self.format.bare and text.startswith("{"):
            self.opening, self.state = "", self._call
        else:
            self.state = self._content
        return []

    def _reasoning(self, at_end: bool) -> list[Piece] | None:
        before, marker, after = self.held.partition(THINK_END)
        if marker:
            self.held, self.state = after, self._gap
            return [ReasoningPiece(before)] if before else []
        keep = 0 if at_end else num_held(self.held, [THINK_END])
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return [ReasoningPiece(shown)] if shown else None

    def _gap(self, at_end: bool) -> list[Piece] | None:
        """The lines between reasoning and answer belong to neither."""
        self.held = self.held.lstrip("\n")
        if not self.held and not at_end:
            return None
        self.state = self._content
        return []

    def _content(self, at_end: bool) -> list[Piece] | None:
        markers = [self.format.begin] if self.tools and self.format.begin else []
        for marker in markers:
            before, found, after = self.held.partition(marker)
            if found:
                self.held, self.opening, self.state = after, marker, self._call
                return self._text(before.rstrip() if not before.strip() else before)
        keep = 0 if at_end else num_held(self.held, markers)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return self._text(shown) or None

    def _call(self, at_end: bool) -> list[Piece] | None:
        """Inside a call: wait until it is complete; where it cannot be one, it was text."""
        end = self.format.end
        body, marker, after = self.held.partition(end) if end else (self.held, "", "")
        calls, rest = read_calls(body)
        is_complete = bool(marker) or (calls is not None and not end)
        if calls is not None and is_complete and (self.opening or self._known(calls)):
            self.held, self.state = (after if marker else rest).lstrip(), self._after_call
            return self._calls(calls)
        if not (is_complete or at_end):
            return None
        self.held, self.state = after, self._content
        return self._text(self.opening + body + marker)

    def _after_call(self, at_end: bool) -> list[Piece] | None:
        if self.one_call:
            self.held = ""
            return None
        self.held = self.held.lstrip(" \n;,")
        if not self.held and not at_end:
            return None
        self.state = self._content
        return []

    def _known(self, calls: list[dict[str, Any]]) -> bool:
        return all(call["name"] in self.tools for call in calls)

    def _calls(self, calls: list[dict[str, Any]]) -> list[Piece]:
        pieces: list[Piece] = []
        for call in calls[:1] if self.one_call else calls:
            arguments: Any = next((call[key] for key in ARGUMENT_KEYS if key in call), {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            pieces.append(CallPiece(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", call["name"], text))
            self.num_calls += 1
        return pieces

    def _text(self, text: str) -> list[Piece]:
        return [TextPiece(text)] if text else []


def read_calls(text: str) -> tuple[list[dict[str, Any]] | None, str]:
    """The calls that a JSON value at the beginning of ``text`` makes, and what follows it; None where it is no call."""
    stripped = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(stripped)
    except (ValueError, RecursionError):
        return None, text
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return None, text
    return calls, stripped[end:]
