"""From encoded prompts to engine requests: limits first, so that a refused call is a clean 4xx."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.errors import InvalidValue
from server.api.schemas import GenerationBody
from server.api.serving import ServedModel
from server.engine.request import ContextTooLong, Request


def plan_requests(
    call_id: str,
    prompts: Sequence[Sequence[int]],
    body: GenerationBody,
    model: ServedModel,
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    max_requests: int,
) -> list[Request]:
    """One request for each prompt and choice, prompt-major.

    max_tokens None takes ``default_max_tokens`` (None: all there is), cut to what the context leaves; a number that was
    asked for is never cut. Errors: InvalidValue for more answers than the server takes at once, ContextTooLong.
    """
    num_requests = len(prompts) * body.num_choices
    if num_requests > max_requests:
        message = f"The call asks for {num_requests} answers at once; this server takes at most {max_requests}."
        raise InvalidValue("n", message)
    sampling, stop_ids = body.sampling(), body.stop_ids(model.codec.stop_ids)
    limits = [answer_limit(len(prompt), max_tokens, default_max_tokens, model.context_length) for prompt in prompts]
    return [
        Request(
            request_id=f"{call_id}-{index}-{choice}",
            prompt_ids=prompt,
            max_tokens=limit,
            sampling=sampling,
            stop_ids=stop_ids,
            choice=choice,
            draft=body.wants_draft,
        )
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        for choice in range(body.num_choices)
    ]


def answer_limit(num_prompt: int, asked: int | None, default: int | None, context: int) -> int:
    """Tokens the answer may have. Errors: ContextTooLong where the prompt leaves no room, or less than asked."""
    room = context - num_prompt
    wanted = asked if asked is not None else 1
    if wanted > room:
        raise ContextTooLong(num_prompt, wanted, context)
    if asked is not None:
        return asked
    return room if default is None else min(default, room)
