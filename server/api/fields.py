"""Request fields that this server knows but does not honour, and fields nobody knows.

A field that cannot change the answer is accepted with any value. One that can is accepted where its value is null or
neutral, and refused by name otherwise: nothing that changes an answer is dropped in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from server.api.errors import ApiError, UnsupportedParameter, shown
from server.api.schemas import GenerationBody

logger = logging.getLogger(__name__)

WITHOUT_EFFECT = frozenset(
    {
        "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "cache_salt",
    }
)  # fmt: skip

NEUTRAL_BOTH: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0,),
    "typical_p": (1,),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "priority": (0,),
    "store": (False,),
}
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = NEUTRAL_BOTH | {"suffix": ("",), "logprobs": ()}
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = NEUTRAL_BOTH | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}
NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "reasoning_content": ("",),
}
NEUTRAL_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
NEUTRAL_SPECULATIVE: dict[str, tuple[Any, ...]] = {"n_max": (), "n_min": (), "p_min": ()}


def check_extra_fields(
    extra: Mapping[str, Any] | None, neutral: Mapping[str, tuple[Any, ...]], *, lenient: bool, path: str = ""
) -> None:
    """Judge the fields a schema does not declare. ``path`` prefixes their names in messages.

    Errors: UnsupportedParameter for a known field with a value that would change the answer; ApiError
    ``unknown_parameter`` for an unknown name, unless ``lenient``.
    """
    for name, value in (extra or {}).items():
        param = path + name
        if name in neutral:
            if value is not None and value not in neutral[name]:
                allowed = " or ".join(["null", *(shown(v) for v in neutral[name])])
                raise UnsupportedParameter(
                    param,
                    f"{param} is {shown(value)}, which this server does not support; leave it out or send {allowed}.",
                )
        elif name not in WITHOUT_EFFECT:
            if not lenient:
                message = f"Unknown field {shown(param)}; leave it out, or start the server with --lenient."
                raise ApiError(400, message, param=param, code="unknown_parameter")
            logger.debug("unknown field %r is dropped", param)


def check_body(body: GenerationBody, neutral: Mapping[str, tuple[Any, ...]], *, lenient: bool) -> None:
    """Judge the undeclared fields of a body and of its ``stream_options`` and ``speculative``."""
    check_extra_fields(body.model_extra, neutral, lenient=lenient)
    if body.stream_options is not None:
        extra = body.stream_options.model_extra
        check_extra_fields(extra, NEUTRAL_STREAM_OPTIONS, lenient=lenient, path="stream_options.")
    if body.speculative is not None:
        check_extra_fields(body.speculative.model_extra, NEUTRAL_SPECULATIVE, lenient=lenient, path="speculative.")
