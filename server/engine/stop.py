"""Stop strings in growing text. Pure; knows neither engine nor wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Decoder(Protocol):
    """Gives the text that tokens complete."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text completed by these tokens."""
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


@dataclass(frozen=True)
class TextDelta:
    """text: what to append; num_tokens_used: tokens of the push that count; stopped: a stop string was met.

    decoded: the text that these tokens complete, whatever of it is held back or cut off.
    """

    text: str
    num_tokens_used: int
    stopped: bool
    decoded: str = ""


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

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take a burst; tokens after the one that completed a stop string are not used."""
        pieces, decoded, used = list[str](), list[str](), 0
        for token_id in token_ids:
            used += 1
            decoded.append(self.decoder.push([token_id]))
            pieces.append(self.matcher.push(decoded[-1]))
            if self.matcher.stopped:
                break
        return TextDelta("".join(pieces), used, self.matcher.stopped, "".join(decoded))

    def flush(self) -> TextDelta:
        """The end of the text; an unfinished character and a disproved stop string come out here."""
        text = self.matcher.push(self.decoder.flush())
        return TextDelta(text + self.matcher.flush(), 0, self.matcher.stopped)
