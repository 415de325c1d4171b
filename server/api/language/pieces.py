"""What an answer consists of, whatever the wire format: text, reasoning and calls of tools, as they come and folded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class TextPiece:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class ReasoningPiece:
    """Text of the reasoning before the answer."""

    text: str


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


@dataclass
class Answer:
    """One choice, folded from its pieces; ``finish_reason`` None while it grows."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallPiece] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, pieces: Iterable[Piece]) -> None:
        """Append."""
        for piece in pieces:
            if isinstance(piece, CallPiece):
                self.calls.append(piece)
            elif isinstance(piece, ReasoningPiece):
                self.reasoning += piece.text
            else:
                self.text += piece.text

    def finish(self, reason: str) -> str:
        """Set and return the reason: ``stop``, ``length``, or ``tool_calls`` where an unbroken answer calls tools."""
        self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason
        return self.finish_reason
