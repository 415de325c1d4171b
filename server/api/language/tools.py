"""Tools that a chat offers to the model: their schema, which of them count, and how a model without a place for them
in its template is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from server.api.body import Body, Text
from server.api.errors import InvalidValue, shown
from server.api.language.tool_calls import HERMES

Turn = dict[str, Any]


class Function(Body):
    """A function: its name, what it is for, and the JSON schema of its arguments."""

    name: Text = Field(description="What a call names.")
    description: Text = Field("", description="What it is for; the model is told.")
    parameters: dict[str, Any] = Field(
        {"type": "object", "properties": {}}, description="JSON schema of the arguments, an object."
    )
    strict: bool = Field(False, description="Arguments are held to the schema.")


class Tool(Body):
    """A tool; functions are the only kind."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    type: Literal["function"] = Field("function", description="The only kind.")
    function: Function = Field(description="The function.")

    def for_template(self) -> dict[str, Any]:
        """The tool as templates know it."""
        return self.model_dump(include={"type": True, "function": {"name", "description", "parameters"}})


class CalledFunction(Body):
    """A function's name and its arguments: a JSON object as text."""

    name: Text = Field(description="The function that was called.")
    arguments: Text = Field("{}", description="A JSON object as text.")


class ToolCall(Body):
    """A call the assistant made in an earlier turn."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"index"})

    id: Text = Field("", description="What the tool's turn refers to.")
    type: Literal["function"] = Field("function", description="The only kind.")
    function: CalledFunction = Field(description="What was called.")

    def for_template(self) -> dict[str, Any]:
        """The call as templates know it, with its arguments as an object where they are one."""
        try:
            arguments: Any = json.loads(self.function.arguments or "{}")
        except ValueError:
            arguments = self.function.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


def chosen_tools(tools: Sequence[Tool], choice: Any) -> tuple[list[Tool], bool]:
    """The tools that ``tool_choice`` leaves, and whether one of them must be called. Errors: InvalidValue."""
    if choice == "none":
        return [], False
    if choice in (None, "auto"):
        return list(tools), False
    if not tools:
        raise InvalidValue("tool_choice", "tool_choice asks for a call, and no tools were sent.")
    if choice == "required":
        return list(tools), True
    if not isinstance(choice, Mapping):
        raise InvalidValue("tool_choice", "tool_choice must be none, auto, required, or an object that names a tool.")
    if choice.get("type") != "allowed_tools":
        return tools_named(tools, [choice]), True
    allowed = choice.get("allowed_tools", choice)
    if not isinstance(allowed, Mapping) or not isinstance(allowed.get("tools"), list):
        raise InvalidValue("tool_choice", "allowed_tools must hold mode and tools, a list of objects that name tools.")
    return tools_named(tools, allowed["tools"]), allowed.get("mode", "auto") == "required"


def tools_named(tools: Sequence[Tool], entries: Sequence[Any]) -> list[Tool]:
    """The tools that these objects name. Errors: InvalidValue for names that are not among the tools."""
    names = {named_tool(entry) for entry in entries}
    unknown = names - {tool.function.name for tool in tools}
    if unknown or not names:
        raise InvalidValue("tool_choice", f"tool_choice names {shown(sorted(unknown))}, which tools does not hold.")
    return [tool for tool in tools if tool.function.name in names]


def named_tool(entry: Any) -> str:
    """The name in ``{"type": "function", "function": {"name": ...}}`` or ``{"name": ...}``. Errors: InvalidValue."""
    holder = entry.get("function", entry) if isinstance(entry, Mapping) else None
    name = holder.get("name") if isinstance(holder, Mapping) else None
    if not isinstance(name, str):
        raise InvalidValue("tool_choice", "every tool in tool_choice must be an object that names a function.")
    return name


def told_in_text(turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
    """A conversation for a template that knows no tools: they are described in the system turn, and calls and results
    are text in the turns around them."""
    told = [turn_in_text(turn) for turn in turns]
    if not tools:
        return told
    listed = "\n".join(json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"These functions can be called, one JSON object a line:\n{listed}\n"
        f"To call one, answer only {HERMES.begin}"
        f'{{"name": NAME, "arguments": {{...}}}}{HERMES.end}. The result comes back in the next message.'
    )
    if told and told[0]["role"] == "system":
        return [told[0] | {"content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def turn_in_text(turn: Turn) -> Turn:
    """A turn with its calls, or its tool's result, as text."""
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    calls = [
        f"{HERMES.begin}\n{json.dumps(call['function'], ensure_ascii=False)}\n{HERMES.end}"
        for call in turn.get("tool_calls", ())
    ]
    plain = {name: value for name, value in turn.items() if name != "tool_calls"}
    return plain | {"content": "\n".join(filter(None, [turn["content"], *calls]))}
