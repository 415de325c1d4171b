"""Training samples from conversations: the mask is the assistant's words, whatever the template; faults are located."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from drafters.train.conversations import load_samples, pad_batch
from drafters.train.corpus import CorpusError
from drafters.train.feature_source import DataOptions
from kernels.training import RecipeError
from server.text import TextCodec

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "{% endfor %}"
)
FORGETFUL = "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TALK = [("user", "Hi <|end|>?"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Bye, gpt: [/INST]")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    return use_template(tmp_path / "model", CHATML)


def use_template(folder: Path, template: str) -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_messages(file: Path, *talks: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) for talk in talks]
    file.write_text("\n".join(lines) + "\n")
    return file


def load(file: Path, folder: Path, file_format: str = "messages", length: int = 500, share: float = 0.0) -> Any:
    return load_samples(file, file_format, TextCodec.from_folder(folder), length, share, seed=3)


def counted_text(folder: Path, sample: dict[str, torch.Tensor]) -> list[str]:
    """The runs of characters whose tokens count; the tokenizer has one token a byte."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    runs, ids = [], []
    for token_id, counts in zip(sample["input_ids"].tolist(), [*sample["loss_mask"].tolist()], strict=True):
        if counts:
            ids.append(token_id)
        elif ids:
            runs.append(tokenizer.decode(ids))
            ids = []
    return [*runs, tokenizer.decode(ids)] if ids else runs


@pytest.mark.parametrize(
    ("template", "answers"),
    [(CHATML, ["Hello.<|end|>", "Bye, gpt: [/INST]<|end|>"]), (BRACKETS, [" Hello. </s>", " Bye, gpt: [/INST] </s>"])],
    ids=["chatml", "brackets"],
)
def test_the_mask_is_what_the_template_adds_for_an_answer(
    folder: Path, tmp_path: Path, template: str, answers: list[str]
) -> None:
    use_template(folder, template)
    train, held_out = load(write_messages(tmp_path / "data.jsonl", TALK), folder)
    assert held_out is None
    assert counted_text(folder, train[0]) == answers


def test_a_folder_gives_the_samples_of_its_codec(folder: Path, tmp_path: Path) -> None:
    file = write_messages(tmp_path / "data.jsonl", TALK, TALK[:2])
    own, served = load_samples(file, "messages", folder, 500, 0.0, seed=3)[0], load(file, folder)[0]
    assert len(own) == len(served) == 2
    for got, want in zip(own, served, strict=True):
        assert all(torch.equal(got[key], want[key]) for key in want)
    use_template(folder, BRACKETS)
    with pytest.raises(CorpusError, match="no system"):
        load_samples(write_messages(file, [("system", "x"), *TALK]), "messages", folder, 500, 0.0, seed=3)
    with pytest.raises(CorpusError, match="holds no tokenizer"):
        load_samples(file, "messages", tmp_path, 500, 0.0, seed=3)


def test_sharegpt_arrays_and_lines_equal_messages(folder: Path, tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    record = {"id": "x", "conversations": [{"from": names[r], "value": c} for r, c in TALK]}
    (tmp_path / "a.json").write_text(json.dumps([record], indent=1))
    (tmp_path / "b.jsonl").write_text(json.dumps(record))
    want = load(write_messages(tmp_path / "c.jsonl", TALK), folder)[0][0]
    for name in ("a.json", "b.jsonl"):
        got = load(tmp_path / name, folder, "sharegpt")[0][0]
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_truncation_shuffling_and_the_held_out_part(folder: Path, tmp_path: Path) -> None:
    talks = [[("user", "q"), ("assistant", f"answer {i:02}")] for i in range(20)]
    file = write_messages(tmp_path / "data.jsonl", *talks)
    (train, held_out), (again, _) = load(file, folder, length=38, share=0.2), load(file, folder, length=38, share=0.2)
    assert (len(train), len(held_out)) == (16, 4)
    texts = [
        counted_text(folder, sample)[0] for part in (train, held_out) for sample in (part[i] for i in range(len(part)))
    ]
    assert sorted(texts) == [f"answer {i:02}" for i in range(20)] != texts  # the end of the turn is cut off
    assert all(torch.equal(train[i]["input_ids"], again[i]["input_ids"]) for i in range(16))


def test_dropped_conversations_are_counted(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent, late = [("user", "anyone?")], [("user", "x" * 80), ("assistant", "yes")]
    with caplog.at_level(logging.INFO):
        train, _ = load(write_messages(tmp_path / "d.jsonl", silent, TALK, late, silent), folder, length=60)
    assert len(train) == 1
    assert "4 conversations read, 1 used; dropped 2 without an assistant turn, 1 whose answer begins" in caplog.text
    with pytest.raises(CorpusError, match="nothing to train on: 2 conversations read, 0 used; dropped 2 without"):
        load(write_messages(tmp_path / "d.jsonl", silent, silent), folder)
    use_template(folder, FORGETFUL)
    with pytest.raises(CorpusError, match="1 whose earlier turns the chat template rewrites"):
        load(write_messages(tmp_path / "d.jsonl", TALK), folder)


@pytest.mark.parametrize(
    ("name", "file_format", "text", "named"),
    [
        ("a.jsonl", "messages", "", "it is empty"),
        ("a.jsonl", "messages", '{"messages": []}\n\n{oops', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", "messages", '\n{"text": 1}', r"a\.jsonl, line 2: no list 'messages'"),
        ("a.jsonl", "messages", '{"messages": [{"role": "user"}]}', "line 1: no list 'messages' of objects"),
        ("a.json", "sharegpt", '[\n{"conversations": []},\n{]', r"a\.json, line 3: not JSON"),
        ("a.json", "sharegpt", "{}", "must hold a JSON array"),
        ("a.json", "sharegpt", "[{}]", "record 1: no list 'conversations'"),
        ("a.json", "sharegpt", '[{"conversations": [{"from": "cat", "value": "m"}]}]', "record 1.*human.*cat"),
        ("a.txt", "text", "", "it is empty"),
        ("a.txt", "csv", "x", "'csv'; allowed are sharegpt, messages, text"),
    ],
)
def test_malformed_files_are_refused_with_the_place(
    folder: Path, tmp_path: Path, name: str, file_format: str, text: str, named: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=named):
        load(tmp_path / name, folder, file_format)


CALL = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]
WORDY = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content }}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments }}){% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def said(sender: str, value: str, **more: Any) -> dict[str, Any]:
    return {"from": sender, "value": value} | more


ASKED, TOLD = turn("user", "so?"), turn("assistant", "yes")
HONOURED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "calls": (
        {"messages": [ASKED, turn("assistant", None, tool_calls=CALL), turn("tool", "sun", tool_call_id="1"), TOLD]},
        ['(weather {"city": "Paris"})<|end|>', "yes<|end|>"], "<|tool|>sun<|end|>",
    ),
    "tools": ({"messages": [ASKED, TOLD], "tools": CALL}, ["yes<|end|>"], '[[{"type": "function"'),
    "reasoning": ({"messages": [ASKED, turn("assistant", "four", reasoning="2+2:")]}, ["2+2:four<|end|>"], "so?"),
    "weights": ({"messages": [ASKED, turn("assistant", "bad", weight=0), ASKED, TOLD | {"weight": 1}]},
        ["yes<|end|>"], "<|assistant|>bad<|end|>"),
    "text parts": ({"messages": [turn("user", [{"type": "text", "text": "a"}, {"text": "b"}]), TOLD]},
        ["yes<|end|>"], "<|user|>ab<|end|>"),
    "lone surrogate": ({"messages": [turn("user", "hi \ud83d!"), TOLD], "id": 7}, ["yes<|end|>"], "hi \ufffd!"),
    "begins with the model": (
        {"conversations": [said("gpt", "Welcome!"), said("human", "so?"), said("gpt", "yes")]}, ["yes<|end|>"], "so?"
    ),
    "system beside": (
        {"system": "Be terse.", "conversations": [said("human", "so?"), said("gpt", "yes")]},
        ["yes<|end|>"], "<|system|>Be terse.<|end|><|user|>",
    ),
    "shared calls": (
        {"tools": "[{\"name\": \"w\"}]", "conversations": [
            said("human", "so?"), said("function_call", '{"name": "w", "arguments": {"x": 1}}'),
            said("observation", "sun"), said("gpt", "yes", weight=1),
        ]},
        ["(w {'x': 1})<|end|>", "yes<|end|>"], "<|tool|>sun<|end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "answers", "read"), HONOURED.values(), ids=HONOURED)
def test_what_a_record_says_reaches_the_template(
    folder: Path, tmp_path: Path, record: dict[str, Any], answers: list[str], read: str
) -> None:
    use_template(folder, WORDY)
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    train, _ = load(tmp_path / "a.jsonl", folder, "messages" if "messages" in record else "sharegpt")
    assert counted_text(folder, train[0]) == answers
    whole = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(train[0]["input_ids"].tolist())
    assert read in whole
    assert "Welcome" not in whole


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [ASKED, turn("assistant", "")]}, "an answer has no words"),
    ({"messages": [ASKED, turn("assistant", None)]}, "an answer has no words"),
    ({"messages": [ASKED, TOLD | {"weight": 0.5}]}, "the weight of a message is 0.5; allowed are 0 and 1"),
    ({"messages": [ASKED, TOLD | {"function_call": {"name": "f"}}]}, "'function_call', which is not known"),
    ({"messages": [ASKED, TOLD], "chat_template_kwargs": {"x": 1}}, "'chat_template_kwargs', which is not known"),
    ({"messages": [turn("user", [{"type": "image_url"}]), TOLD]}, "a list of text parts"),
    ({"messages": [turn("cat", "m"), TOLD]}, "the role of a message is"),
    ({"messages": [ASKED, TOLD], "tools": {"a": 1}}, "'tools' must be a list"),
    ({"conversations": [said("human", "q"), said("function_call", "{x")]}, "a function call is not JSON"),
    ({"system": "a", "conversations": [said("system", "b"), said("human", "q"), said("gpt", "a")]}, "two system texts"),
    # The folder's own template writes neither calls nor tools nor reasoning.
    ({"messages": [ASKED, turn("assistant", None, tool_calls=CALL)]}, "no place for the call of 'weather'"),
    ({"messages": [ASKED, turn("assistant", "", thinking="2+2")]}, "no place for 'thinking', all that an answer says"),
    ({"messages": [ASKED, TOLD], "tools": CALL}, "no place for the tool 'weather'"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_one_bad_record_is_named_counted_and_passed_over(
    folder: Path, tmp_path: Path, record: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"messages": [ASKED, TOLD], "conversations": [said("human", "so?"), said("gpt", "yes")]}
    kind, name = ("messages", "messages") if "messages" in record else ("sharegpt", "conversations")
    lines = [json.dumps({name: good[name]}), json.dumps(record), "{oops", json.dumps({name: good[name]})]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    with caplog.at_level(logging.INFO):
        train, _ = load(file, folder, kind)
    assert len(train) == 2
    assert f"passed over: {file}, line 2: " in caplog.text
    assert reason in caplog.text
    assert "4 conversations read, 2 used" in caplog.text
    assert "2 bad (the first: " in caplog.text
    file.write_text(json.dumps(record))
    with pytest.raises(CorpusError, match=r"nothing to train on: 1 conversations read, 0 used.* 1 bad"):
        load(file, folder, kind)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_files_say_their_encoding_by_their_first_bytes(folder: Path, tmp_path: Path, encoding: str) -> None:
    line = json.dumps({"messages": [turn("user", "Grüße"), TOLD]}, ensure_ascii=False) + "\n"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "a.jsonl").write_bytes(mark + (line * 2).encode(encoding))
    assert len(load(tmp_path / "a.jsonl", folder)[0]) == 2
    (tmp_path / "b.json").write_bytes(mark + "[]".encode(encoding))
    with pytest.raises(CorpusError, match="it is empty"):
        load(tmp_path / "b.json", folder, "sharegpt")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_other_encodings_are_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes('["Grüße"]'.encode("latin-1"))
    kind = {".json": "sharegpt", ".txt": "text"}.get((tmp_path / name).suffix, "messages")
    with pytest.raises(CorpusError, match=rf"{name} is not UTF-8 text.*save it as UTF-8"):
        load(tmp_path / name, folder, kind)


def test_other_faults(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none\.jsonl does not exist"):
        load(tmp_path / "none.jsonl", folder)
    use_template(folder, BRACKETS)
    with pytest.raises(CorpusError, match=r"line 1: the target's chat template refuses.*no system"):
        load(write_messages(tmp_path / "s.jsonl", [("system", "be"), *TALK]), folder)
    for both in ({}, {"tokens": "a", "conversations": "b"}):
        with pytest.raises(RecipeError, match="one of tokens"):
            DataOptions("target", **both)


def test_plain_text_counts_everywhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijkl")
    train, _ = load(tmp_path / "a.txt", folder, "text", length=5)
    assert sorted(counted_text(folder, train[i])[0] for i in range(len(train))) == ["abcde", "fghij"]


def test_padding_is_zero_and_masked() -> None:
    short = {"input_ids": torch.tensor([5, 6]), "loss_mask": torch.ones(2), "features": torch.ones(2, 3)}
    long = {"input_ids": torch.tensor([7, 8, 9]), "loss_mask": torch.ones(3), "features": torch.ones(3, 3)}
    batch = pad_batch([short, long])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["loss_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["features"].shape == (2, 3, 3)
