"""One machine's share of a cluster: the server's own ASGI app in a replica of Ray Serve, one for each target held."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncGenerator, Mapping

from ray import serve
from starlette.types import Message

from server.api.serving import Phase, Serving
from server.app import create_app
from server.cluster.call import Call
from server.heaps import share_arenas
from server.launch import LaunchError, load_model, vision_worker
from server.settings import Settings

POLL_S = 0.1


class HostedApp:
    """A target's app, started and ended as a server of its own would."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings, None if settings.no_llm else load_model, vision=vision_worker(settings))
        self.lifespan = contextlib.AsyncExitStack()
        # Ray Serve calls this on a target that has to make room. Not a method: Python itself would call that one too.
        self.__del__ = self.close

    async def start(self) -> None:
        """Load. Errors: LaunchError with the reason where that fails."""
        await self.lifespan.enter_async_context(self.app.router.lifespan_context(self.app))
        while self.serving.phase is Phase.LOADING:
            await asyncio.sleep(POLL_S)
        if self.serving.phase is Phase.FAILED:
            await self.lifespan.aclose()
            raise LaunchError(self.serving.failure)

    @property
    def serving(self) -> Serving:
        """Its state."""
        serving: Serving = self.app.state.serving
        return serving

    async def close(self) -> None:
        """Let running requests finish, then end."""
        await self.serving.drain()
        await self.lifespan.aclose()
        gc.unfreeze()  # loading froze what it had made
        gc.collect()

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """The app's ASGI messages. A caller that goes away is a client that has left."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        bodies = iter([{"type": "http.request", "body": call.body, "more_body": False}])

        async def receive() -> Message:
            if (body := next(bodies, None)) is not None:
                return body
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(dict(call.head), receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            left.set()
            await running


class Replica:
    """A deployment. targets: settings by the name that requests know each target by; the first is loaded at once."""

    async def __init__(self, targets: Mapping[str, Settings]) -> None:  # type: ignore[misc]  # Ray Serve waits for it
        share_arenas()
        self.targets = targets
        self.hosted: weakref.WeakSet[HostedApp] = weakref.WeakSet()
        self.name = serve.get_replica_context().replica_id.unique_id.encode()
        await self.app_of(next(iter(targets)))

    async def app_of(self, name: str) -> HostedApp:
        """A target's app, loaded anew; ``holding`` keeps those that were asked for last. Errors: LaunchError."""
        app = HostedApp(self.targets[name])
        await app.start()
        self.hosted.add(app)
        return app

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """The ASGI messages that answer a call; their head names the replica."""
        app = await self.app_of(call.target)
        async with contextlib.aclosing(app.answer(call)) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (b"x-dovetail-replica", self.name)]}
                yield message

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that fails here. Errors: NotServing."""
        for app in self.hosted:
            if app.serving.phase is Phase.READY and app.serving.load is not None:
                app.serving.model()


def holding(count: int) -> type[Replica]:
    """A replica that holds up to ``count`` targets at once; the one that was not asked for longest makes room."""
    kept = serve.multiplexed(max_num_models_per_replica=count)(Replica.app_of)
    return type("Replica", (Replica,), {"app_of": kept})
