"""Answers that must follow a schema, an expression, choices or a grammar: every spelling clients use for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from server.api.errors import ApiError, InvalidValue, shown
from server.api.language.schemas import GenerationBody
from server.api.language.tool_calls import CallFormat
from server.api.language.tools import Tool
from server.api.serving import ServedModel, Serving
from server.engine.grammar import Grammar, GrammarError, Kind
from server.text import TextCodec

MAX_SOURCE = 200_000  # characters
ANY_OBJECT = {"type": "object"}
KINDS: dict[str, Kind] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}

Wanted = tuple[str, Kind, Any]
"""The field that asks, what it asks for, and the source."""


@dataclass(frozen=True)
class Calls:
    """What an answer may call: the tools and how they are written; is_forced: it must be one call; one_call: at most
    one."""

    tools: Sequence[Tool]
    format: CallFormat
    is_forced: bool
    one_call: bool

    @property
    def is_strict(self) -> bool:
        """Whether arguments are held to a schema."""
        return any(tool.function.strict for tool in self.tools)


async def grammar_for(
    body: GenerationBody, calls: Calls | None, serving: Serving, model: ServedModel
) -> Callable[[], Grammar] | None:
    """What makes a fresh grammar for each answer, None where it is free.

    Compiles away from the event loop. Errors: InvalidValue for two wishes at once, ApiError ``invalid_json_schema``.
    """
    wishes = wanted(body) if calls is None else with_calls(wanted(body), calls, model.codec)
    if not wishes:
        return None
    if len(wishes) > 1:
        names = " and ".join(param for param, *_ in wishes)
        raise InvalidValue(wishes[1][0], f"{names} all say what the answer must look like; send one of them.")
    param, kind, source = wishes[0]
    check_source(param, kind, source)
    compiler = await asyncio.to_thread(serving.grammars, model)
    try:
        await asyncio.to_thread(compiler.compile, kind, source)
    except GrammarError as error:
        raise ApiError(400, f"{param}: {error}.", param=param, code="invalid_json_schema") from error
    return lambda: compiler.compile(kind, source)


def with_calls(wishes: list[Wanted], calls: Calls, codec: TextCodec) -> list[Wanted]:
    """The wishes where tools may be called. A call that must be made is one more; where one may be, the grammar leaves
    the choice between calls and the answer: text, or the JSON that is wished for.
    """
    if calls.is_forced:
        return [*wishes, ("tool_choice", "json_schema", calls_schema(calls.tools))]
    answers = [source for _, kind, source in wishes if kind == "json_schema"]
    if len(wishes) > len(answers) or len(answers) > 1 or not (answers or calls.is_strict):
        return wishes
    for param, kind, source in wishes:
        check_source(param, kind, source)
    return [("tools", "lark", free_calls(calls, codec, answers[0] if answers else None))]


def wanted(body: GenerationBody) -> list[Wanted]:
    """Everything in a body that constrains its answer. Errors: InvalidValue."""
    wishes = [("response_format", *found)] if (found := of_response_format(body.response_format)) else []
    plain: dict[str, Any] = {
        "guided_json": body.guided_json, "guided_regex": body.guided_regex, "guided_choice": body.guided_choice,
        "guided_grammar": body.guided_grammar, "json_schema": body.json_schema, "grammar": body.grammar or None,
    }  # fmt: skip
    wishes += [(name, KINDS[name.rpartition("_")[2]] if name != "json_schema" else "json_schema", source)
               for name, source in plain.items() if source is not None]  # fmt: skip
    for name, source in (body.structured_outputs or {}).items():
        if source is None or source is False:
            continue
        if name == "json_object":
            wishes.append(("structured_outputs", "json_schema", ANY_OBJECT))
        elif name in KINDS:
            wishes.append(("structured_outputs", KINDS[name], source))
        else:
            known = ", ".join([*KINDS, "json_object"])
            raise InvalidValue("structured_outputs", f"structured_outputs holds {shown(name)}; known are {known}.")
    return wishes


def of_response_format(format: Mapping[str, Any] | None) -> tuple[Kind, Any] | None:
    """OpenAI's ``response_format``, and llama.cpp's ``schema`` in it. Errors: InvalidValue."""
    kind = "text" if format is None else format.get("type")
    if kind == "text":
        return None
    assert format is not None
    if kind == "json_object":
        return "json_schema", format.get("schema", ANY_OBJECT)
    if kind == "json_schema":
        holder = format.get("json_schema", format)
        schema = holder.get("schema") if isinstance(holder, Mapping) else None
        if schema is None:
            raise InvalidValue("response_format", "response_format.json_schema.schema is missing.")
        return "json_schema", schema
    raise InvalidValue("response_format", f"type is {shown(kind)}; send text, json_object or json_schema.")


def check_source(param: str, kind: Kind, source: Any) -> None:
    """Errors: InvalidValue for a source of the wrong type or too large."""
    types: dict[str, tuple[type[Any], ...]] = {
        "json_schema": (dict, str), "regex": (str,), "choice": (list,), "grammar": (str,), "lark": (str,),
    }  # fmt: skip
    if not isinstance(source, types[kind]) or (not source and kind != "json_schema"):
        raise InvalidValue(param, f"{param}: a {kind.replace('_', ' ')} cannot be {shown(source)}.")
    if kind == "choice" and not all(isinstance(entry, str) for entry in source):
        raise InvalidValue(param, f"{param}: every choice must be a text.")
    if len(source if isinstance(source, str) else json.dumps(source)) > MAX_SOURCE:
        raise InvalidValue(param, f"{param} is larger than {MAX_SOURCE} characters.")


def calls_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of a call of one of these tools. Local references of a tool's own schema are kept with it."""
    return {"anyOf": [call_schema(tool) for tool in tools]} if len(tools) > 1 else call_schema(tools[0])


def call_schema(tool: Tool, *, is_held: bool = True) -> dict[str, Any]:
    """``{"name": ..., "arguments": ...}`` for one tool, the arguments any object where they are not held to theirs."""
    arguments = dict(tool.function.parameters if is_held else {}) or cast(dict[str, Any], dict(ANY_OBJECT))
    definitions = {name: arguments.pop(name) for name in ("$defs", "definitions") if name in arguments}
    return definitions | {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def free_calls(calls: Calls, codec: TextCodec, answer: Mapping[str, Any] | str | None) -> str:
    """A grammar of answers that may call tools: text around calls in the family's format, or instead of them the JSON
    of the schema ``answer``. Arguments of strict tools follow their schemas, others are any object.
    """
    format, kinds = calls.format, [call_schema(tool, is_held=tool.function.strict) for tool in calls.tools]
    call: dict[str, Any] = {"anyOf": kinds} if len(kinds) > 1 else kinds[0]
    if format.is_list:
        call = {"type": "array", "items": call, "minItems": 1} | ({"maxItems": 1} if calls.one_call else {})
    is_once = calls.one_call or format.is_list
    if answer is None:
        marked = "marked | TEXT" if is_once else "marked* TEXT"
        start = "call | PLAIN?" if format.bare else marked
    else:
        start = "call | instead" if format.bare else f"marked{'' if is_once else '+'} | instead"
    rules = [f"start: {start}", f"call: {json_rule(call)}", r"TEXT: /(.|\n)*/", r"PLAIN: /\s*[^\s{](.|\n)*/"]
    if answer is not None:
        rules.append(f"instead: {json_rule(json.loads(answer) if isinstance(answer, str) else answer)}")
    return "\n".join(rules if format.bare else [*rules, *marked_call(format, codec, has_text=answer is None)])


def marked_call(format: CallFormat, codec: TextCodec, *, has_text: bool) -> list[str]:
    """Rules for a call between its markers, with any text before it where there is ``has_text``."""
    begin, is_special = marker(codec, format.begin)
    end = marker(codec, format.end)[0] if format.end else ""
    # The text ends where a marker first stands in it, which a special token shows by itself.
    name = "head[lazy]" if has_text and not is_special else "head"
    head = f"{name}: {'TEXT ' if has_text else ''}{begin}"
    return [head, f"marked: head NEWLINE? call NEWLINE? {end}", r'NEWLINE: "\n"']


def json_rule(schema: Mapping[str, Any]) -> str:
    """A schema inside a grammar."""
    return f"%json {json.dumps(schema)}"


def marker(codec: TextCodec, text: str) -> tuple[str, bool]:
    """How a grammar writes a marker, and whether it is a special token of the model's."""
    for token_id, token in codec.tokenizer.get_added_tokens_decoder().items():
        if token.content == text and token.special:
            return f"<[{token_id}]>", True
    return json.dumps(text), False
