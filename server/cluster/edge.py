"""The cluster's way in: judges a request as every server does, and passes it to the replica of its conversation."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from server.api.errors import ApiError, NotServing, retry_after, shown
from server.api.reading import SMALL_BODY
from server.api.sse import event, named_event
from server.cluster.call import Call, head_of
from server.cluster.conversation import conversation_of

logger = logging.getLogger(__name__)

TRIES = 2
LOST_RETRY_S = 5.0
BUSY_RETRY_S = 2.0
NAMED_EVENTS = ("/v1/messages", "/v1/responses")
LOST = "The replica that answered was lost; the text is not complete."


class Edge:
    """ASGI app. replicas: the deployment that answers; targets: the models' names, the first for who names none."""

    def __init__(self, replicas: DeploymentHandle, targets: Sequence[str]) -> None:
        self.replicas = replicas
        self.targets = targets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Errors: ApiError for what no replica is asked for."""
        request = Request(scope, receive)
        if scope["path"] == "/health":
            await JSONResponse({"status": "ok", "models": list(self.targets)})(scope, receive, send)
            return
        if scope["path"] == "/v1/models" and len(self.targets) > 1:
            entries = [{"id": name, "object": "model", "owned_by": "dovetail"} for name in self.targets]
            await JSONResponse({"object": "list", "data": entries})(scope, receive, send)
            return
        body = await request.body()
        fields = fields_of(body) if len(body) <= SMALL_BODY else await asyncio.to_thread(fields_of, body)
        conversation = conversation_of(fields) or str(scope["state"]["request_id"])
        call = Call(head_of(scope), body, conversation, self.target_of(fields))
        answer = Answer(scope["path"], send)
        passing = asyncio.ensure_future(self.pass_on(call, answer))
        leaving = asyncio.ensure_future(client_left(receive))
        try:
            await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            for task in (passing, leaving):
                task.cancel()
            await asyncio.gather(passing, leaving, return_exceptions=True)

    def target_of(self, fields: dict[str, Any]) -> str:
        """The target that a request names; one target judges names itself. Errors: ApiError 404."""
        name = fields.get("model")
        if len(self.targets) == 1 or name is None:
            return self.targets[0]
        if name not in self.targets:
            message = f"The model {shown(str(name))} does not exist; this server has {', '.join(self.targets)}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return str(name)

    async def pass_on(self, call: Call, answer: Answer) -> None:
        """Have a replica answer. What is lost with a replica before its answer began is asked of the next.

        Errors: ApiError 429 where all are full, NotServing where a target cannot be loaded or replica after replica
        is lost.
        """
        handle = self.replicas.options(stream=True, multiplexed_model_id=call.target)
        for _ in range(TRIES):
            messages = handle.answer.remote(call)
            try:
                async for message in messages:
                    await answer.take(message)
                return
            except BackPressureError as error:
                headers = {"Retry-After": retry_after(BUSY_RETRY_S)}
                message = "All replicas are full; try again soon."
                raise ApiError(429, message, kind="overloaded", code="queue_full", headers=headers) from error
            except (RayActorError, ReplicaUnavailableError) as error:
                logger.warning("request %s: its replica was lost: %s", call.head["path"], error)
                if answer.has_begun:
                    await answer.break_off()
                    return
            except RayTaskError as error:
                if answer.has_begun:
                    raise
                raise NotServing(
                    "model_failed", f"The model could not be loaded: {error.cause}", LOST_RETRY_S
                ) from error
            finally:
                messages.cancel()
        raise NotServing("replica_lost", "The replicas that were to answer were lost; try again soon.", LOST_RETRY_S)


class Answer:
    """An answer on its way out. Its head is held back until something follows it: until then another replica can
    answer in this one's stead."""

    def __init__(self, path: str, send: Send) -> None:
        self.path = path
        self.send = send
        self.head: Message | None = None
        self.has_begun = False

    async def take(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.head = message
            return
        if not self.has_begun:
            assert self.head is not None
            self.has_begun = True
            await self.send(self.head)
        await self.send(message)

    async def break_off(self) -> None:
        """End what has begun: a stream with an event that tells, anything else by cutting it. Errors: NotServing."""
        assert self.head is not None
        error = NotServing("replica_lost", LOST, LOST_RETRY_S)
        kind = dict(self.head["headers"]).get(b"content-type", b"")
        if not kind.startswith(b"text/event-stream"):
            raise error
        told = error.body()
        last = named_event({"type": "error", **told}) if self.path in NAMED_EVENTS else event(told)
        await self.send({"type": "http.response.body", "body": last, "more_body": False})


def fields_of(body: bytes) -> dict[str, Any]:
    """A JSON object's fields; none where the body is anything else, which the replica refuses."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


async def client_left(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
