"""Conversations and plain text as drafter training samples, with the loss on what the assistant says.

Which tokens are the assistant's is asked of the chat template itself: an answer is what the template adds between the
conversation before it, rendered up to the point where the model would begin to speak, and the conversation with it. No
separators are searched for, so any template works that does not rewrite earlier turns.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from drafters.train.corpus import CorpusError, numbered_records

logger = logging.getLogger(__name__)

ASSISTANT = "assistant"
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "assistant": ASSISTANT}
SHAREGPT_ROLES |= {"bing": ASSISTANT, "bard": ASSISTANT, "system": "system"}
MIN_TOKENS = 3  # a feature, the token after it and the feature that is predicted

Message = dict[str, str]
Ids = NDArray[np.int32]


@dataclass
class Counts:
    """What became of the conversations of a file."""

    read: int = 0
    without_answer: int = 0
    beyond_limit: int = 0
    rewritten: int = 0

    @property
    def used(self) -> int:
        """Conversations that are trained on."""
        return self.read - self.without_answer - self.beyond_limit - self.rewritten

    def __str__(self) -> str:
        return (
            f"{self.read} conversations read, {self.used} used; dropped {self.without_answer} without an assistant "
            f"turn, {self.beyond_limit} whose answer begins beyond the length limit, {self.rewritten} whose earlier "
            "turns the chat template rewrites"
        )


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


def sharegpt_conversations(file: Path) -> Iterator[tuple[str, list[Message]]]:
    """(where it stands, messages) for each record of ShareGPT JSON: one array, or a record a line (.jsonl)."""
    if file.suffix in (".jsonl", ".xz"):
        found = ((f"line {number}", record) for number, record in numbered_records(file))
    else:
        found = ((f"record {number}", record) for number, record in enumerate(json_array(file), 1))
    for place, record in found:
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list):
            raise CorpusError(f"{file}, {place}: no list 'conversations', which a ShareGPT record has")
        messages: list[Message] = []
        for turn in turns:
            sender, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
            if sender not in SHAREGPT_ROLES or not isinstance(text, str):
                raise CorpusError(
                    f"{file}, {place}: a turn needs 'from', one of {', '.join(SHAREGPT_ROLES)}, and a text 'value'; "
                    f"given is {json.dumps(turn)[:80]}"
                )
            messages.append({"role": SHAREGPT_ROLES[sender], "content": text})
        yield place, messages


def openai_conversations(file: Path) -> Iterator[tuple[str, list[Message]]]:
    """(where it stands, messages) for each line of JSONL with OpenAI's ``messages``."""
    for number, record in numbered_records(file):
        messages: Any = record.get("messages") if isinstance(record, dict) else None
        if not isinstance(messages, list) or not all(map(is_message, messages)):
            raise CorpusError(f"{file}, line {number}: no list 'messages' of objects with a text 'role' and 'content'")
        yield f"line {number}", [{"role": m["role"], "content": m["content"]} for m in messages]


def is_message(value: Any) -> bool:
    """Whether it is an object with a text role and content."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def json_array(file: Path) -> list[Any]:
    """The array in a JSON file; CorpusError with the line where it is malformed."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{file}, line {error.lineno}: not JSON ({error.msg}); mend or remove the line") from error
    if not isinstance(value, list):
        raise CorpusError(f"{file} must hold a JSON array of records, not {type(value).__name__}")
    return value


READERS: dict[str, Callable[[Path], Iterator[tuple[str, list[Message]]]]] = {
    "sharegpt": sharegpt_conversations,
    "messages": openai_conversations,
}
FORMATS = (*READERS, "text")


def read_conversations(file: Path, file_format: str) -> Iterator[tuple[str, list[Message]]]:
    """(where it stands, messages) of a file in one of ``READERS``' formats. Errors: CorpusError."""
    if not file.is_file():
        raise CorpusError(f"{file} does not exist; data.conversations of the recipe names it")
    return READERS[file_format](file)


class ChatEncoder:
    """Conversations to token ids and a mask of the assistant's tokens, by the template in a tokenizer's folder."""

    def __init__(self, tokenizer_folder: Path, max_length: int) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CorpusError(f"{tokenizer_folder} has no tokenizer that can be read: {error}") from error
        self.max_length = max_length
        self.counts = Counts()

    def encode(self, place: str, messages: list[Message]) -> tuple[Ids, NDArray[np.bool_]] | None:
        """Ids and mask of one conversation, cut at the limit; None (and counted) where nothing could be learnt."""
        self.counts.read += 1
        if not any(message["role"] == ASSISTANT for message in messages):
            self.counts.without_answer += 1
            return None
        text = self.render(place, messages)
        spans = self.answer_spans(place, messages, text)
        if spans is None:
            self.counts.rewritten += 1
            return None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"][: self.max_length], dtype=np.int32)
        mask = np.zeros(len(ids), dtype=np.bool_)
        for i, (start, end) in enumerate(encoded["offset_mapping"][: self.max_length]):
            mask[i] = any(first <= start and end <= last for first, last in spans)
        if len(ids) < MIN_TOKENS or not mask[:-1].any():
            self.counts.beyond_limit += 1
            return None
        return ids, mask

    def answer_spans(self, place: str, messages: list[Message], text: str) -> list[tuple[int, int]] | None:
        """Where in the rendered text each answer begins and ends; None if the template rewrites what came before."""
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self.render(place, messages[:i], add_generation_prompt=True)
            with_answer = self.render(place, messages[: i + 1])
            if not (with_answer.startswith(before) and text.startswith(with_answer)):
                return None
            spans.append((len(before), len(with_answer)))
        return spans

    def render(self, place: str, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The template's text; transformers renders it in a sandbox."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise CorpusError(f"{place}: the target's chat template refuses the conversation: {error}") from error
        return text

    def windows(self, text: str) -> list[tuple[Ids, NDArray[np.bool_]]]:
        """Plain text in consecutive pieces of at most the limit; every token counts."""
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        return [(piece, np.ones(len(piece), dtype=np.bool_)) for piece in pieces if len(piece) >= MIN_TOKENS]


def read_text(file: Path) -> str:
    """Plain text. Errors: CorpusError where there is no such file, or it is not UTF-8."""
    if not file.is_file():
        raise CorpusError(f"{file} does not exist; data.conversations of the recipe names it")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file} is not UTF-8: {error}") from error


def load_samples(
    file: Path, file_format: str, tokenizer_folder: Path, max_length: int, held_out_share: float, seed: int
) -> tuple[TokenSamples, TokenSamples | None]:
    """(training samples, held-out samples or None) of a data file, shuffled with the seed.

    Errors: CorpusError naming file and line for what is missing, malformed or empty, and where every conversation had
    to be dropped.
    """
    if file_format not in FORMATS:
        raise CorpusError(f"data.format is {file_format!r}; allowed are {', '.join(FORMATS)}")
    encoder = ChatEncoder(tokenizer_folder, max_length)
    if file_format == "text":
        samples = encoder.windows(read_text(file))
    else:
        found = read_conversations(file, file_format)
        encoded = (encoder.encode(f"{file}, {place}", messages) for place, messages in found)
        samples = [sample for sample in encoded if sample is not None]
        logger.info("%s: %s", file, encoder.counts)
    if not samples:
        raise CorpusError(
            f"{file} gives nothing to train on: {encoder.counts if encoder.counts.read else 'it is empty'}"
        )
    random.Random(seed).shuffle(samples)
    num_held_out = min(int(len(samples) * held_out_share), len(samples) - 1)
    held_out = samples[len(samples) - num_held_out :]
    return TokenSamples(samples[: len(samples) - num_held_out]), TokenSamples(held_out) if held_out else None
