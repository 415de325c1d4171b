"""The target answers the conversations a drafter learns from, instead of whoever wrote the data.

A drafter predicts the target, so what the target itself would say is the better text (EAGLE-3, arXiv 2503.01840, trains
on answers written that way). Several conversations run at once through the engine, turn by turn: every answer is part
of the next prompt. Each finished conversation is one line of a JSONL file in the ``messages`` form, so a run that was
cut short goes on behind its last whole line, and the file serves as data of its own.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from drafters.train.records import ASSISTANT, Message
from kernels.training.heartbeat import Heartbeat
from server.engine.completion import Completion, Completions, step
from server.engine.engine import Engine
from server.engine.request import EngineError, FinishReason, Request, SamplingParams
from server.text import TextCodec

SEED_STRIDE = 1_000_003  # conversations draw different numbers at the same position


class AnswersError(ValueError):
    """A file of answers is of other questions or another target, is damaged, or cannot be written."""


@dataclass(frozen=True)
class Writing:
    """How the target writes, kept beside every conversation so that a file cannot mix two ways of it.

    target: the fingerprint of its weights; max_tokens: of one answer; length: tokens of a whole conversation;
    temperature: 0 is greedy, otherwise every answer has its own ``seed``, derived from this one.
    """

    target: str
    max_tokens: int
    length: int
    temperature: float
    seed: int


@dataclass
class Talk:
    """One conversation on its way: the questions still to be put, each of one or more messages, and what was said."""

    number: int
    questions: deque[list[Message]]
    messages: list[Message] = field(default_factory=list)
    num_answers: int = 0


def questions_of(messages: Sequence[Message]) -> list[list[Message]]:
    """What is said up to each answer, the answers left out: runs of messages that end with one of the user's."""
    questions: list[list[Message]] = []
    run: list[Message] = []
    for i, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            continue
        run.append(message)
        is_last = i + 1 == len(messages) or messages[i + 1]["role"] == ASSISTANT
        if message["role"] == "user" and is_last:
            questions.append(run)
            run = []
    return questions


class AnswersFile:
    """The JSONL file: what it holds already, and the way to add to it."""

    def __init__(self, file: Path, writing: Writing, questions: Sequence[list[list[Message]]]) -> None:
        self.file = file
        self.writing = writing
        self.questions = questions

    def is_complete(self) -> bool:
        """Whether every conversation is there, in the order of the data."""
        return self.file.is_file() and list(self.read()) == list(range(len(self.questions)))

    def read(self) -> dict[int, dict[str, Any]]:
        """Records by conversation, in file order; an unfinished last line is passed over.

        Errors: AnswersError naming the line that is malformed, or what the answers are of instead.
        """
        records: dict[int, dict[str, Any]] = {}
        content = self.file.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
            try:
                record = json.loads(line)
                index, wrote, messages = record["conversation"], record["writing"], record["messages"]
            except (ValueError, KeyError, TypeError) as error:
                raise AnswersError(f"{self.file}, line {number}: no written conversation ({error!r})") from error
            self.check(number, index, wrote, messages)
            records[index] = record
        return records

    def check(self, line: int, index: int, wrote: dict[str, Any], messages: list[Message]) -> None:
        """Refuse a record of another target, another way of writing or other questions."""
        wanted = vars(self.writing)
        differing = [name for name in wanted if wrote.get(name) != wanted[name]]
        if differing:
            name = differing[0]
            raise AnswersError(
                f"{self.file}, line {line} was written with another {name}: {wrote.get(name)!r} there, "
                f"{wanted[name]!r} asked for; name another file for data.answers"
            )
        known = self.questions[index] if 0 <= index < len(self.questions) else []
        asked = [message for question in known for message in question]
        said = [message for message in messages if message["role"] != ASSISTANT]
        if (not known and messages) or said != asked[: len(said)]:
            raise AnswersError(
                f"{self.file}, line {line} answers other questions than conversation {index + 1} of the data asks; "
                "name another file for data.answers"
            )

    def drop_unfinished_line(self) -> None:
        """Cut off what a killed run left behind the last whole line."""
        if self.file.is_file():
            with self.file.open("r+b") as stream:
                content = stream.read()
                stream.truncate(content.rfind(b"\n") + 1)

    def add(self, stream: TextIO, talk: Talk) -> None:
        """Append one conversation, whole or not at all as far as a reader is concerned."""
        stream.write(json.dumps(self.record(talk.number, talk.messages), ensure_ascii=False) + "\n")
        stream.flush()

    def record(self, number: int, messages: list[Message]) -> dict[str, Any]:
        """One line."""
        return {"messages": messages, "conversation": number, "writing": vars(self.writing)}

    def sort(self) -> None:
        """Put the lines in the order of the data, so that what is trained on does not depend on who finished first."""
        records = self.read()
        if list(records) != sorted(records):
            sorted_file = self.file.with_suffix(".sorted")
            lines = (json.dumps(records[number], ensure_ascii=False) + "\n" for number in sorted(records))
            sorted_file.write_text("".join(lines), encoding="utf-8")
            sorted_file.replace(self.file)


def write_answers(engine: Engine, codec: TextCodec, answers: AnswersFile, console: Console | None = None) -> None:
    """Answer every conversation that is not in the file yet. Errors: AnswersError, EngineError, ChatTemplateError."""
    answers.file.parent.mkdir(parents=True, exist_ok=True)
    answers.drop_unfinished_line()
    done = set(answers.read()) if answers.file.is_file() else set()
    talks = [Talk(i, deque(q)) for i, q in enumerate(answers.questions) if i not in done]
    console = console or Console(stderr=True)
    bar = Progress(
        TextColumn("writing answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    written = len(done)
    try:
        total = len(answers.questions)
        beat = Heartbeat("writing answers", total, written, enabled=not console.is_terminal)
        with bar, beat, answers.file.open("a", encoding="utf-8") as stream:
            task = bar.add_task("", total=total, completed=written)
            for talk in answered(engine, codec, answers.writing, talks):
                answers.add(stream, talk)
                written += 1
                bar.update(task, completed=written)
                beat.done = written
        answers.sort()
    except OSError as error:
        raise AnswersError(
            f"{answers.file} could not be written ({error}); {written} conversations are in it, and the same command "
            "goes on from there once there is room"
        ) from error


def answered(engine: Engine, codec: TextCodec, writing: Writing, talks: Sequence[Talk]) -> Iterator[Talk]:
    """The conversations as they end: all questions answered, or no room for more within ``writing.length``."""
    waiting, talk_of, completions = deque(talks), dict[str, Talk](), Completions()

    def ask(talk: Talk) -> bool:
        """Put the talk's next question to the engine, where it has one and there is room."""
        request = next_request(talk, codec, writing)
        if request is not None:
            talk_of[request.request_id] = talk
            completions.add(Completion(request))
            engine.submit(request)
        return request is not None

    while True:
        while waiting and completions.num_open < engine.options.max_seqs:
            talk = waiting.popleft()
            if not ask(talk):
                yield talk
        if not completions.num_open:
            return
        for completion in step(engine, completions):
            talk = talk_of.pop(completion.request.request_id)
            take_answer(talk, codec, completion)
            if completion.finished.reason is not FinishReason.STOP or not ask(talk):
                yield talk


def next_request(talk: Talk, codec: TextCodec, writing: Writing) -> Request | None:
    """Put the next question; None where there is none, or no room for an answer to it."""
    if not talk.questions:
        return None
    asked = [*talk.messages, *talk.questions[0]]
    prompt_ids = codec.chat(asked)
    room = min(writing.max_tokens, writing.length - len(prompt_ids))
    if room < 1:
        return None
    talk.questions.popleft()
    talk.messages = asked
    sampling = SamplingParams(temperature=writing.temperature, seed=writing.seed + SEED_STRIDE * talk.number)
    name = f"{talk.number}.{talk.num_answers}"
    return Request(name, prompt_ids, room, sampling, codec.stop_ids, choice=talk.num_answers)


def take_answer(talk: Talk, codec: TextCodec, answer: Completion) -> None:
    """The finished answer becomes a message; one that was cut off is kept as far as it goes. Errors: EngineError."""
    answer.check()
    if answer.finished.reason is FinishReason.CANCELLED:
        raise EngineError(f"conversation {talk.number + 1} ended without an answer: it was cancelled")
    talk.messages.append({"role": ASSISTANT, "content": codec.decode(answer.token_ids)})
    talk.num_answers += 1
