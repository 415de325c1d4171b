"""The engine's thread: bounded, cancellable, alive after errors, quiet when idle."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from doubles import tiny_llama
from server.engine.engine import Engine, EngineOptions
from server.engine.request import (
    ContextTooLong,
    EngineStopped,
    Event,
    FinishedEvent,
    FinishReason,
    QueueFull,
    Request,
    SamplingParams,
)
from server.engine.thread import EngineThread, Submit
from server.targets.torch_target import TorchTarget

GREEDY = SamplingParams(temperature=0)
WAIT_S = 30.0


@pytest.fixture(scope="module")
def target(save_model: Callable[..., Path]) -> TorchTarget:
    return TorchTarget.load(save_model(tiny_llama(), "thread"), "fp32", 2, 260)


@pytest.fixture
def running(target: TorchTarget) -> Iterator[tuple[EngineThread, "queue.Queue[Event]"]]:
    thread = EngineThread(Engine(target, None, EngineOptions(max_seqs=2, context_length=250)), max_waiting=2)
    events: queue.Queue[Event] = queue.Queue()
    thread.start(lambda batch: [events.put(event) for event in batch])  # type: ignore[func-returns-value]
    yield thread, events
    thread.stop()


def finished(events: "queue.Queue[Event]", count: int) -> dict[str, FinishReason]:
    ends: dict[str, FinishReason] = {}
    while len(ends) < count:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, FinishedEvent):
            ends[event.request_id] = event.reason
    return ends


def test_requests_from_many_threads_all_finish(running: tuple[EngineThread, "queue.Queue[Event]"]) -> None:
    thread, events = running
    callers = [threading.Thread(target=thread.submit, args=(Request(f"r{i}", [i + 1], 5, GREEDY),)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert finished(events, 4) == {f"r{i}": FinishReason.LENGTH for i in range(4)}
    assert thread.status().free_slots == 2


def test_the_queue_is_bounded_and_says_when_to_come_back(
    running: tuple[EngineThread, "queue.Queue[Event]"],
) -> None:
    thread, events = running
    for i in range(4):
        thread.submit(Request(f"r{i}", [1], 200, GREEDY))
    with pytest.raises(QueueFull) as full:
        thread.submit(Request("late", [1], 200, GREEDY))
    assert 0 < full.value.retry_after_s <= 120
    for i in range(4):
        thread.cancel(f"r{i}")
    assert set(finished(events, 4).values()) == {FinishReason.CANCELLED}
    thread.submit(Request("next", [1], 2, GREEDY))
    assert finished(events, 1) == {"next": FinishReason.LENGTH}


def test_what_does_not_fit_is_refused_at_the_door(running: tuple[EngineThread, "queue.Queue[Event]"]) -> None:
    thread, _ = running
    with pytest.raises(ContextTooLong):
        thread.submit(Request("long", [1] * 249, 2, GREEDY))
    assert thread.alive
    assert thread.status().waiting == 0


def test_stop_ends_what_runs_and_refuses_what_comes(target: TorchTarget) -> None:
    thread = EngineThread(Engine(target, None, EngineOptions(2, 250)), max_waiting=4)
    events: queue.Queue[Event] = queue.Queue()
    thread.start(lambda batch: [events.put(event) for event in batch])  # type: ignore[func-returns-value]
    for i in range(3):
        thread.submit(Request(f"r{i}", [1], 240, GREEDY))
    time.sleep(0.05)
    thread.stop()
    assert set(finished(events, 3).values()) == {FinishReason.CANCELLED}
    assert not thread.alive
    with pytest.raises(EngineStopped):
        thread.submit(Request("late", [1], 2, GREEDY))
    assert target.slots.lengths == [0, 0]


@pytest.mark.parametrize("dies", [False, True])
def test_what_is_to_be_done_at_the_end_is_done_when_it_ends_as_it_should(target: TorchTarget, dies: bool) -> None:
    engine = Engine(target, None, EngineOptions(max_seqs=2, context_length=250))
    thread = EngineThread(engine, max_waiting=2)
    found: list[bool] = []
    thread.at_end = lambda: found.append(engine.scheduler.has_work)
    if dies:
        engine.step = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    ended: queue.Queue[list[Event]] = queue.Queue()
    thread.start(ended.put)
    thread.submit(Request("r", [1], 200, GREEDY))
    ended.get(timeout=WAIT_S)
    thread.stop()
    thread.thread.join(WAIT_S)
    assert found == ([] if dies else [False])  # the request was cancelled first
    assert not thread.alive


def test_an_idle_engine_does_not_spin(running: tuple[EngineThread, "queue.Queue[Event]"]) -> None:
    thread, events = running
    thread.submit(Request("r", [1], 2, GREEDY))
    finished(events, 1)
    steps = []
    real_step = thread.engine.step
    thread.engine.step = lambda: steps.append(1) or real_step()  # type: ignore[method-assign, func-returns-value]
    time.sleep(0.2)
    assert steps == []


def test_a_step_that_throws_ends_what_ran_in_it_and_nothing_else(target: TorchTarget) -> None:
    engine = Engine(target, None, EngineOptions(max_seqs=1, context_length=250))
    thread = EngineThread(engine, max_waiting=4)
    real_admit, faults = engine.scheduler.admit, [RuntimeError("no rows today")]

    def admit() -> None:
        real_admit()
        if faults:
            raise faults.pop()

    engine.scheduler.admit = admit  # type: ignore[method-assign]
    events: queue.Queue[Event] = queue.Queue()
    thread.start(lambda batch: [events.put(event) for event in batch])  # type: ignore[func-returns-value]
    for i in range(3):
        thread.submit(Request(f"r{i}", [1], 5, GREEDY))
    ends = finished(events, 3)
    assert sorted(ends.values()) == [FinishReason.FAILED, FinishReason.LENGTH, FinishReason.LENGTH]
    assert thread.alive and thread.status().free_slots == 1
    thread.stop()


def test_an_engine_that_keeps_failing_is_given_up_and_everybody_gets_an_end(target: TorchTarget) -> None:
    engine = Engine(target, None, EngineOptions(max_seqs=1, context_length=250))
    thread = EngineThread(engine, max_waiting=9)
    engine.step = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    engine.cancel = lambda request_id: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    events: queue.Queue[Event] = queue.Queue()
    for i in range(6):
        thread.inbox.put(Submit(Request(f"r{i}", [1], 5, GREEDY)))
        thread.unfinished.add(f"r{i}")
    thread.start(lambda batch: [events.put(event) for event in batch])  # type: ignore[func-returns-value]
    assert len(finished(events, 6)) == 6
    thread.thread.join(WAIT_S)
    assert not thread.alive and not thread.unfinished


def test_a_request_still_in_the_inbox_gets_its_end_when_the_engine_stops(target: TorchTarget) -> None:
    thread = EngineThread(Engine(target, None, EngineOptions(2, 250)), max_waiting=4)
    events: queue.Queue[Event] = queue.Queue()
    thread.inbox.put(None)  # it stops before it takes anything in
    thread.stopping = True
    thread.unfinished.add("late")
    thread.start(lambda batch: [events.put(event) for event in batch])  # type: ignore[func-returns-value]
    assert finished(events, 1) == {"late": FinishReason.CANCELLED}
