"""The body of a chat: its turns and the parts of their content."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from server.api.body import Body, NeutralValues, Text, WholeNumber
from server.api.errors import InvalidValue, UnsupportedParameter, shown
from server.api.language.schemas import AS_MUCH_AS_FITS, MAX_LOGPROBS, GenerationBody
from server.api.language.tools import Tool, ToolCall, Turn
from server.text import InvalidText, check_text

MAX_TOOLS = 256


class TextPart(Body):
    """A piece of a turn's text, as chat completions and as responses call it."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"cache_control", "annotations"})

    type: Literal["text", "input_text", "output_text"] = Field(description="All three are text.")
    text: Text = Field(description="The piece.")


class RefusalPart(Body):
    """What an assistant said when it refused."""

    type: Literal["refusal"] = Field(description="An earlier refusal.")
    refusal: Text = Field(description="Its text.")

    @property
    def text(self) -> str:
        """It is a turn's text like any other."""
        return self.refusal


Part = TextPart | RefusalPart
PARTS: dict[str, type[Part]] = {
    "text": TextPart, "input_text": TextPart, "output_text": TextPart, "refusal": RefusalPart,
}  # fmt: skip


def parse_content(value: Any) -> str | list[Part]:
    """A turn's content: a text, or parts. Errors: ValueError, UnsupportedParameter for parts that are no text."""
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list) or not value:
        raise ValueError("send a text, or a list of parts of type text")
    return [parse_part(part, index) for index, part in enumerate(value)]


def parse_part(value: Any, index: int) -> Part:
    """One part of a content."""
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError("every part must be an object with a type, such as {'type': 'text', 'text': '...'}")
    if value["type"] not in PARTS:
        kind = shown(value["type"])
        raise UnsupportedParameter("messages", f"Content parts of type {kind} are not supported; send type text.")
    try:
        return PARTS[value["type"]].model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, InvalidText):
            raise cause from error
        raise ValueError(f"part {index} has a wrong {fault['loc'][-1]}: {fault['msg']}") from error


Content = Annotated[str | list[Part], BeforeValidator(parse_content, json_schema_input_type=str | list[Part])]


ROLES = {"developer": "system", "function": "tool"}


class Message(Body):
    """One turn. ``developer`` is the newer name of ``system``, ``function`` the older one of ``tool``.

    Only an assistant's turn may have no content.
    """

    without_effect: ClassVar[frozenset[str]] = frozenset({"id", "cache_control", "annotations"})
    neutral: ClassVar[NeutralValues] = {
        "function_call": (),
        "refusal": ("",),
        "audio": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(description="Who speaks.")
    content: Content = Field("", description="A text, or parts of text, which are joined by newlines.")
    name: Text | None = Field(None, description="Given to the chat template.")
    reasoning_content: Text | None = Field(None, description="An earlier turn's reasoning, given to the template.")
    tool_calls: list[ToolCall] = Field([], description="Calls that the assistant made.")
    tool_call_id: Text | None = Field(None, description="The call that a tool's turn answers.")

    @property
    def text(self) -> str:
        """The content as one text; parts are joined by newlines."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)

    def for_template(self) -> Turn:
        """The turn as chat templates know it."""
        turn = {"role": ROLES.get(self.role, self.role), "content": self.text}
        rest = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.for_template() for call in self.tool_calls] or None,
        }
        return turn | {name: value for name, value in rest.items() if value is not None}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    without_effect: ClassVar[frozenset[str]] = GenerationBody.without_effect - {"parallel_tool_calls"} | {"prediction"}
    neutral: ClassVar[NeutralValues] = GenerationBody.neutral | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "chat_template": (),
    }

    messages: list[Message] = Field(min_length=1, description="The turns so far, oldest first.")
    max_tokens: WholeNumber | None = Field(
        None,
        ge=AS_MUCH_AS_FITS,
        description="Tokens of the answer, 1 or more; -1 or left out: what the context leaves.",
    )
    max_completion_tokens: WholeNumber | None = Field(
        None, ge=AS_MUCH_AS_FITS, description="The newer name of max_tokens."
    )
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, description="Functions that the model may call.")
    tool_choice: Text | dict[str, Any] | None = Field(
        None, description="none, auto, required, a function, or allowed_tools."
    )
    parallel_tool_calls: bool = Field(True, description="false: at most one call in an answer")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables the model's chat template is given.")
    reasoning_effort: Text | None = Field(None, description="Given to the template, which may not ask for it.")
    verbosity: Text | None = Field(None, description="Given to the template, which may not ask for it.")
    logprobs: bool = Field(False, description="Log-probabilities of the answer's tokens, natural.")
    top_logprobs: WholeNumber | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives to each token; needs logprobs."
    )
    add_generation_prompt: bool = Field(True, description="The prompt ends with the opening of the assistant's turn.")
    continue_final_message: bool = Field(False, description="Go on with the last message; add_generation_prompt false.")

    @property
    def num_shown_logprobs(self) -> int | None:
        """Alternatives told with each token."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _contents_and_one_limit(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidValue("top_logprobs", "top_logprobs needs logprobs: true.")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidValue("max_tokens", "max_tokens and max_completion_tokens differ; send one of them.")
        if 0 in limits:
            raise InvalidValue("max_tokens", "max_tokens is 0; ask for at least 1, or -1 for as much as fits.")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            wanted = "continue_final_message goes on with the last turn; send add_generation_prompt: false with it."
            raise InvalidValue("add_generation_prompt", wanted)
        for index, message in enumerate(self.messages):
            if message.role != "assistant" and "content" not in message.model_fields_set:
                raise InvalidValue(f"messages.{index}.content", f"messages.{index}.content is missing.")
        if [message.role for message in self.messages[-2:]] == ["assistant"] * 2:
            raise InvalidValue("messages", "messages end with two turns of the assistant; send them as one.")
        return self
