"""A tiny tokenizer, and an engine that plays a script instead of running a model."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from server.engine.figures import Counts, EngineFigures
from server.engine.request import (
    ContextTooLong,
    DraftStats,
    EngineStopped,
    Event,
    FinishedEvent,
    FinishReason,
    PooledEvent,
    PromptEvent,
    QueueFull,
    Ranked,
    Request,
    SamplingParams,
    Timings,
    TokensEvent,
)
from server.settings import Settings
from server.targets.target import TargetInfo
from server.text import TextCodec

END, TURN_START, TURN_END = "<|end|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ANSWER = "Grüße 🌍, one two three. STOP and more"
BURST = 3


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: the alphabet, three special tokens and a handful of merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one two three and more, one two three"] * 4, trainer)
    return tokenizer


@dataclass(frozen=True)
class Drafting:
    state: str = "failed"
    reason: str = "the device is gone"


@dataclass(frozen=True)
class Status:
    running: int
    waiting: int
    slots: int
    free_slots: int
    drafting: Drafting = Drafting()


@dataclass
class Running:
    request: Request
    bursts: Iterator[tuple[int, ...]]
    num_tokens: int = 0
    stats: DraftStats = field(default_factory=DraftStats)
    timings: Timings = field(default_factory=Timings)


def ranks(token_ids: Sequence[int], num_top: int) -> tuple[Ranked, ...]:
    """Token i of 100 has the log-probability -i/100, and the tokens behind it are the less likely the further."""
    return tuple(
        Ranked(i, -i / 100, 1, tuple((i + step, -(i + step) / 100) for step in range(num_top))) for i in token_ids
    )


class ScriptedEngine:
    """Plays ``script(request)``, a burst of tokens a round; every token of a burst but the last counts as drafted.

    A burst None makes the request fail, a text gets its grammar stuck. ``turn`` paces it: the engine waits for the
    event before every round.
    """

    def __init__(self, script: Callable[[Request], Iterable[tuple[int, ...] | None]], **options: Any) -> None:
        self.script = script
        self.slots = options.get("slots", 4)
        self.max_waiting = options.get("max_waiting", 8)
        self.context = options.get("context", 200)
        self.round_s = options.get("round_s", 0.0)
        self.num_cached = 0
        self.step_in_hand: int | None = None
        self.turn = threading.Event()
        self.turn.set()
        self.lock = threading.Condition()
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.to_cancel: set[str] = set()
        self.cancelled: list[str] = []
        self.submitted: list[Request] = []
        self.stopping = False
        self.thread: threading.Thread | None = None

    def start(self, deliver: Callable[[list[Event]], None]) -> None:
        self.thread = threading.Thread(target=self._run, args=(deliver,), daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        with self.lock:
            if self.stopping:
                raise EngineStopped("the engine is stopped")
            if len(self.waiting) >= self.max_waiting:
                raise QueueFull(self.max_waiting, 3.2)
            if len(request.prompt_ids) + request.max_tokens > self.context:
                raise ContextTooLong(len(request.prompt_ids), request.max_tokens, self.context)
            self.submitted.append(request)
            self.waiting.append(Running(request, iter(self.script(request))))
            self.lock.notify()

    def cancel(self, request_id: str) -> None:
        with self.lock:
            self.to_cancel.add(request_id)
            self.lock.notify()

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            self.lock.notify()
        self.turn.set()
        if self.thread is not None:
            self.thread.join(5)

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def status(self) -> Status:
        with self.lock:
            return Status(len(self.running), len(self.waiting), self.slots, self.slots - len(self.running))

    def figures(self) -> EngineFigures:
        return EngineFigures(Counts(), 0.0, 0.0, 0.0, 0, 100, 0, {1: 0.004, 8: 0.006})

    def _run(self, deliver: Callable[[list[Event]], None]) -> None:
        while True:
            self.turn.wait()
            with self.lock:
                self.lock.wait_for(lambda: self.stopping or self.running or self.waiting or self.to_cancel, timeout=0.2)
                events = self._round()
                if events:
                    deliver(events)
                if self.stopping:
                    return
                if self.round_s:
                    self.lock.wait_for(lambda: self.stopping or self.to_cancel, timeout=self.round_s)

    def _round(self) -> list[Event]:
        while self.waiting and len(self.running) < self.slots:
            self.running.append(entry := self.waiting.pop(0))
            entry.timings.admitted = entry.timings.submitted + 0.005
        events: list[Event] = []
        for entry in [*self.running, *self.waiting]:
            request_id = entry.request.request_id
            if self.stopping or request_id in self.to_cancel:
                self.cancelled.append(request_id)
                events.append(self._end(entry, FinishReason.CANCELLED))
            elif entry in self.running:
                events.extend(self._advance(entry))
        self.to_cancel.clear()
        return events

    def _advance(self, entry: Running) -> list[Event]:
        events: list[Event] = []
        if not entry.timings.first_token and entry.request.prompt_logprobs is not None:
            ranked = ranks(entry.request.prompt_ids[1:], entry.request.prompt_logprobs)
            events.append(PromptEvent(entry.request.request_id, ranked))
        if entry.request.pools:
            events.append(PooledEvent(entry.request.request_id, (0.6, 0.8, 0.0, -0.0)))
        if entry.request.max_tokens == 0:
            return [*events, self._end(entry, FinishReason.LENGTH)]
        burst = next(entry.bursts, ())
        if burst is None:
            return [self._end(entry, FinishReason.FAILED, error="secret detail")]
        if isinstance(burst, str):
            return [self._end(entry, FinishReason.STUCK, error=burst)]
        request, taken = entry.request, []
        for token_id in burst:
            taken.append(token_id)
            if token_id in request.stop_ids or entry.num_tokens + len(taken) == request.max_tokens:
                break
        entry.num_tokens += len(taken)
        entry.timings.first_token = entry.timings.first_token or entry.timings.submitted + 0.01
        entry.stats.rounds += 1
        entry.stats.cached = self.num_cached
        entry.stats.drafted += 4
        entry.stats.accepted += max(len(taken) - 1, 0)
        entry.stats.committed += len(taken)
        drafted = tuple(index < len(taken) - 1 for index in range(len(taken)))
        ranked = () if request.num_logprobs is None else ranks(taken, request.num_logprobs)
        events += [TokensEvent(request.request_id, tuple(taken), drafted, ranked)] if taken else []
        if not taken or taken[-1] in request.stop_ids:
            events.append(self._end(entry, FinishReason.STOP))
        elif entry.num_tokens == request.max_tokens:
            events.append(self._end(entry, FinishReason.LENGTH))
        return events

    def _end(self, entry: Running, reason: FinishReason, error: str | None = None) -> FinishedEvent:
        for place in (self.running, self.waiting):
            if entry in place:
                place.remove(entry)
        entry.timings.finished = entry.timings.submitted + 0.11
        return FinishedEvent(entry.request.request_id, reason, entry.stats, entry.timings, error)


@dataclass(frozen=True)
class ScriptedModel:
    engine: ScriptedEngine
    codec: TextCodec
    name: str = "tiny"
    created: int = 1700000000
    drafter_name: str = "scripted"
    context_length: int = 200
    sampling: SamplingParams = field(default_factory=SamplingParams)
    info: TargetInfo = field(default_factory=lambda: TargetInfo("tiny", "Scripted", 300, 4, 1, 200, 1000, "fp32"))
    placement: Callable[[], dict[str, Any]] = lambda: {
        "reason": "",
        "target": {"device": "cpu", "layers": 1, "weights": "fp32", "weight_bytes": 4000, "kv_bytes": 800},
        "drafter": {"device": "cpu", "reason": "", "bytes": 500},
        "bus_bytes": {"up": 0, "down": 0},
    }


def chunked(token_ids: Iterable[int], size: int) -> list[tuple[int, ...]]:
    ids = list(token_ids)
    return [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    tokenizer = build_tokenizer()
    stop_ids = frozenset({tokenizer.token_to_id(END), tokenizer.token_to_id(TURN_END)})
    return TextCodec(tokenizer, stop_ids=stop_ids, templates={"default": TEMPLATE})


@pytest.fixture
def make_model(codec: TextCodec) -> Iterator[Callable[..., ScriptedModel]]:
    """``make_model(text=..., size=..., script=..., **engine options)``; engines are stopped at the end."""
    made: list[ScriptedEngine] = []

    def make(
        text: str = ANSWER, size: int = BURST, script: Callable[[Request], Any] | None = None, **options: Any
    ) -> ScriptedModel:
        ids = [*codec.encode(text), codec.tokenizer.token_to_id(END)]
        engine = ScriptedEngine(script or (lambda request: chunked(ids, size)), **options)
        made.append(engine)
        return ScriptedModel(engine, codec, context_length=engine.context)

    yield make
    for engine in made:
        engine.stop()


@pytest.fixture
def make_settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings that no variable of the surroundings reaches."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DOVETAIL_{name.upper()}", raising=False)
    return lambda **values: Settings(**({"model_name": "tiny", "max_waiting": 8} | values))
