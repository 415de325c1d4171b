"""Files of conversations: ShareGPT and OpenAI's messages, record by record; a bad record is told, not raised.

Whoever reads names and counts what is bad and goes on with the rest. Keys that hold words or say what to learn are
honoured, keys that only describe a record are passed over, and a record with any other key is bad: what it means might
change the words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafters.train.corpus import CorpusError, numbered_records, read_text

ASSISTANT, USER, SYSTEM, TOOL = "assistant", "user", "system", "tool"
ROLES = (SYSTEM, "developer", USER, ASSISTANT, TOOL)
SHAREGPT_ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "assistant": ASSISTANT}
SHAREGPT_ROLES |= {"bing": ASSISTANT, "bard": ASSISTANT, "model": ASSISTANT, "system": SYSTEM}
SHAREGPT_ROLES |= {"tool": TOOL, "observation": TOOL, "function": TOOL, "function_response": TOOL}
FUNCTION_CALL = "function_call"
REASONING = ("reasoning_content", "reasoning", "thinking")
DESCRIPTIVE = frozenset(
    {
        "id", "idx", "index", "uuid", "hash", "conversation_id", "source", "origin", "dataset", "category", "topic",
        "title", "language", "lang", "model", "score", "scores", "quality", "rating", "timestamp", "date", "metadata",
        "meta", "tags", "license", "split", "num_turns", "turn", "redacted", "toxic", "openai_moderation",
        "conversation", "writing",
    }
)  # fmt: skip

Message = dict[str, Any]


class RecordError(CorpusError):
    """One record cannot be trained on; the message says why, whoever reads says where it stands."""


@dataclass(frozen=True)
class Conversation:
    """messages: as a chat template takes them; tools: what may be called, or None; context: indices of the answers that
    are read and not learnt."""

    messages: list[Message]
    tools: list[Any] | None = None
    context: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """Indices of the messages to learn."""
        return [i for i, m in enumerate(self.messages) if m["role"] == ASSISTANT and i not in self.context]


Record = tuple[str, Conversation | CorpusError]
"""(where it stands, what stands there or why it cannot be used)."""


def read_conversations(file: Path, file_format: str) -> Iterator[Record]:
    """The records of a file in one of ``READERS``' formats, in order. Errors: CorpusError for the file as a whole."""
    if not file.is_file():
        raise CorpusError(f"{file} does not exist; data.conversations of the recipe names it")
    reader = READERS[file_format]
    for place, value in json_values(file, is_array=file_format == "sharegpt" and file.suffix not in (".jsonl", ".xz")):
        if isinstance(value, CorpusError):
            yield place, value
            continue
        try:
            yield place, reader(whole_characters(value))
        except RecordError as error:
            yield place, RecordError(f"{file}, {place}: {error}")


def json_values(file: Path, *, is_array: bool) -> Iterator[tuple[str, Any]]:
    """(place, JSON value or the CorpusError of its line) of an array's entries, or of every line."""
    if is_array:
        yield from ((f"record {number}", value) for number, value in enumerate(json_array(file), 1))
    else:
        yield from ((f"line {number}", value) for number, value in numbered_records(file))


def json_array(file: Path) -> list[Any]:
    """The array in a JSON file; CorpusError with the line where it is malformed."""
    try:
        value = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{file}, line {error.lineno}: not JSON ({error.msg}); mend or remove the line") from error
    except RecursionError as error:
        raise CorpusError(f"{file} is nested too deep to be conversations") from error
    if not isinstance(value, list):
        raise CorpusError(f"{file} must hold a JSON array of records, not {type(value).__name__}")
    return value


def whole_characters(value: Any) -> Any:
    """The same JSON value with U+FFFD for every half of a surrogate pair, which no tokenizer takes."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {whole_characters(name): whole_characters(inner) for name, inner in value.items()}
    return [whole_characters(inner) for inner in value] if isinstance(value, list) else value


def sharegpt(record: Any) -> Conversation:
    """A record of ShareGPT: ``conversations`` of ``from`` and ``value``; ``system`` and ``tools`` beside them."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        raise RecordError("no list 'conversations', which a ShareGPT record has")
    check_keys("the record", record, {"conversations", "system", "tools"} | DESCRIPTIVE)
    messages: list[Message] = []
    if system := record.get("system"):
        if not isinstance(system, str):
            raise RecordError(f"'system' must be text; given is {shown(system)}")
        messages.append({"role": SYSTEM, "content": system})
    return conversation(messages + [sharegpt_message(turn) for turn in turns], record.get("tools"))


def sharegpt_message(turn: Any) -> Message:
    """One turn in OpenAI's words."""
    sender, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if sender not in (*SHAREGPT_ROLES, FUNCTION_CALL) or not isinstance(text, str):
        raise RecordError(
            f"a turn needs 'from', one of {', '.join((*SHAREGPT_ROLES, FUNCTION_CALL))}, and a text 'value'; "
            f"given is {shown(turn)}"
        )
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if sender != FUNCTION_CALL:
        return {"role": SHAREGPT_ROLES[sender], "content": text, **others}
    call = json_text("a function call", text)
    return {"role": ASSISTANT, "content": "", "tool_calls": [{"type": "function", "function": call}], **others}


def openai_messages(record: Any) -> Conversation:
    """A record of OpenAI's fine-tuning: ``messages`` of ``role`` and ``content``, and ``tools``."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and any(name in message for name in ("content", "tool_calls", *REASONING))
        for message in messages
    ):
        raise RecordError("no list 'messages' of objects with a text 'role' and 'content'")
    check_keys("the record", record, {"messages", "tools"} | DESCRIPTIVE)
    return conversation(messages, record.get("tools"))


READERS: dict[str, Callable[[Any], Conversation]] = {"sharegpt": sharegpt, "messages": openai_messages}


def conversation(messages: list[Message], tools: Any) -> Conversation:
    """Checked messages; answers before anybody has spoken are left out, as EAGLE's and FastChat's scripts do."""
    if isinstance(tools, str):
        tools = json_text("'tools'", tools) if tools else None
    if tools is not None and not isinstance(tools, list):
        raise RecordError(f"'tools' must be a list; given is {shown(tools)}")
    first = next((i for i, message in enumerate(messages) if message["role"] in (USER, TOOL)), len(messages))
    kept = [m for i, m in enumerate(messages) if i > first or m["role"] != ASSISTANT]
    if any(m["role"] == SYSTEM for m in kept[1:]) and kept[0]["role"] == SYSTEM:
        raise RecordError("it has two system texts, and only one can come first")
    context = frozenset(i for i, message in enumerate(kept) if learning_weight(message) == 0)
    return Conversation([plain_message(message) for message in kept], tools or None, context)


def learning_weight(message: Mapping[str, Any]) -> int:
    """OpenAI's ``weight`` of an answer: 1 is learnt, 0 is context."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise RecordError(f"the weight of a message is {shown(weight)}; allowed are 0 and 1")
    return 1 if weight is None else int(weight)


def plain_message(message: Message) -> Message:
    """What a chat template is given: role, words, calls and reasoning; nulls are left out."""
    given = {name: value for name, value in message.items() if value is not None and value != [] and name != "weight"}
    role = given.get("role")
    if role not in ROLES:
        raise RecordError(f"the role of a message is {shown(role)}; allowed are {', '.join(ROLES)}")
    check_keys("a message", given, {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING})
    given["content"] = text_of(given.get("content", ""))
    calls = given.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RecordError(f"'tool_calls' must be a list of objects; given is {shown(calls)}")
    for name in ("name", "tool_call_id", *REASONING):
        if not isinstance(given.get(name, ""), str):
            raise RecordError(f"'{name}' must be text; given is {shown(given[name])}")
    if role == ASSISTANT and not any(given.get(name) for name in ("content", "tool_calls", *REASONING)):
        raise RecordError("an answer has no words and no calls")
    return given


def text_of(content: Any) -> str:
    """A message's content: text, or a list of text parts."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise RecordError(f"'content' must be text or a list of text parts; given is {shown(content)}")
    return "".join(part["text"] for part in parts)


def check_keys(what: str, given: Mapping[str, Any], known: set[str] | frozenset[str]) -> None:
    """Refuse a key that might change the words; one without a value says nothing."""
    unknown = sorted(name for name, value in given.items() if name not in known and value not in (None, [], {}, ""))
    if unknown:
        raise RecordError(f"{what} has {unknown[0]!r}, which is not known here; remove it where it changes nothing")


def json_text(what: str, text: str) -> Any:
    """A JSON value that stands in a text."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecordError(f"{what} is not JSON: {shown(text)}") from error


def shown(value: Any) -> str:
    """The beginning of a JSON value."""
    return json.dumps(value)[:80]
