"""The tokens behind a choice's text, in step with what is shown of it, and how the wire tells of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.engine.completion import Completion, Piece
from server.engine.request import Ranked
from server.text import TextCodec


@dataclass(frozen=True)
class ShownToken:
    """A token of a choice, or of the prompt that is echoed before it.

    text: what it adds to the text in its place, so that all texts joined are the choice's; empty where it begins a
    character that a later token completes. start: characters before it. is_cut: it belongs to a stop string. drafted:
    it was an accepted draft.
    """

    token_id: int
    text: str
    start: int
    ranked: Ranked | None = None
    is_echo: bool = False
    is_cut: bool = False
    drafted: bool = False


@dataclass
class TokenTrack:
    """Tokens of one choice as they come; each is given out with the text that shows its first character."""

    waiting: list[ShownToken] = field(default_factory=list)
    end: int = 0
    shown: int = 0

    def add(
        self, token_id: int, text: str, ranked: Ranked | None, *, is_echo: bool = False, drafted: bool = False
    ) -> None:
        """One more token."""
        self.waiting.append(ShownToken(token_id, text, self.end, ranked, is_echo, drafted=drafted))
        self.end += len(text)

    def take(self, pieces: Iterable[Piece], text: str) -> list[ShownToken]:
        """The engine's pieces, and the text that is shown by now because of them; the tokens that go with it.

        Text behind the last token's, an unfinished character that ends an answer, is for ``finish`` to give away.
        """
        for piece in pieces:
            if piece.token_id is not None:
                self.add(piece.token_id, piece.decoded, piece.ranked, drafted=piece.drafted)
        self.shown += len(text)
        count = 0
        while count < len(self.waiting) and self.waiting[count].start < min(self.shown, self.end):
            count += 1
        given, self.waiting = self.waiting[:count], self.waiting[count:]
        return given

    def finish(self, text: str, *, is_stopped: bool) -> list[ShownToken]:
        """What is left at the end: behind a stop string all is cut, else the last token has the text nobody has."""
        rest, self.waiting = self.waiting, []
        if is_stopped:
            return [dataclasses.replace(token, text="", is_cut=True) for token in rest]
        if rest and self.shown > self.end:
            missing = text[-(self.shown - self.end) :]
            rest[-1] = dataclasses.replace(rest[-1], text=rest[-1].text + missing)
        return rest


@dataclass(frozen=True)
class TokenView:
    """What a call wants to know of tokens.

    num_top: alternatives beside each log-probability, None: none are told; token_ids: whether ids are told; as_ids:
    tokens are written ``token_id:N``; drafted: whether each token's text is told with whether it was a draft.
    """

    codec: TextCodec
    num_top: int | None = None
    token_ids: bool = False
    as_ids: bool = False
    drafted: bool = False

    def of_answer(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        """``token_ids`` and ``tokens`` of the answer, where they are wanted."""
        own = [token for token in tokens if not token.is_echo]
        told: dict[str, Any] = {"token_ids": [token.token_id for token in own]} if self.token_ids else {}
        if self.drafted:
            told["tokens"] = [{"text": token.text, "drafted": token.drafted} for token in own if not token.is_cut]
        return told

    def prompt(self, completion: Completion, num_top: int | None) -> dict[str, Any]:
        """``prompt_token_ids`` and ``prompt_logprobs`` of a choice, where they are wanted."""
        ids = list(completion.request.prompt_ids)
        told: dict[str, Any] = {"prompt_token_ids": ids} if self.token_ids else {}
        if num_top is not None:
            told["prompt_logprobs"] = self.of_prompt(ids, completion.prompt_ranked, num_top)
        return told

    def of_text(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        """``logprobs`` of a completion: four lists of equal length."""
        told = [token for token in tokens if not token.is_cut]
        if self.num_top is None or not told:
            return None
        return {
            "tokens": [self.written(token) for token in told],
            "token_logprobs": [token.ranked and token.ranked.log_prob for token in told],
            "top_logprobs": [self._by_text(token) for token in told],
            "text_offset": [token.start for token in told],
        }

    def of_chat(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        """``logprobs`` of a chat's choice."""
        told = [(token, token.ranked) for token in tokens if not token.is_cut]
        if self.num_top is None or not told:
            return None
        content = [self._entry(token, ranked) for token, ranked in told if ranked is not None]
        return {"content": content, "refusal": None}

    def of_prompt(self, prompt_ids: Sequence[int], ranked: Sequence[Ranked], num_top: int) -> list[Any]:
        """vLLM's ``prompt_logprobs``: null for the first token, then the likeliest and the token itself, by id."""
        told: list[Any] = [None]
        for token_id, own in zip(prompt_ids[1:], ranked, strict=True):
            places = {i: (place, value) for place, (i, value) in enumerate(own.top[:num_top], 1)}
            places.setdefault(token_id, (own.place, own.log_prob))
            told.append(
                {
                    str(i): {"logprob": value, "rank": place, "decoded_token": self.name(i)}
                    for i, (place, value) in places.items()
                }
            )
        return told

    def written(self, token: ShownToken) -> str:
        """A token of the text."""
        return f"token_id:{token.token_id}" if self.as_ids else token.text

    def name(self, token_id: int) -> str:
        """A token on its own; ``bytes:`` and its bytes where they are no whole characters."""
        if self.as_ids:
            return f"token_id:{token_id}"
        own = self.codec.token_bytes.of(token_id)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def _by_text(self, token: ShownToken) -> dict[str, float] | None:
        """The likeliest tokens by their text; the one that came is always there."""
        if token.ranked is None:
            return None
        told = {self.written(token): token.ranked.log_prob}
        for token_id, value in token.ranked.top[: self.num_top]:
            if token_id != token.token_id:
                told.setdefault(self.name(token_id), value)
        return dict(sorted(told.items(), key=lambda entry: -entry[1]))

    def _entry(self, token: ShownToken, ranked: Ranked) -> dict[str, Any]:
        own = {"token": self.written(token), "logprob": ranked.log_prob, "bytes": list(self._bytes(token))}
        others = [
            own
            if token_id == token.token_id
            else {"token": self.name(token_id), "logprob": value, "bytes": list(self.codec.token_bytes.of(token_id))}
            for token_id, value in ranked.top[: self.num_top]
        ]
        return own | {"top_logprobs": others}

    def _bytes(self, token: ShownToken) -> bytes:
        """Its share of the text's bytes: a decoder may leave a leading blank out, and special tokens whole."""
        own, text = self.codec.token_bytes.of(token.token_id), token.text.encode()
        is_hidden = not text and token.token_id in self.codec.hidden_ids
        return text if is_hidden or (text and own.endswith(text)) else own
