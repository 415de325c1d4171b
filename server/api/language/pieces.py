"""What an answer consists of, whatever the wire format: text, reasoning and calls of tools, as they come and folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from server.api.language.tokens import ShownToken


@dataclass(frozen=True)
class TextPiece:
    """Text of the answer, and tokens that came with it."""

    text: str
    tokens: tuple[ShownToken, ...] = ()


@dataclass(frozen=True)
class ReasoningPiece:
    """Text of the reasoning before the answer, and tokens that came with it."""

    text: str
    tokens: tuple[ShownToken, ...] = ()


@dataclass(frozen=True)
class CallPiece:
    """A tool is called: the ``index``-th call of its choice. arguments: a JSON object as text."""

    index: int
    call_id: str
    name: str
    arguments: str


Piece = TextPiece | ReasoningPiece | CallPiece


class Parser(Protocol):
    """Finds the pieces of one choice in its growing text."""

    def push(self, text: str) -> list[Piece]:
        """The pieces that this text completes."""
        ...

    def flush(self) -> list[Piece]:
        """What was held back, at the end of the text."""
        ...


class PlainText:
    """All of it is text."""

    def push(self, text: str) -> list[Piece]:
        """The text."""
        return [TextPiece(text)] if text else []

    def flush(self) -> list[Piece]:
        """Nothing is held back."""
        return []


def with_tokens(pieces: list[Piece], tokens: Sequence[ShownToken]) -> list[Piece]:
    """The pieces, the first text among them with these tokens; where there is no text, a piece of none carries them."""
    for place, piece in enumerate(pieces):
        if tokens and not isinstance(piece, CallPiece):
            return [*pieces[:place], replace(piece, tokens=tuple(tokens)), *pieces[place + 1 :]]
    return [*pieces, TextPiece("", tuple(tokens))] if tokens else pieces


@dataclass
class Answer:
    """One choice, folded from its pieces; ``finish_reason`` None while it grows."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallPiece] = field(default_factory=list)
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, pieces: Iterable[Piece]) -> None:
        """Append."""
        for piece in pieces:
            if isinstance(piece, CallPiece):
                self.calls.append(piece)
                continue
            self.tokens += piece.tokens
            if isinstance(piece, ReasoningPiece):
                self.reasoning += piece.text
            else:
                self.text += piece.text

    def finish(self, reason: str) -> str:
        """Set and return the reason: ``stop``, ``length``, or ``tool_calls`` where an unbroken answer calls tools."""
        self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason
        return self.finish_reason
