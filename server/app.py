"""The ASGI app, and the process that serves it."""

from __future__ import annotations

import errno
import functools
import logging
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.api import docs, health, metrics, models, page
from server.api.access import Access, open_to_all
from server.api.errors import install_error_handlers
from server.api.gate import Gate
from server.api.language import anthropic, chat, completions, embeddings, responses, tokenizer
from server.api.observations import tracing_to
from server.api.observer import Observer
from server.api.openapi import App
from server.api.serving import Load, Serving
from server.connection import Connection
from server.heaps import share_arenas
from server.installation import own_version
from server.placement.machine import connection_limit
from server.settings import Settings, SettingsError
from server.vision import deepstack
from server.vision import routes as vision_routes
from server.vision.worker import VisionWorker

logger = logging.getLogger(__name__)

FINISH_S = 5  # what connections get to take their last bytes once the engine has stopped


def create_app(
    settings: Settings,
    load: Load | None,
    on_failure: Callable[[Exception], None] | None = None,
    vision: VisionWorker | None = None,
) -> FastAPI:
    """The app. It listens at once and loads the models in threads; until then inference is answered with 503.

    ``load`` gives the language model with its engine not started, ``vision`` is a worker not started; without either
    that half is not served. ``on_failure`` is told when loading fails.
    """

    tracing = tracing_to(settings.otlp_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.serving = Serving(settings, load, on_failure, vision, tracing)
        app.state.serving.start_loading()
        yield
        await app.state.serving.stop()

    app = App(title="Dovetail", version=own_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, access=Access(settings))
    if settings.cors_origins:  # around the gate: browsers ask for leave without a key
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-dovetail-ignored"],
        )  # fmt: skip
    install_error_handlers(app)
    language = (completions, chat, responses, anthropic, embeddings, tokenizer)
    routers = [routes.router for routes in (*language, vision_routes, deepstack, models, health, metrics, page, docs)]
    routers.append(tokenizer.facts)
    for router in routers:
        app.include_router(router)
    app.add_middleware(Observer, routes=[route for router in routers for route in router.routes])
    return app


class ListenError(OSError):
    """The address cannot be listened on: taken, not this machine's, or not allowed."""


class DrainingServer(uvicorn.Server):
    """uvicorn, except that it lets running requests finish before it closes their connections.

    On the first signal new requests get 503 and running ones ``settings.drain_s`` to finish; a second signal cuts it.
    A model that cannot be loaded ends the server as well; ``load_error`` then says why. A Ctrl-C that comes before all
    models are loaded sets ``load_interrupted``.
    """

    def __init__(self, settings: Settings, load: Load | None, vision: VisionWorker | None = None) -> None:
        self.load_error: Exception | None = None
        self.load_interrupted = False
        self.app = create_app(settings, load, self._fail, vision)
        connection = functools.partial(
            Connection,
            send_timeout_s=settings.send_timeout_s,
            max_connections=connection_limit(settings.max_connections),
        )
        config = uvicorn.Config(
            self.app,
            host=settings.host,
            port=settings.port,
            http=cast(Any, connection),  # of h11, which bounds the size of headers
            ws="none",
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=FINISH_S,
        )
        super().__init__(config)
        try:
            config.load()
        except (ssl.SSLError, OSError) as error:
            message = (
                f"tls_cert {str(settings.tls_cert)!r} and tls_key {str(settings.tls_key)!r} cannot be used: {error}"
            )
            raise SettingsError(message) from error

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close."""
        serving: Serving = self.app.state.serving
        await serving.drain(hurry=lambda: self.force_exit)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        serving: Serving | None = getattr(self.app.state, "serving", None)
        self.load_interrupted |= sig == signal.SIGINT and (serving is None or serving.is_loading)
        self.force_exit |= self.should_exit
        super().handle_exit(sig, frame)

    def _fail(self, error: Exception) -> None:
        self.load_error = error
        self.should_exit = True


def serve(settings: Settings, load: Load | None, vision: VisionWorker | None = None) -> None:
    """Serve until told to end; see ``create_app``.

    Errors: ListenError before anything is loaded, whatever loading a model raised, KeyboardInterrupt where Ctrl-C came
    before the models were there.
    """
    share_arenas()
    if open_to_all(settings):
        logger.warning("listening on %s without an API key: anyone who reaches it can use it", settings.host)
    sockets = bind_sockets(settings.host, settings.port)
    try:
        server = DrainingServer(settings, load, vision)
    except SettingsError:
        for opened in sockets:
            opened.close()
        raise
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logger.info("listening on %s://%s:%d (Ctrl-C ends it)", scheme, host, sockets[0].getsockname()[1])
    with signals_spent(), ending_with_its_terminal(server):
        server.run(sockets)
    if server.load_error is not None:
        raise server.load_error
    if server.load_interrupted:
        raise KeyboardInterrupt


def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """A socket for each address that ``host`` stands for. Errors: ListenError."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(found):
            sockets.append(socket.socket(family))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
    except OSError as error:
        for opened in sockets:
            opened.close()
        if error.errno == errno.EADDRINUSE:
            raise ListenError(f"port {port} of {host} is taken; choose another with --port (0: a free one)") from error
        raise ListenError(f"{host}, port {port} cannot be listened on: {error.strerror}") from error
    return sockets


@contextmanager
def ending_with_its_terminal(server: DrainingServer) -> Iterator[None]:
    """SIGHUP is SIGTERM, unless the server was started to outlive its terminal (nohup)."""
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, server.handle_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def signals_spent() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more; a server that has drained has nothing left to do on it."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
