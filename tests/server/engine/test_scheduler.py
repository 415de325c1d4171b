"""Who runs next, tried without a model: time passes as a made-up machine would take it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from server.engine.cost import PrefillPace
from server.engine.measure import fixed_chunk
from server.engine.request import EngineError, FinishReason, Request
from server.engine.scheduler import CHUNK_S, CHUNK_STEP, PATIENCE, Limits, Scheduler
from server.engine.sequence import RunningSequence, Status
from server.targets.target import PrefillChunk

ROW_S = 0.002


def sequence(
    name: str, num_prompt: int, max_tokens: int = 8, submitted: float = 0.0, **more: object
) -> RunningSequence:
    made = RunningSequence.of(Request(name, [0] * num_prompt, max_tokens, **more))  # type: ignore[arg-type]
    made.timings.submitted = submitted
    return made


def scheduler(slots: int = 4, rows: int = 10_000, fixed_chunk: int | None = None) -> Scheduler:
    return Scheduler(Limits(slots, rows, 8, fixed_chunk), PrefillPace(ROW_S))


@dataclass
class Machine:
    """A clock and the engine's turns: a chunk, then a round in which every request gets one to three tokens."""

    scheduler: Scheduler
    chance: random.Random
    now: float = 0.0
    first_token: dict[str, float] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    preempted: int = 0
    longest_chunk_s: float = 0.0

    def step(self) -> None:
        self.preempt(self.scheduler.in_the_way)
        self.scheduler.admit()
        reading = self.scheduler.next_prefill()
        if reading is not None:
            self.read(reading)
        self.preempt(self.scheduler.crowded_out)
        decoding = self.scheduler.decoding()
        self.now += 0.01 * bool(decoding)
        for running in decoding:
            self.commit(running, self.chance.randint(1, 3))
        self.scheduler.check_integrity()

    def preempt(self, victim: Callable[[], RunningSequence | None]) -> None:
        while (found := victim()) is not None:
            self.scheduler.preempt(found)
            self.preempted += 1

    def read(self, reading: RunningSequence) -> None:
        rows = self.scheduler.chunk_rows(reading)
        assert rows > 0
        seconds = rows * ROW_S * self.chance.uniform(0.9, 1.1)
        self.now += seconds
        self.longest_chunk_s = max(self.longest_chunk_s, seconds)
        reading.read(rows)
        self.scheduler.pace.record(rows, seconds)
        if reading.status is Status.DECODING and reading.num_output == 0:
            self.first_token[reading.request_id] = self.now
            self.commit(reading, 1)

    def commit(self, running: RunningSequence, count: int) -> None:
        kept, reason = running.commit((1,) * count)
        running.num_rows = len(running.token_ids) - 1
        self.texts[running.request_id] = self.texts.get(running.request_id, 0) + len(kept)
        if reason is not None:
            assert reason is FinishReason.LENGTH
            self.scheduler.remove(running)


@pytest.mark.parametrize("rows", [320, 700, 2000])
def test_thousands_of_requests_all_end_and_lose_nothing(rows: int) -> None:
    chance = random.Random(rows)
    machine = Machine(scheduler(6, rows), chance)
    waiting = [
        sequence(
            f"r{i}", chance.choice([1, 5, 40, 200]), chance.randint(1, 25), priority=chance.choice([0, 0, 0, -1, 3]),
            deadline_s=chance.choice([None, None, 0.5]),
        )
        for i in range(3400)
    ]  # fmt: skip
    lengths = {s.request_id: s.request.max_tokens for s in waiting}
    cancelled = set[str]()
    while waiting or machine.scheduler.has_work:
        while waiting and chance.random() < 0.2:
            arrived = waiting.pop()
            arrived.timings.submitted = machine.now
            machine.scheduler.add(arrived)
        if chance.random() < 0.02:
            known = [*machine.scheduler.running, *(s.request_id for s in machine.scheduler.waiting)]
            if known:
                cancelled.add(chance.choice(known))
                found = machine.scheduler.find(max(cancelled & set(known)))
                assert found is not None
                machine.scheduler.remove(found)
        machine.step()
    assert machine.scheduler.free_rows == rows
    assert sorted(machine.scheduler.free_slots) == list(range(6))
    for name, wanted in lengths.items():
        assert name in cancelled or machine.texts[name] == wanted
    assert machine.preempted > 0
    assert machine.longest_chunk_s < 0.1


def test_a_short_prompt_passes_a_long_one_and_the_long_one_is_not_forgotten() -> None:
    machine = Machine(scheduler(), random.Random(1))
    machine.scheduler.add(sequence("long", 3000))
    machine.step()
    machine.scheduler.add(sequence("short", 20, submitted=machine.now))
    machine.step()
    assert list(machine.first_token) == ["short"]
    number = 0
    while "long" not in machine.first_token:  # short ones without end
        if len(machine.scheduler.waiting) < 2:
            machine.scheduler.add(sequence(f"s{(number := number + 1)}", 40, 2, submitted=machine.now))
        machine.step()
    # due after PATIENCE times what it takes to read; then read, with a round behind every chunk
    assert machine.now < (PATIENCE + 1.5) * 3000 * ROW_S


def test_deadlines_and_priorities_decide_who_is_read_first() -> None:
    made = scheduler(slots=1)
    for name, more in {"late": {"deadline_s": 9.0}, "soon": {"deadline_s": 1.0}, "first": {"priority": -1}}.items():
        made.add(sequence(name, 50, **more))  # type: ignore[arg-type]
    made.add(sequence("usual", 50))
    order = []
    while made.waiting:
        made.admit()
        (running,) = made.running.values()
        order.append(running.request_id)
        made.remove(running)
    assert order == ["first", "usual", "soon", "late"]


def test_a_better_priority_takes_a_place_and_a_sooner_deadline_does_not() -> None:
    made = scheduler(slots=2)
    for name in ("a", "b"):
        made.add(sequence(name, 50, priority=1))
    made.admit()
    made.add(sequence("same", 5, priority=1, deadline_s=0.0))
    assert made.in_the_way() is None
    made.add(sequence("better", 5, priority=0))
    displaced = made.in_the_way()
    assert displaced is not None
    assert displaced.request_id == "b"  # of two alike the one that came later
    made.preempt(displaced)
    assert made.in_the_way() is None
    made.admit()
    assert set(made.running) == {"a", "better"}
    assert [s.request_id for s in made.waiting] == ["same", "b"]


def test_nobody_passes_one_that_has_no_room_yet() -> None:
    made = scheduler(rows=200)
    made.add(sequence("runs", 100, submitted=-50))
    made.admit()
    made.add(sequence("wide", 150, deadline_s=0.01))
    made.add(sequence("narrow", 5))
    made.admit()
    assert set(made.running) == {"runs"}
    made.remove(made.running["runs"])
    made.admit()
    assert "wide" in made.running


def test_chunks_take_the_time_they_may_or_end_at_fixed_borders() -> None:
    free, fixed = scheduler(), scheduler(fixed_chunk=64)
    reading = sequence("r", 1000)
    rows = free.chunk_rows(reading)
    assert CHUNK_S / ROW_S - CHUNK_STEP < rows <= CHUNK_S / ROW_S
    for _ in range(20):
        free.pace.record(64, 0.64)  # a slow machine, or a long text before it
    assert free.chunk_rows(reading) == CHUNK_STEP  # never less
    reading.num_rows = 40
    assert fixed.chunk_rows(reading) == 24
    reading.num_rows = 990
    assert fixed.chunk_rows(reading) == 10


def test_chunks_shrink_where_their_time_varies_and_grow_again() -> None:
    made = scheduler()
    reading = sequence("r", 1000)
    usual = made.chunk_rows(reading)
    made.pace.record(usual, 1.9 * usual * ROW_S)  # somebody else had the machine for a while
    made.pace.record(usual, usual * ROW_S)
    assert made.chunk_rows(reading) * ROW_S * 1.7 < CHUNK_S
    for _ in range(40):
        made.pace.record(usual, usual * ROW_S)
    assert made.chunk_rows(reading) == usual


class Reader:
    """A target that reads, and what its passes take by its own clock."""

    def __init__(self, row_s: float, exact_rows: bool = False) -> None:
        self.info = SimpleNamespace(vocab_size=9, exact_rows=exact_rows)
        self.row_s = row_s
        self.now = 0.0
        self.held = 0

    def perf_counter(self) -> float:
        return self.now

    def prefill(self, chunk: PrefillChunk) -> None:
        self.held += len(chunk.token_ids)
        self.now += 0.005 + self.row_s * len(chunk.token_ids)

    def release(self, slot: int) -> None:
        self.held = 0


@pytest.mark.parametrize(("row_s", "rows"), [(0.0005, 64), (0.0012, 32), (0.003, 16), (0.02, 8)])
def test_fixed_chunks_are_as_long_as_time_allows(row_s: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Reader(row_s)
    monkeypatch.setattr("server.engine.measure.time", slow)
    assert fixed_chunk(slow) == rows  # type: ignore[arg-type]
    assert slow.held == 0, "its slot is left empty"
    assert fixed_chunk(Reader(row_s, exact_rows=True)) == 64  # type: ignore[arg-type]


def test_a_leak_is_seen() -> None:
    made = scheduler(slots=2, rows=300)
    made.add(sequence("r", 10))
    made.admit()
    made.check_integrity()
    made.running["r"].reserved = 400
    with pytest.raises(EngineError, match="100 rows more"):
        made.check_integrity()
    made.running.clear()
    with pytest.raises(EngineError, match="slots leaked"):
        made.check_integrity()
