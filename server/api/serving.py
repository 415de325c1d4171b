"""The server's state: the model being loaded, ready, failed or going down, and who has requests running."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

from fastapi import Depends
from fastapi import Request as HttpRequest

from server.api import supervisor
from server.api.dispatcher import Dispatcher
from server.api.errors import ApiError, InvalidValue, NotServing, shown
from server.api.observations import Observations
from server.api.watchdog import Watchdog
from server.engine.figures import EngineFigures
from server.engine.grammar import GrammarCompiler
from server.engine.request import Event, Request, SamplingParams
from server.settings import LOADING_THREAD, Settings
from server.text import TextCodec
from server.vision.worker import VisionWorker

if TYPE_CHECKING:
    from server.api.tracing import Tracing

logger = logging.getLogger(__name__)

LOADING_RETRY_S = 5.0
LONG_RETRY_S = 120.0
DRAIN_POLL_S = 0.05

Result = TypeVar("Result")


class DraftingStatus(Protocol):
    """Whether requests are drafted for."""

    @property
    def state(self) -> str:
        """on, off, failed or unprofitable."""

    @property
    def reason(self) -> str:
        """Why it is not on; empty where it is."""


class EngineStatus(Protocol):
    """How busy the engine is."""

    @property
    def running(self) -> int:
        """Requests that hold a slot."""

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""

    @property
    def slots(self) -> int:
        """Slots in all."""

    @property
    def free_slots(self) -> int:
        """Slots that are free."""

    @property
    def drafting(self) -> DraftingStatus:
        """Whether requests are drafted for, and why not."""


class EngineHandle(Protocol):
    """What the API asks of the engine's thread."""

    def start(self, deliver: Callable[[list[Event]], None]) -> None:
        """Run; ``deliver`` is called in the engine's thread once a round."""

    def submit(self, request: Request) -> None:
        """Queue a request. Errors: QueueFull, ContextTooLong, EngineStopped."""

    def cancel(self, request_id: str) -> None:
        """End a request within one round; unknown and finished ids are fine."""

    def stop(self) -> None:
        """End every request as cancelled and join the thread."""

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""

    @property
    def step_in_hand(self) -> int | None:
        """The number of the step that runs; None between steps."""

    def status(self) -> EngineStatus:
        """How busy it is."""

    def figures(self) -> EngineFigures:
        """What it has done since its start."""


class ServedModel(Protocol):
    """What loading gives; ``server.launch.LoadedModel`` is one."""

    @property
    def name(self) -> str:
        """The name clients use."""

    @property
    def created(self) -> int:
        """Unix time of loading, seconds."""

    @property
    def engine(self) -> EngineHandle:
        """Its engine, not started yet."""

    @property
    def codec(self) -> TextCodec:
        """Its tokenizer and chat template."""

    @property
    def placement(self) -> Callable[[], dict[str, Any]]:
        """Where its parts are now, and why they are not where they were to be."""

    @property
    def info(self) -> Any:
        """What it is: a ``server.targets.target.TargetInfo``."""

    @property
    def sampling(self) -> SamplingParams:
        """How a request is sampled that does not say."""

    @property
    def drafter_name(self) -> str:
        """What drafts for it; ``none`` where nothing does."""

    @property
    def context_length(self) -> int:
        """Longest prompt and answer together, in tokens."""


Report = Callable[[str], None]
"""Told what is being done, in a few words."""

Load = Callable[[Settings, Report], ServedModel]


class Phase(enum.StrEnum):
    """Where the server stands."""

    LOADING = "loading"
    READY = "ok"
    FAILED = "failed"
    STOPPING = "shutting_down"


class Serving:
    """One process's models and the ways to them. Lives on the event loop.

    ``load`` gives the language model, None where only ``vision`` is served. ``on_failure`` is told when loading failed,
    so that the process can end.
    """

    def __init__(
        self,
        settings: Settings,
        load: Load | None,
        on_failure: Callable[[Exception], None] | None = None,
        vision: VisionWorker | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.load = load
        self.vision = vision
        self.vision_ready = False
        self.on_failure = on_failure
        self.phase = Phase.LOADING
        self.created = int(time.time())
        self.loaded: ServedModel | None = None
        self.failure = ""
        self.stage, self.started = "looking for the model", time.monotonic()
        self.watchdog = Watchdog(settings.watchdog_s)
        self.reported_fields: set[str] = set()
        self.lock = threading.Lock()
        self.compiler: GrammarCompiler | None = None
        self.observations = Observations(tracing)
        self.dispatcher = Dispatcher(asyncio.get_running_loop(), self.observations.take)
        # Large bodies are read one at a time: a few bytes may stand for a hundred times as much memory.
        self.readers = ThreadPoolExecutor(1, thread_name_prefix="dovetail-bodies")

    async def aside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run ``work`` where large bodies are read, one after another."""
        return await self.dispatcher.loop.run_in_executor(self.readers, work, *arguments)

    def start_loading(self) -> None:
        """Load in threads of their own, which do not keep the process alive when it is told to end."""
        engine = lambda: None if self.loaded is None else self.loaded.engine  # noqa: E731
        self.watching = asyncio.ensure_future(self.watchdog.watch(engine))
        if self.vision is not None:
            self.vision.start(self._vision_loaded)
        if self.load is None:
            self.phase = Phase.READY
            supervisor.tell("READY=1")
            return
        threading.Thread(target=self._load, name=LOADING_THREAD, daemon=True).start()

    @property
    def is_loading(self) -> bool:
        """Whether a model is still to come."""
        return self.phase is Phase.LOADING or (self.vision is not None and not self.vision_ready)

    def model(self) -> ServedModel:
        """The language model, ready to answer. Errors: NotServing (503) with the reason, 404 where there is none."""
        self._check_not_stopping()
        if self.load is None:
            raise ApiError(404, "This server has no language model, only vision models.", code="model_not_found")
        if self.phase is Phase.FAILED:
            raise NotServing("model_failed", f"The model could not be loaded: {self.failure}", LONG_RETRY_S)
        if self.loaded is None:
            raise NotServing("model_loading", "The model is being loaded; try again soon.", LOADING_RETRY_S)
        if not self.loaded.engine.alive:
            raise NotServing("engine_dead", "The engine has stopped; restart the server.", LONG_RETRY_S)
        self.check_not_stuck()
        return self.loaded

    def check_not_stuck(self) -> None:
        """Errors: NotServing where the engine does not come back from a step."""
        if self.watchdog.is_stuck:
            raise NotServing("engine_stuck", "The engine does not come back from a step.", LONG_RETRY_S)

    def loading(self) -> dict[str, Any]:
        """How far loading the language model is."""
        return {"stage": self.stage, "elapsed_s": round(time.monotonic() - self.started, 1)}

    def vision_state(self) -> tuple[str, str]:
        """``ok``, ``loading`` or ``failed``, and why. Only to be asked where there are vision models."""
        assert self.vision is not None
        if self.vision.failure:
            return "failed", self.vision.failure
        return ("ok" if self.vision_ready else "loading"), ""

    def vision_worker(self) -> VisionWorker:
        """The vision models' worker, ready. Errors: NotServing (503), ApiError 404 where there are no such models."""
        self._check_not_stopping()
        if self.vision is None:
            message = "This server has no vision models; start it with --vision PATH."
            raise ApiError(404, message, code="model_not_found")
        if not self.vision.alive:
            message = f"The vision models cannot answer: {self.vision.failure or 'their process has stopped'}."
            raise NotServing("engine_dead", message, LONG_RETRY_S)
        if not self.vision_ready:
            raise NotServing("model_loading", "The vision models are being loaded; try again soon.", LOADING_RETRY_S)
        return self.vision

    def _check_not_stopping(self) -> None:
        if self.phase is Phase.STOPPING:
            raise NotServing(
                "shutting_down", "The server is shutting down; try again once it is back.", LOADING_RETRY_S
            )

    def interruption(self) -> NotServing:
        """Why the engine ended a request that nobody cancelled."""
        if self.phase is Phase.STOPPING:
            return NotServing(
                "shutting_down", "The server is shutting down; the text is not complete.", LOADING_RETRY_S
            )
        return NotServing("engine_dead", "The engine has stopped; the text is not complete.", LONG_RETRY_S)

    def grammars(self, model: ServedModel) -> GrammarCompiler:
        """What compiles grammars for the model's tokens, made when it is first asked for."""
        with self.lock:
            if self.compiler is None:
                self.compiler = GrammarCompiler(model.codec.tokenizer, model.codec.stop_ids)
            return self.compiler

    def model_named(self, name: str | None) -> ServedModel:
        """The language model, if that is its name or none was sent.

        Errors: NotServing, ApiError 404 listing what is served, InvalidValue for a vision model.
        """
        if self.vision is not None and name in self.vision.names:
            models = [] if self.load is None else [self.name]
            known = ", ".join(repr(known) for known in models) or "none"
            message = f"{name!r} is a vision model and has no text; this server's language models are: {known}."
            raise InvalidValue("model", message)
        model = self.model()
        if name not in (None, model.name):
            raise self.unknown_model(str(name))
        return model

    def unknown_model(self, name: str) -> ApiError:
        """404 for a model name."""
        served = ", ".join(repr(known) for known in self.names)
        message = f"The model {shown(name)} does not exist; this server has {served}."
        return ApiError(404, message, param="model", code="model_not_found")

    @property
    def name(self) -> str:
        """The name of the language model that is, or will be, served."""
        return self.loaded.name if self.loaded is not None else self.settings.served_name

    @property
    def names(self) -> list[str]:
        """All models that are, or will be, served."""
        text = [] if self.load is None else [self.name]
        return text + ([] if self.vision is None else list(self.vision.names))

    async def drain(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests, give running ones ``settings.drain_s`` to finish (``hurry`` cuts it), then end them."""
        self.phase = Phase.STOPPING
        deadline = time.monotonic() + self.settings.drain_s
        while self._is_busy() and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(DRAIN_POLL_S)
        await self.stop()

    async def stop(self) -> None:
        """End running requests and the engine. May be called again."""
        self.phase = Phase.STOPPING
        self.watching.cancel()
        supervisor.tell("STOPPING=1")
        self.readers.shutdown(wait=False, cancel_futures=True)
        if self.vision is not None:
            await asyncio.to_thread(self.vision.stop)
        if self.loaded is not None:
            model, self.loaded = self.loaded, None
            await asyncio.to_thread(model.engine.stop)
        await asyncio.to_thread(self.observations.close)

    def _is_busy(self) -> bool:
        return bool(self.dispatcher.queues) or (self.vision is not None and self.vision.status().requests > 0)

    def _vision_loaded(self, error: Exception | None) -> None:
        if error is None:
            self._tell(self._vision_is_ready, None)
        elif self.load is None:
            self._tell(self._failed, ValueError(f"vision: {error}"))

    def _vision_is_ready(self, _: None) -> None:
        assert self.vision is not None
        self.vision_ready = True
        for model in self.vision.models:
            logger.info(
                "%s is ready: %s of %d classes on %s", model.name, model.kind, len(model.class_names), model.runtime
            )

    def _load(self) -> None:
        assert self.load is not None
        try:
            model = self.load(self.settings, self._report)
        except Exception as error:  # told to the event loop, which answers with it
            self._tell(self._failed, error)
        else:
            self._tell(self._ready, model)

    def _report(self, stage: str) -> None:
        """Called in the thread that loads."""
        self.stage = stage
        logger.info("%s", stage)

    def _tell(self, callback: Callable[..., None], argument: object) -> None:
        with contextlib.suppress(RuntimeError):  # the server ended while the model was being loaded
            self.dispatcher.loop.call_soon_threadsafe(callback, argument)

    def _ready(self, model: ServedModel) -> None:
        if self.phase is Phase.STOPPING:
            return
        model.engine.start(self.dispatcher.deliver)
        self.loaded = model
        self.phase = Phase.READY
        supervisor.tell("READY=1")
        logger.info("%s is ready: context %d, drafter %s", model.name, model.context_length, model.drafter_name)

    def _failed(self, error: Exception) -> None:
        if self.phase is Phase.STOPPING:
            return
        self.failure = str(error) or type(error).__name__
        self.phase = Phase.FAILED
        if isinstance(error, ValueError | OSError | ImportError):
            logger.error("the model could not be loaded: %s", self.failure)
        else:
            logger.error("the model could not be loaded", exc_info=error)
        if self.on_failure is not None:
            self.on_failure(error)


async def serving_of(request: HttpRequest) -> Serving:
    """Route dependency; a plain function would be called in a thread of its own, for every request."""
    serving: Serving = request.app.state.serving
    return serving


CurrentServing = Annotated[Serving, Depends(serving_of)]
