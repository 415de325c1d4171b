"""What a run shows and keeps: progress, history with a plot, a clean stop."""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kernels.training.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

HISTORY_FILE = "training.json"
PLOT_FILE = "training.png"
BAR_WIDTH = 16
SCHEDULE_FIGURES = frozenset({"learning_rate", "grad_norm"})
BOOKKEEPING = frozenset(
    {"step", "epoch", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
)


class ProgressBar(TrainerCallback):
    """A bar with time left, loss and the task's figures on a terminal; elsewhere a line per report and half minute.

    The figures stand last, where a narrow terminal wraps them, and without the schedule's, which the log keeps.
    """

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("training"), BarColumn(BAR_WIDTH), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=False)),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.console = console
        self.heartbeat = Heartbeat("training", enabled=not console.is_terminal)
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where the run stands (a resumed run does not start at zero). One process shows it."""
        self.progress.disable = self.progress.disable or not state.is_world_process_zero
        self.progress.start()
        beat = self.heartbeat
        beat.enabled = beat.enabled and state.is_world_process_zero
        beat.total, beat.done, beat.first_done = state.max_steps, state.global_step, state.global_step
        beat.start()
        self.bar = self.progress.add_task("", total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.heartbeat.done = state.global_step
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest figures."""
        figures = figures_of(logs or {})
        if not figures:
            return
        text = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        shown = " ".join(f"{name} {value:.4g}" for name, value in figures.items() if name not in SCHEDULE_FIGURES)
        self.progress.update(self.bar, completed=state.global_step, figures=shown, refresh=True)
        if not self.console.is_terminal and state.is_world_process_zero:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the terminal as it was."""
        self.close()

    def close(self) -> None:
        """Also for a run that failed."""
        self.heartbeat.stop()
        self.progress.stop()


class History(TrainerCallback):
    """Keeps every report in ``training.json`` and draws ``training.png`` from it, at each save and at the end."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.plots = find_spec("matplotlib") is not None
        if not self.plots:
            logger.warning("matplotlib is not installed (extra train): %s will not be drawn", PLOT_FILE)

    def write(self, state: TrainerState) -> None:
        """Both files from the trainer's own log."""
        rows = [{"step": row["step"], **figures_of(row)} for row in state.log_history if figures_of(row)]
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / HISTORY_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if rows and self.plots:
            plot(rows, self.output / PLOT_FILE)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A killed run still leaves its curve up to the last checkpoint; the end of the run draws the whole one."""
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self.write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The whole run."""
        if state.is_world_process_zero:
            self.write(state)


class CleanStop(TrainerCallback):
    """Ctrl-C or SIGTERM finishes the step, saves and ends the run; a second one kills it."""

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def request(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the wish, give the previous handlers back."""
        self.requested = True
        self.close()
        logger.warning("stopping after this step; the checkpoint will be saved (Ctrl-C again to kill)")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Signals reach the main thread only; elsewhere there is nothing to install."""
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop. Several processes stop at the same step, whichever was asked first."""
        if anywhere(self.requested, args.device):
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        self.close()

    def close(self) -> None:
        """Also for a run that failed."""
        while self.previous:
            signal.signal(*self.previous.popitem())


class AfterStep(TrainerCallback):
    """Calls a function of the task after each optimiser step, before anything is evaluated or saved."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One call."""
        self.function()


class BeforeEvaluation(TrainerCallback):
    """Calls a function of the task after a step that an evaluation follows; what ``AfterStep`` calls comes first."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The trainer has decided by now."""
        if control.should_evaluate:
            self.function()


class AfterEvaluation(TrainerCallback):
    """Adds the figure ``eval_NAME`` that ``take`` returns to history and log after each evaluation."""

    def __init__(self, name: str, take: Callable[[], float]) -> None:
        self.name, self.take = f"eval_{name}", take

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The trainer has just gone through the evaluation split."""
        figure = self.take()
        state.log_history.append({"step": state.global_step, self.name: figure})
        if state.is_world_process_zero:
            logger.info("step %d of %d: %s %.4g", state.global_step, state.max_steps, self.name, figure)


class KeepBest(TrainerCallback):
    """Calls ``keep`` after each evaluation whose figure ``eval_NAME`` is larger than all before, a resumed run's too.

    It must stand behind the callback that adds the figure. One process keeps.
    """

    def __init__(self, name: str, keep: Callable[[], None]) -> None:
        self.name, self.keep = f"eval_{name}", keep

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The figures of the evaluation are in the history."""
        *before, newest = [row[self.name] for row in state.log_history if self.name in row]
        if state.is_world_process_zero and all(newest > figure for figure in before):
            self.keep()


class Epochs(Protocol):
    """A data set whose samples depend on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""


class EpochAnnouncer(TrainerCallback):
    """Tells the data set which epoch begins.

    The loader does so too, but not in the epoch in which a run is resumed, nor with several processes: there it stops
    at the first sampler that listens.
    """

    def __init__(self, data: Epochs) -> None:
        self.data = data

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """``state.epoch`` is a fraction where a run is resumed inside an epoch."""
        self.data.set_epoch(int(state.epoch or 0.0))


def anywhere(wish: bool, device: torch.device) -> bool:
    """Whether ``wish`` is true in any process of the run."""
    if not torch.distributed.is_initialized():
        return wish
    flag = torch.tensor(float(wish), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def figures_of(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a log row that describe the training itself."""
    return {
        name: value
        for name, value in row.items()
        if name not in BOOKKEEPING and isinstance(value, int | float) and math.isfinite(value)
    }


def panels_of(rows: list[dict[str, float]]) -> dict[str, list[str]]:
    """Figures by panel: evaluation figures share that of their training twin, ``accuracy_2`` that of ``accuracy``."""
    panels: dict[str, list[str]] = {}
    for name in sorted({name for row in rows for name in row if name != "step"}, key=natural_order):
        panels.setdefault(re.sub(r"_\d+$", "", name.removeprefix("eval_")), []).append(name)
    return dict(sorted(panels.items()))


def natural_order(name: str) -> tuple[str, int]:
    """Sorts ``accuracy_10`` behind ``accuracy_2``."""
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdigit() else (name, 0)


def plot(rows: list[dict[str, float]], file: Path) -> None:
    """One panel per kind of figure, over optimiser steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(rows)
    figure = Figure(figsize=(7, 2.4 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (panel, names) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            label = name.removeprefix("eval_").replace(panel, "held out" if name.startswith("eval_") else "training")
            axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else None)
        axis.set_ylabel(panel)
        axis.grid(alpha=0.3)
        # A fixed place: looking for the best one takes matplotlib seconds on a long run, and it warns of it.
        axis.legend(loc="upper right")
    axis.set_xlabel("step")
    figure.savefig(file, dpi=110)
