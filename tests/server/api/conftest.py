"""Clients of the app: in process, and over a socket."""

import asyncio
import functools
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi import FastAPI
from lasting_worker import Lasting
from tiny_detector import write_tiny_detector

from server.app import DrainingServer, create_app
from server.settings import Settings
from server.vision.worker import VisionWorker, WorkerOptions
from vision.images import ImageLimits

PATIENCE_S = 5.0
MAX_PIXELS = 200_000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
    return value


@pytest.fixture(name="until")
def until_fixture() -> Callable[[Callable[[], Any]], Any]:
    return until


@pytest.fixture(scope="session")
def check_described() -> Callable[[httpx.Response], Awaitable[None]]:
    """Holds an answer of a vision route to what /openapi.json says. Errors: KeyError, jsonschema's ValidationError."""
    described = functools.cache(lambda: create_app(Settings(), None).openapi())

    async def check(answer: httpx.Response) -> None:
        path, method = answer.request.url.path, answer.request.method.lower()
        if not path.startswith("/v1/vision/") or method not in described()["paths"].get(path, {}):
            return
        told = described()["paths"][path][method]["responses"][str(answer.status_code)]["content"]
        kind = answer.headers["content-type"]
        schema = told[kind]["schema"] | {"components": described()["components"]}
        if kind == "application/json":
            await answer.aread()
            jsonschema.Draft202012Validator(schema).validate(answer.json())

    return check


@pytest.fixture
def connect(
    make_settings: Callable[..., Settings], check_described: Callable[[httpx.Response], Awaitable[None]]
) -> Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]:
    """``connect(model, **settings)``: a client of the app in this process; with ``ready=False`` it does not wait.

    ``model`` None serves ``vision`` alone. Every answer of a vision route must be as it is described.
    """

    @asynccontextmanager
    async def open_client(
        model: Any, ready: bool = True, vision: Any = None, **settings: Any
    ) -> AsyncIterator[httpx.AsyncClient]:
        load = model if callable(model) or model is None else lambda *_: model
        app: FastAPI = create_app(make_settings(**settings), load, vision=vision)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://localhost",
                event_hooks={"response": [check_described]},
            ) as client,
        ):
            while ready and (await client.get("/health")).status_code != 200:
                await asyncio.sleep(
                    0.01
                )  # without a pause this loop holds the interpreter, which the thread that loads needs
            client.app = app  # type: ignore[attr-defined]
            yield client

    return open_client


@pytest.fixture
def listen(make_settings: Callable[..., Settings]) -> Callable[..., Any]:
    """``listen(model, **settings)``: a real server on a free loopback port; gives its URL and the server."""

    @contextmanager
    def run(model: Any, **settings: Any) -> Iterator[tuple[str, DrainingServer]]:
        load = model if callable(model) else lambda *_: model
        server = DrainingServer(make_settings(port=0, **settings), load)
        thread = threading.Thread(target=server.run)
        thread.start()
        until(lambda: server.started or not thread.is_alive())
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        if not callable(model):
            until(lambda: httpx.get(f"{url}/health").status_code == 200)
        try:
            yield url, server
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    return run


@pytest.fixture
def read_events() -> Callable[[str], list[Any]]:
    """The ``data:`` payloads of a stream's text; comments are dropped."""

    def read(text: str) -> list[Any]:
        payloads = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
        return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]

    return read


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionWorker]:
    """A real vision process with the detector of two colours."""
    folder = write_tiny_detector(tmp_path_factory.mktemp("models") / "halves")
    options = WorkerOptions(limits=ImageLimits(max_pixels=MAX_PIXELS), niceness=0)
    lasting = Lasting({"halves": folder}, options)
    yield lasting
    VisionWorker.stop(lasting)
