"""Answers that must follow a schema, an expression, choices or a grammar: every spelling clients use for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from server.api.errors import ApiError, InvalidValue, shown
from server.api.language.schemas import GenerationBody
from server.api.language.tools import Tool
from server.api.serving import ServedModel, Serving
from server.engine.grammar import Grammar, GrammarError, Kind

MAX_SOURCE = 200_000  # characters
ANY_OBJECT = {"type": "object"}
KINDS: dict[str, Kind] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}

Wanted = tuple[str, Kind, Any]
"""The field that asks, what it asks for, and the source."""


async def grammar_for(
    body: GenerationBody, tools: Sequence[Tool], serving: Serving, model: ServedModel
) -> Callable[[], Grammar] | None:
    """What makes a fresh grammar for each answer, None where it is free; one of ``tools`` must be called.

    Compiles away from the event loop. Errors: InvalidValue for two wishes at once, ApiError ``invalid_json_schema``.
    """
    wishes = wanted(body)
    if tools:
        wishes.append(("tool_choice", "json_schema", calls_schema(tools)))
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
        "json_schema": (dict, str), "regex": (str,), "choice": (list,), "grammar": (str,),
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


def call_schema(tool: Tool) -> dict[str, Any]:
    """``{"name": ..., "arguments": ...}`` for one tool."""
    arguments = dict(tool.function.parameters) or cast(dict[str, Any], dict(ANY_OBJECT))
    definitions = {name: arguments.pop(name) for name in ("$defs", "definitions") if name in arguments}
    return definitions | {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
