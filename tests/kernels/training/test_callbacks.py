import json
import logging
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from kernels.training import callbacks
from kernels.training.callbacks import CleanStop, History, KeepBest, ProgressBar, anywhere, figures_of


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])


def state(**values: Any) -> TrainerState:
    return TrainerState(**({"max_steps": 10, "is_world_process_zero": True} | values))


def test_progress_goes_to_the_log_where_there_is_no_terminal(
    arguments: TrainingArguments, caplog: pytest.LogCaptureFixture
) -> None:
    bar = ProgressBar(Console(file=StringIO()))
    caplog.set_level(logging.INFO)
    bar.on_train_begin(arguments, state(global_step=4), TrainerControl())
    bar.on_log(arguments, state(global_step=6), TrainerControl(), logs={"loss": 0.5, "epoch": 1.0})
    bar.on_log(arguments, state(global_step=6, is_world_process_zero=False), TrainerControl(), logs={"loss": 9.0})
    bar.close()
    assert [record.message for record in caplog.records] == [
        "training: 4 of 10, 0 s so far",
        "step 6 of 10: loss 0.5",
    ]


def test_progress_bar_on_a_terminal_starts_where_the_run_stands(arguments: TrainingArguments) -> None:
    screen = StringIO()
    bar = ProgressBar(Console(file=screen, force_terminal=True, width=100))
    bar.on_train_begin(arguments, state(global_step=4), TrainerControl())
    bar.on_step_end(arguments, state(global_step=5), TrainerControl())
    bar.on_log(arguments, state(global_step=5), TrainerControl(), logs={"loss": 0.25})
    bar.on_train_end(arguments, state(global_step=5), TrainerControl())
    assert "5/10" in screen.getvalue()
    assert "loss 0.25" in screen.getvalue()


def test_the_best_evaluation_is_kept_once_and_by_one_process(arguments: TrainingArguments) -> None:
    kept: list[float] = []
    log: list[dict[str, float]] = [{"loss": 3.0}]
    keeper = KeepBest("top1", lambda: kept.append(log[-1]["eval_top1"]))
    for figure in (0.2, 0.5, 0.5, 0.4, 0.6):
        log.append({"eval_top1": figure})
        keeper.on_evaluate(arguments, state(log_history=log), TrainerControl())
    keeper.on_evaluate(
        arguments, state(log_history=[{"eval_top1": 0.9}], is_world_process_zero=False), TrainerControl()
    )
    assert kept == [0.2, 0.5, 0.6]


@pytest.fixture
def python_handler() -> Iterator[None]:
    """Shells start background jobs with SIGINT ignored; the test needs Python's own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handler")
def test_second_interrupt_reaches_the_previous_handler(arguments: TrainingArguments) -> None:
    stop, control = CleanStop(), TrainerControl()
    with pytest.raises(KeyboardInterrupt):
        stop.on_train_begin(arguments, state(), control)
        signal.raise_signal(signal.SIGINT)
        stop.on_step_end(arguments, state(), control)
        assert control.should_save and control.should_training_stop
        signal.raise_signal(signal.SIGINT)
    stop.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_saves_as_well(arguments: TrainingArguments) -> None:
    stop, control, before = CleanStop(), TrainerControl(), signal.getsignal(signal.SIGTERM)
    stop.on_train_begin(arguments, state(), control)
    signal.raise_signal(signal.SIGTERM)
    stop.on_step_end(arguments, state(), control)
    assert control.should_save and control.should_training_stop
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_stops_without_a_wish(arguments: TrainingArguments) -> None:
    control = TrainerControl()
    CleanStop().on_step_end(arguments, state(), control)
    assert not control.should_training_stop
    assert anywhere(True, torch.device("cpu"))
    assert not anywhere(False, torch.device("cpu"))


def test_history_without_matplotlib_still_writes_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)
    History(tmp_path).write(state(log_history=[{"step": 1, "loss": 2.0, "epoch": 0.1}]))
    assert json.loads((tmp_path / "training.json").read_text()) == [{"step": 1, "loss": 2.0}]
    assert not (tmp_path / "training.png").exists()
    assert "matplotlib is not installed" in caplog.text


def test_figures_leave_out_bookkeeping_and_what_json_cannot_hold() -> None:
    assert figures_of({"loss": 1, "epoch": 2.0, "total_flos": 3.0, "name": "x", "bad": float("nan")}) == {"loss": 1}
