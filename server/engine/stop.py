"""Stop strings in growing text. Pure; knows neither engine nor wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Decoder(Protocol):
    """Gives the text that tokens complete."""

    def push(self, token_id: int) -> str:
        """Text completed by this token."""
        ...

    def flush(self) -> str:
        """Text still held."""
        ...


class Codec(Protocol):
    """Whatever offers a fresh decoder."""

    def stream(
        self,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown: Sequence[str] = (),
        stop_ids: frozenset[int] = frozenset(),
    ) -> Decoder:
        """A decoder for one text, or for what continues a prompt."""
        ...


class StopMatcher:
    """Finds the earliest stop string in a text that comes in pieces.

    The longest end of the text that may still become a stop string is held back until that is settled. The first
    piece that completes a stop string decides; of several completed by it, the one that begins first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show; once a stop string was met, ``stopped`` is set and nothing follows."""
        if self.stopped:
            return ""
        if not self.stops:
            return text
        window = self.held + text
        starts = [start for stop in self.stops if (start := window.find(stop)) >= 0]
        if starts:
            self.stopped, self.held = True, ""
            return window[: min(starts)]
        num_safe = len(window) - num_held(window, self.stops)
        self.held = window[num_safe:]
        return window[:num_safe]

    def flush(self) -> str:
        """What was held back and never became a stop string."""
        text, self.held = self.held, ""
        return text


def num_held(window: str, stops: Sequence[str]) -> int:
    """Characters at the end of ``window`` that may be the beginning of one of ``stops``."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(window)), 0, -1):
        if any(stop.startswith(window[-length:]) for stop in stops):
            return length
    return 0


class TextDelta(NamedTuple):
    """What one token added. text: what may be shown by now; decoded: what it completes, whatever of it is held back or
    cut off."""

    text: str
    decoded: str


class TextOutput:
    """Tokens of one request in, showable text out: incremental decoding, then stop strings, token by token.

    ``prompt_ids``: the prompt that the text continues; none where a new text begins, as a turn of a chat does.
    """

    def __init__(
        self,
        codec: Codec,
        stops: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
        shown: Sequence[str] = (),
        special_but: frozenset[int] | None = None,
    ) -> None:
        """``special_but``: special tokens are part of the text, all but these (the ids that end it)."""
        self.decoder = codec.stream(special_but is None, prompt_ids, shown, special_but or frozenset())
        self.matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """A stop string was met: nothing follows."""
        return self.matcher.stopped

    def push(self, token_id: int) -> TextDelta:
        """Take a token; this runs for every one."""
        decoded = self.decoder.push(token_id)
        return TextDelta(self.matcher.push(decoded), decoded)

    def flush(self) -> str:
        """The end of the text; an unfinished character and a disproved stop string come out here."""
        text = self.matcher.push(self.decoder.flush())
        return text + self.matcher.flush()
