"""The target writes the answers: what it says is its own text, and a file of answers is resumed or refused."""

import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from doubles import save_word_tokenizer, tiny_llama
from server.answers import AnswersError, AnswersFile, Writing, questions_of, write_answers
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import EngineError, Request, SamplingParams
from server.targets.torch_target import TorchTarget
from server.text import TextCodec

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
LENGTH = 40
TALKS = [
    [("user", "word3 word4"), ("assistant", "word5"), ("user", "word6"), ("assistant", "word7")],
    [("system", "word9"), ("assistant", "word8"), ("user", "word1"), ("user", "word2")],
    [("user", "word11 word12 word13")],
    [("assistant", "word1")],
    [("user", "word20 " * 36), ("assistant", "word1"), ("user", "word21"), ("assistant", "word2")],
]


def messages(talk: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


QUESTIONS = [questions_of(messages(talk)) for talk in TALKS]


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    folder = save_model(tiny_llama(), "answering")
    save_word_tokenizer(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5, 9, 17, 33, 60]}))
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> TextCodec:
    return TextCodec.from_folder(folder)


@pytest.fixture(scope="module")
def target(folder: Path) -> TorchTarget:
    return TorchTarget.load(folder, "fp32", num_slots=3, capacity=LENGTH + 1)


@pytest.fixture
def engine(target: TorchTarget) -> Engine:
    return Engine(target, None, EngineOptions(3, LENGTH))


def writing(**changes: Any) -> Writing:
    return Writing(**{"target": "tiny:1", "max_tokens": 6, "length": LENGTH, "temperature": 0.0, "seed": 0} | changes)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_questions_are_what_is_said_up_to_each_answer() -> None:
    contents = [[[m["content"] for m in question] for question in questions] for questions in QUESTIONS]
    assert contents[:4] == [[["word3 word4"], ["word6"]], [["word9", "word1", "word2"]], [["word11 word12 word13"]], []]


def test_answers_are_the_targets_own(engine: Engine, codec: TextCodec, tmp_path: Path) -> None:
    answers = AnswersFile(tmp_path / "run" / "answers.jsonl", writing(), QUESTIONS)
    screen = StringIO()
    write_answers(engine, codec, answers, Console(file=screen, force_terminal=True, width=100))
    assert "5/5" in screen.getvalue()
    assert answers.is_complete()
    records = lines_of(answers.file)
    assert [record["conversation"] for record in records] == list(range(5))
    for record in records[:3]:
        for i, message in enumerate(record["messages"]):
            if message["role"] == "assistant":
                request = Request(
                    "r", codec.chat(record["messages"][:i]), 6, SamplingParams(temperature=0), codec.stop_ids
                )
                said = generate(Engine(engine.target, None, EngineOptions(3, LENGTH)), [request])["r"]
                assert message["content"] == codec.decode(said.token_ids)
    assert records[3]["messages"] == []
    assert records[4]["messages"][0]["role"] == "user"
    assert len(records[4]["messages"]) == 2  # no room for the second question


def test_a_run_that_was_cut_short_goes_on_and_ends_the_same(
    engine: Engine, codec: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = writing(temperature=1.0, seed=3)
    whole = AnswersFile(tmp_path / "whole.jsonl", sampled, QUESTIONS)
    write_answers(engine, codec, whole)
    lines = whole.file.read_bytes().splitlines(keepends=True)
    part = AnswersFile(tmp_path / "part.jsonl", sampled, QUESTIONS)
    part.file.write_bytes(lines[2] + lines[0] + lines[1][:30])
    assert list(part.read()) == [2, 0]
    assert not part.is_complete()
    write_answers(engine, codec, part)
    assert part.file.read_bytes() == whole.file.read_bytes()
    greedy = AnswersFile(tmp_path / "greedy.jsonl", writing(), QUESTIONS)
    write_answers(engine, codec, greedy)
    assert [r["messages"] for r in lines_of(greedy.file)] != [r["messages"] for r in lines_of(whole.file)]


def test_a_full_disk_keeps_what_is_written(
    engine: Engine, codec: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = AnswersFile(tmp_path / "answers.jsonl", writing(), QUESTIONS)
    add, added = AnswersFile.add, []

    def add_until_full(self: AnswersFile, stream: Any, talk: Any) -> None:
        if len(added) == 2:
            stream.write('{"messages": [')
            raise OSError(28, "No space left on device")
        added.append(talk.number)
        add(self, stream, talk)

    monkeypatch.setattr(AnswersFile, "add", add_until_full)
    with pytest.raises(AnswersError, match=r"No space left.*2 conversations are in it.*goes on from there"):
        write_answers(engine, codec, answers)
    monkeypatch.undo()
    assert sorted(answers.read()) == sorted(added)
    for name in list(engine.scheduler.running):
        engine.cancel(name)
    write_answers(engine, codec, answers)
    assert answers.is_complete()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target": "other:2"}, "line 1 was written with another target: 'tiny:1' there, 'other:2' asked for"),
        ({"temperature": 0.7}, "another temperature: 0.0 there, 0.7"),
        ({"max_tokens": 9}, "another max_tokens"),
    ],
)
def test_answers_written_otherwise_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    answers = AnswersFile(tmp_path / "answers.jsonl", writing(), QUESTIONS)
    answers.file.write_text(json.dumps(answers.record(0, QUESTIONS[0][0])) + "\n")
    assert not answers.is_complete()
    before = answers.file.read_bytes()
    with pytest.raises(AnswersError, match=named):
        AnswersFile(answers.file, writing(**changes), QUESTIONS).read()
    assert answers.file.read_bytes() == before


def test_answers_to_other_questions_and_damaged_lines_are_refused(tmp_path: Path) -> None:
    answers = AnswersFile(tmp_path / "answers.jsonl", writing(), QUESTIONS)
    line = json.dumps(answers.record(0, QUESTIONS[0][0])) + "\n"
    answers.file.write_text(line)
    with pytest.raises(AnswersError, match="line 1 answers other questions than conversation 1"):
        AnswersFile(answers.file, writing(), QUESTIONS[1:]).read()
    answers.file.write_text(line + "oops\n" + line)
    with pytest.raises(AnswersError, match=r"answers\.jsonl, line 2: no written conversation"):
        answers.read()


def test_a_failing_target_ends_the_writing(
    engine: Engine, codec: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(chunk: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.target, "prefill", fail)
    with pytest.raises(EngineError, match="RuntimeError: out of memory"):
        write_answers(engine, codec, AnswersFile(tmp_path / "answers.jsonl", writing(), QUESTIONS))
