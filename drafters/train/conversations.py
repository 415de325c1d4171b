"""Conversations and plain text as drafter training samples, with the loss on what the assistant says.

Which tokens are the assistant's is asked of the chat template itself: an answer is what the template adds between the
conversation before it, rendered up to the point where the model would begin to speak, and the conversation with it. No
separators are searched for, so any template works that does not rewrite earlier turns.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from drafters.train.corpus import CorpusError, read_text
from drafters.train.records import READERS, REASONING, Conversation, Message, read_conversations

logger = logging.getLogger(__name__)

MIN_TOKENS = 3  # a feature, the token after it and the feature that is predicted
FORMATS = (*READERS, "text")
MAX_NAMED = 5  # bad records that the log names one by one

Ids = NDArray[np.int32]


@dataclass
class Counts:
    """What became of the conversations of a file; ``first_bad`` says what is wrong with the first that is bad."""

    read: int = 0
    bad: int = 0
    without_answer: int = 0
    beyond_limit: int = 0
    rewritten: int = 0
    first_bad: str | None = None

    @property
    def used(self) -> int:
        """Conversations that are trained on."""
        return self.read - self.bad - self.without_answer - self.beyond_limit - self.rewritten

    def add_bad(self, why: Exception) -> None:
        """One more that cannot be used; the log names the first few."""
        self.bad += 1
        self.first_bad = self.first_bad or str(why)
        if self.bad <= MAX_NAMED:
            logger.warning("passed over: %s", why)

    def __str__(self) -> str:
        text = (
            f"{self.read} conversations read, {self.used} used; dropped {self.without_answer} without an assistant "
            f"turn, {self.beyond_limit} whose answer begins beyond the length limit, {self.rewritten} whose "
            f"earlier turns the chat template rewrites, {self.bad} bad"
        )
        return text if self.first_bad is None else f"{text} (the first: {self.first_bad})"


class TokenSamples(Dataset[dict[str, Tensor]]):
    """Token ids with a mask of the tokens that count, one sample a conversation; lengths differ."""

    def __init__(self, samples: Sequence[tuple[Ids, NDArray[np.bool_]]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self.samples[index]
        return {"input_ids": torch.from_numpy(ids.astype(np.int64)), "loss_mask": torch.from_numpy(mask).float()}


def pad_batch(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples of different lengths T as one batch [B, longest T, ...], zeros behind the shorter ones.

    Nothing masks the padding out of the attention: it lies behind every position that counts, and attention is causal.
    """
    names = samples[0].keys()
    return {
        name: torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True) for name in names
    }


class ChatTokenizer(Protocol):
    """A target's tokenizer and chat template, just as they will serve it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids, with the place of each in the text."""
        ...

    def render_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[str]:
        """The template's text in pieces that are encoded one by one. Errors: ValueError where it refuses."""
        ...


class FolderTokenizer:
    """A model folder's tokenizer and chat template as transformers reads them, where no server's codec is at hand."""

    def __init__(self, folder: Path) -> None:
        """Errors: CorpusError where the folder holds no tokenizer."""
        from transformers import AutoTokenizer

        try:
            self.reader: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CorpusError(f"{folder} holds no tokenizer that transformers reads: {error}") from error
        self.reader.backend_tokenizer.no_truncation()
        self.reader.backend_tokenizer.no_padding()

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids, with the place of each in the text."""
        own: Tokenizer = self.reader.backend_tokenizer
        return own

    def render_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
    ) -> list[str]:
        """The template's text in one piece. Errors: ValueError where it refuses."""
        try:
            text: str = self.reader.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error
        return [text]


class ChatEncoder:
    """Conversations to token ids and a mask of the assistant's tokens, by a target's own tokenizer and template."""

    def __init__(self, codec: ChatTokenizer, max_length: int) -> None:
        self.codec = codec
        self.max_length = max_length
        self.counts = Counts()

    def encode(self, place: str, talk: Conversation) -> tuple[Ids, NDArray[np.bool_]] | None:
        """Ids and mask of one conversation, cut at the limit; None (and counted) where nothing could be learnt."""
        self.counts.read += 1
        if not talk.answers:
            self.counts.without_answer += 1
            return None
        try:
            pieces = self.render(place, talk.messages, talk.tools, add_generation_prompt=False)
            spans = self.answer_spans(place, talk, "".join(pieces))
        except CorpusError as error:
            self.counts.add_bad(error)
            return None
        if spans is None:
            self.counts.rewritten += 1
            return None
        ids, offsets = self.tokens(pieces)
        mask = np.zeros(len(ids), dtype=np.bool_)
        for i, (start, end) in enumerate(offsets):
            mask[i] = any(first <= start and end <= last for first, last in spans)
        if len(ids) < MIN_TOKENS or not mask[:-1].any():
            self.counts.beyond_limit += 1
            return None
        return ids, mask

    def tokens(self, pieces: Sequence[str]) -> tuple[Ids, list[tuple[int, int]]]:
        """Ids of a text in pieces, and where in the whole of it each stands, cut at the limit."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        before = 0
        for piece in pieces:
            encoded = self.codec.tokenizer.encode(piece, add_special_tokens=False)
            ids += encoded.ids
            offsets += [(before + start, before + end) for start, end in encoded.offsets]
            before += len(piece)
        return np.asarray(ids[: self.max_length], dtype=np.int32), offsets[: self.max_length]

    def samples(self, file: Path, file_format: str) -> list[tuple[Ids, NDArray[np.bool_]]]:
        """Ids and mask of every conversation of a file that can be used."""
        found: list[tuple[Ids, NDArray[np.bool_]]] = []
        for place, talk in read_conversations(file, file_format):
            if isinstance(talk, CorpusError):
                self.counts.read += 1
                self.counts.add_bad(talk)
            elif (sample := self.encode(f"{file}, {place}", talk)) is not None:
                found.append(sample)
        return found

    def answer_spans(self, place: str, talk: Conversation, text: str) -> list[tuple[int, int]] | None:
        """Where in the rendered text each answer begins and ends; None if the template rewrites what came before."""
        spans: list[tuple[int, int]] = []
        for i in talk.answers:
            before = "".join(self.render(place, talk.messages[:i], talk.tools, add_generation_prompt=True))
            answered = self.render(place, talk.messages[: i + 1], talk.tools, add_generation_prompt=False)
            with_answer = "".join(answered)
            if not (with_answer.startswith(before) and text.startswith(with_answer)):
                return None
            if (lost := lost_words(talk.messages[i], with_answer[len(before) :])) is not None:
                raise CorpusError(f"{place}: the target's chat template has no place for {lost}, which would be lost")
            spans.append((len(before), len(with_answer)))
        for tool in talk.tools or []:
            if (name := called_name(tool)) is not None and name not in text:
                raise CorpusError(f"{place}: the target's chat template has no place for the tool {name!r}")
        return spans

    def render(
        self, place: str, messages: list[Message], tools: list[Any] | None, *, add_generation_prompt: bool
    ) -> list[str]:
        """The template's text in pieces. Errors: CorpusError where it refuses the conversation."""
        try:
            return self.codec.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        except ValueError as error:
            raise CorpusError(f"{place}: the target's chat template refuses the conversation: {error}") from error

    def windows(self, text: str) -> list[tuple[Ids, NDArray[np.bool_]]]:
        """Plain text in consecutive pieces of at most the limit; every token counts."""
        ids = np.asarray(self.codec.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        return [(piece, np.ones(len(piece), dtype=np.bool_)) for piece in pieces if len(piece) >= MIN_TOKENS]


def lost_words(answer: Message, rendered: str) -> str | None:
    """What an answer says that its rendering does not: a call, or all of it; None where nothing is lost."""
    for call in answer.get("tool_calls", []):
        if (name := called_name(call)) is not None and name not in rendered:
            return f"the call of {name!r}"
    if not answer["content"]:
        for kind in REASONING:
            if answer.get(kind) and answer[kind].strip() not in rendered:
                return f"{kind!r}, all that an answer says"
    return None


def called_name(call: Any) -> str | None:
    """The function that a call or a tool's description names."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def load_samples(
    file: Path, file_format: str, codec: ChatTokenizer | Path, max_length: int, held_out_share: float, seed: int
) -> tuple[TokenSamples, TokenSamples | None]:
    """(training samples, held-out samples or None) of a data file, shuffled with the seed.

    ``codec``: the target's own, as it serves, or its folder, which transformers then reads.

    Errors: CorpusError naming file and line for what is missing, malformed or empty, and where every conversation had
    to be dropped.
    """
    if file_format not in FORMATS:
        raise CorpusError(f"data.format is {file_format!r}; allowed are {', '.join(FORMATS)}")
    encoder = ChatEncoder(FolderTokenizer(codec) if isinstance(codec, Path) else codec, max_length)
    if file_format == "text":
        if not file.is_file():
            raise CorpusError(f"{file} does not exist; data.conversations of the recipe names it")
        samples = encoder.windows(read_text(file))
    else:
        samples = encoder.samples(file, file_format)
        logger.info("%s: %s", file, encoder.counts)
    if not samples:
        raise CorpusError(
            f"{file} gives nothing to train on: {encoder.counts if encoder.counts.read else 'it is empty'}"
        )
    random.Random(seed).shuffle(samples)
    num_held_out = min(int(len(samples) * held_out_share), len(samples) - 1)
    held_out = samples[len(samples) - num_held_out :]
    return TokenSamples(samples[: len(samples) - num_held_out]), TokenSamples(held_out) if held_out else None
