"""Lines without a terminal: what they say, that they come by themselves, and the log in the run's folder."""

import logging
import threading
from pathlib import Path

import pytest

from kernels.training import heartbeat
from kernels.training.heartbeat import Heartbeat, duration, run_log


def test_a_line_says_how_far_and_how_long() -> None:
    beat = Heartbeat("training", total=110, done=10)
    assert beat.line(50.0) == "training: 10 of 110, 50 s so far"
    beat.done = 60
    assert beat.line(600.0) == "training: 60 of 110, 10 min so far, about 10 min left"
    assert Heartbeat("loading").line(45.0) == "loading: 45 s so far"
    assert [duration(s) for s in (0, 99, 100, 11_100)] == ["0 s", "99 s", "2 min", "3 h 05 min"]


def test_lines_come_while_nothing_else_happens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.001)
    came = threading.Event()
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if len(lines) > 2:
                came.set()

    listener = Listener()
    caplog.set_level(logging.INFO, heartbeat.logger.name)
    heartbeat.logger.addHandler(listener)
    try:
        with Heartbeat("loading the target"):
            assert came.wait(20)
        with Heartbeat("training", enabled=False) as silent:
            assert silent.thread is None
    finally:
        heartbeat.logger.removeHandler(listener)
    assert lines[0] == "loading the target"
    assert all(line.startswith("loading the target") for line in lines)


def test_the_runs_folder_is_there_from_the_first_second(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "mine"
    with run_log({"training": {"output": str(output)}}):
        assert (output / "run.log").is_file()
        logging.getLogger("drafters").warning("a word")
    logging.getLogger("drafters").warning("not this one")
    text = (output / "run.log").read_text()
    assert "WARNING drafters: a word" in text
    assert "not this one" not in text
    with run_log({"training": 3}):
        pass
