"""The benchmark of several streams, on a tiny target: what it counts, and that it leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from doubles import tiny_llama
from drafters.proposal import Budget
from kernels import native
from server.bench.streams import (
    DOVETAIL,
    PLAIN,
    Setup,
    StreamsError,
    choices_report,
    decode_report,
    decode_run,
    gap_report,
    requests_for,
    second_turn_report,
)
from server.bench.streams_plot import plot_streams
from server.targets.native_target import NativeTarget

PROMPT = [(5 * i) % 67 for i in range(64)]


@pytest.fixture(scope="module")
def setup(save_model: Callable[..., Path]) -> Setup:
    if native.library() is None:
        pytest.skip("the native kernels are not built")
    target = NativeTarget.load(save_model(tiny_llama(), "streams"), "bf16", 4, 220)
    return Setup(target, 4, 200, Budget(8, 2, 3))


def test_streams_are_measured_beside_plain_decoding(setup: Setup, tmp_path: Path) -> None:
    engines = {
        PLAIN: setup.engine(None, lookup=False, by_cost=False),
        DOVETAIL: setup.engine(None, lookup=True, by_cost=False, rows=4),
    }
    told: list[str] = []
    report = decode_report(engines, [[i, *PROMPT] for i in range(3)], [1, 3], 12, 1, told.append)
    assert set(report) == {PLAIN, DOVETAIL} and set(report[PLAIN]) == {"1", "3"}  # type: ignore[call-overload]
    assert report[PLAIN]["3"]["of_plain"] == 1.0  # type: ignore[index]
    assert len(told) == 2 * 2 * 2
    for engine in engines.values():
        engine.check_integrity()
        assert not engine.scheduler.has_work
    head = {"hardware": {"cores": 2}, "target": {"name": "tiny", "weights": "bf16"}, "decode": report}
    servers = {"dovetail": {"1": {"tokens_per_s": 9.0}}, "unavailable": {"llama.cpp": "no"}}
    plot_streams(head | {"servers": servers}, tmp_path / "streams.png")
    assert (tmp_path / "streams.png").stat().st_size > 1000


def test_too_short_streams_are_no_measurement(setup: Setup) -> None:
    engine = setup.engine(None, lookup=False, by_cost=False)
    with pytest.raises(StreamsError, match="more tokens a stream"):
        decode_run(engine, requests_for([[1], [*PROMPT, *PROMPT]], 1))
    assert not engine.scheduler.has_work


def test_what_a_request_waits_for(setup: Setup) -> None:
    engine = setup.engine(None, lookup=False, by_cost=False)
    turn = second_turn_report(engine, PROMPT, [1, 2, 3], 1)
    assert (turn["prompt_tokens"], turn["new_tokens"]) == (65, 3)
    choices = choices_report(engine, PROMPT[1:], 1)
    assert choices["tokens_read"] == 64 + 3 * 16, "the first reads all, the others their last page"
    gap = gap_report(setup.engine(None, lookup=False, by_cost=False), [9, 8], PROMPT, 1)
    assert 0 < gap["usual_gap_ms"] <= gap["longest_gap_ms"]  # type: ignore[operator]
    assert not any(setup.target.slots.lengths)  # type: ignore[attr-defined]
