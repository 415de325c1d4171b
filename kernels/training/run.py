"""One training run on ``transformers.Trainer``: resumable, interruptible, with progress, history and a plot.

A task is a module whose ``forward(**batch)`` returns a dictionary with the scalar ``loss`` and, beside it, named
scalars to report. It owns the student, frozen teachers kept out of its state, and the losses; this file knows none of
them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from kernels.training.callbacks import CleanStop, EpochAnnouncer, History, ProgressBar, figures_of
from kernels.training.optimizer import create_optimizer, create_schedule, freeze
from kernels.training.options import RecipeError, TrainingOptions

FINGERPRINT_FILE = "recipe.json"
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "trainer_state.json"  # the trainer writes it last, so a checkpoint without it is incomplete

Task = nn.Module
Collate = Callable[[list[Any]], dict[str, Tensor]]


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Metric:
    """The evaluation figure, without its ``eval_``, that says which evaluation of a run is the best."""

    name: str = "loss"
    larger_is_better: bool = False


@dataclass(frozen=True)
class TrainingReport:
    """What a run ended with: ``final`` the last figures, ``best`` those of the best evaluation and its step."""

    final: dict[str, float]
    best: dict[str, float]
    seconds: float
    checkpoint: str
    finished: bool


class TaskTrainer(Trainer):
    """Trainer that reads the loss and the named figures out of a task's dictionary."""

    def __init__(self, batch_sampler: Sampler[list[int]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch_sampler = batch_sampler
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss; its other figures are summed until the next report, weighted by the size of the batch."""
        outputs = model(**inputs)
        prefix = "" if model.training else "eval_"
        size = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 1)
        for name, value in outputs.items():
            if name != "loss" and isinstance(value, Tensor | float) and torch.as_tensor(value).numel() == 1:
                self.sums[prefix + name] += float(value) * size
                self.counts[prefix + name] += size
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The task's own batches where it has any; with several processes each takes every n-th batch."""
        if self.batch_sampler is None:
            usual: DataLoader[Any] = super().get_train_dataloader()
            return usual
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Evaluation needs the loss alone; predictions are the evaluators' business.

        With several processes the last batches are filled up with samples of the first ones: those are cut off, so that
        nothing is counted twice. A process whose batch is all filling answers a loss that the trainer drops.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0:
            own = real_rows(state.remainder, self.accelerator.process_index, self.args.per_device_eval_batch_size)
            inputs = first_rows(inputs, own)
            if own == 0:
                return torch.zeros((), device=self.args.device), None, None
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means, over all processes, of the figures gathered since the last report of the same kind."""
        evaluating = any(name.startswith("eval_") for name in logs)
        for name in sorted(n for n in self.sums if n.startswith("eval_") == evaluating):
            share = torch.tensor([self.sums.pop(name), float(self.counts.pop(name))], device=self.args.device)
            total, count = self.accelerator.reduce(share, "sum").tolist()
            logs[name] = total / count
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingDivergedError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; lower the learning rate, lengthen the "
                f"warmup or clip the gradient, and resume from the last checkpoint in {self.args.output_dir}"
            )
        kept = {k: v for k, v in logs.items() if not k.endswith(("_runtime", "_per_second"))}
        super().log(kept, start_time)


def real_rows(remainder: int, process: int, batch_size: int) -> int:
    """How many rows of a process's last batch are the data's, where all the processes' batches hold ``remainder``."""
    return min(batch_size, max(0, remainder - process * batch_size))


def first_rows(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first ``count`` samples of a batch; what is not one value a sample stays."""
    size = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 0)
    return {
        name: value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
        for name, value in inputs.items()
    }


def run(
    task: Task,
    train_data: Dataset[Any],
    options: TrainingOptions,
    *,
    eval_data: Dataset[Any] | None = None,
    collate: Collate | None = None,
    batch_sampler: Sampler[list[int]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    recipe: Mapping[str, Any] | None = None,
    resume: bool = False,
    console: Console | None = None,
    metric: Metric = Metric(),
) -> TrainingReport:
    """Train ``task`` in place.

    ``recipe`` is what the user wrote; its fingerprint guards resuming. ``resume`` continues from the newest checkpoint
    in ``options.output``; without it the folder must hold none. ``batch_sampler`` chooses the samples of each batch
    where shuffling alone will not do (it has ``batch_size`` and ``drop_last``). ``callbacks`` are the task's own.
    ``metric`` chooses the report's ``best``.

    A resumed run equals an uninterrupted one bit for bit (on a CPU) if random augmentation is a function of seed, epoch
    and index: a data set or batch sampler with a ``set_epoch`` method is told the epoch, whereas the global generators
    are restored only after the loader has read ahead. Inside the task they may be used freely.

    Errors: RecipeError where the folder or the machine and the wish do not fit together, TrainingDivergedError where
    the loss stops being a number.
    """
    output = Path(options.output)
    if options.precision == "fp16" and not torch.accelerator.is_available():
        raise RecipeError('training.precision = "fp16" needs a GPU; on a CPU choose bf16 or fp32')
    checkpoint = prepare_output(output, options, recipe, resume)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    progress, stop = ProgressBar(console or Console(stderr=True)), CleanStop()
    own = [*callbacks, progress, History(output), stop]
    trainer = create_trainer(task, train_data, options, eval_data, collate, batch_sampler, own)
    started = time.perf_counter()
    try:
        if (
            checkpoint is not None
            and TrainerState.load_from_json(f"{checkpoint}/{STATE_FILE}").global_step >= options.steps
        ):
            load_finished(trainer, Path(checkpoint))
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
        stop.close()
    return report(trainer, output, time.perf_counter() - started, metric)


def create_trainer(
    task: Task,
    train_data: Dataset[Any],
    options: TrainingOptions,
    eval_data: Dataset[Any] | None,
    collate: Collate | None,
    batch_sampler: Sampler[list[int]] | None,
    callbacks: Sequence[TrainerCallback],
) -> TaskTrainer:
    """The trainer of a run, with nothing on the terminal but what ``callbacks`` show."""
    listeners: list[Any] = [part for part in (train_data, batch_sampler) if hasattr(part, "set_epoch")]
    announcers = [EpochAnnouncer(part) for part in listeners]
    freeze(task, options)
    optimizer = create_optimizer(task, options)
    trainer = TaskTrainer(
        batch_sampler=batch_sampler,
        model=task,
        args=training_arguments(options, evaluates=eval_data is not None, data=train_data),
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collate,
        optimizers=(optimizer, create_schedule(optimizer, options)),
        callbacks=[*callbacks, *announcers],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in {"PrinterCallback", "ProgressCallback"}:
            trainer.remove_callback(callback)
    return trainer


def prepare_output(
    output: Path, options: TrainingOptions, recipe: Mapping[str, Any] | None, resume: bool
) -> str | None:
    """The checkpoint to resume from, or None for a fresh run; the recipe's fingerprint is kept beside it."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(recipe) if recipe is not None else dataclasses.asdict(options), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file = output / FINGERPRINT_FILE
    checkpoint = last_checkpoint(output)
    if checkpoint is not None and not resume:
        raise RecipeError(f"{output} already holds {checkpoint.name}; resume it (--resume) or choose another output")
    if checkpoint is not None and file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["sha256"] != digest:
            raise RecipeError(
                f"the recipe changed since {checkpoint.name} was written (compare {file}); resume with the recipe that "
                "began the run, or train into another output"
            )
    file.write_text(json.dumps({"sha256": digest, "recipe": json.loads(text)}, indent=1) + "\n", encoding="utf-8")
    return None if checkpoint is None else str(checkpoint)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint in ``output``; one that a killed run left half written is passed over."""
    found = {
        int(folder.name.removeprefix("checkpoint-")): folder
        for folder in output.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit() and (folder / STATE_FILE).is_file()
    }
    return found[max(found)] if found else None


def sees_epoch_everywhere(data: Any) -> bool:
    """Whether workers that outlive an epoch learn of the next: ``data.epoch`` lies in shared memory, or is none."""
    return not hasattr(data, "set_epoch") or isinstance(getattr(data, "epoch", None), Tensor)


def training_arguments(options: TrainingOptions, evaluates: bool, data: Any) -> TrainingArguments:
    """The recipe's options in the trainer's words; workers live as long as the loader where ``data`` lets them."""
    return TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant" if options.schedule == "step" else options.schedule,
        lr_scheduler_kwargs={} if options.schedule == "step" else dict(options.schedule_options),
        warmup_steps=options.warmup_steps,
        max_grad_norm=options.clip_norm,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.evaluate_every or options.save_every,
        save_steps=options.save_every,
        save_total_limit=options.keep_checkpoints,
        dataloader_num_workers=options.loader_workers,
        dataloader_persistent_workers=options.loader_workers > 0 and sees_epoch_everywhere(data),
        dataloader_drop_last=options.drop_last,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )


def load_finished(trainer: TaskTrainer, checkpoint: Path) -> None:
    """Put the end of a finished run into ``trainer``, which would otherwise take one step more."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    trainer.model.load_state_dict(load_file(checkpoint / WEIGHTS_FILE), strict=False)  # teachers are not in the file


def report(trainer: TaskTrainer, output: Path, seconds: float, metric: Metric) -> TrainingReport:
    """Gather the figures of a run that has just ended, and make sure its last state is on disk."""
    state = trainer.state
    checkpoint = output / f"checkpoint-{state.global_step}"
    if not checkpoint.is_dir():
        trainer._save_checkpoint(trainer.model, trial=None)
    final: dict[str, float] = {}
    for row in state.log_history:
        final.update(figures_of(row))
    return TrainingReport(
        final=final,
        best=best_evaluation(state.log_history, metric),
        seconds=seconds,
        checkpoint=str(checkpoint),
        finished=state.global_step >= state.max_steps,
    )


def best_evaluation(log: Sequence[Mapping[str, float]], metric: Metric) -> dict[str, float]:
    """``step`` and figures of the best evaluation, of several equal ones the first; empty without evaluations."""
    evaluations: dict[float, dict[str, float]] = {}
    for row in log:  # figures that a callback adds stand in rows of their own
        if any(name.startswith("eval_") for name in row):
            evaluations.setdefault(row["step"], {}).update(figures_of(dict(row)))
    key, sign = f"eval_{metric.name}", -1 if metric.larger_is_better else 1
    measured = {step: figures for step, figures in evaluations.items() if key in figures}
    best = min(measured, key=lambda step: sign * measured[step][key], default=None)
    return {} if best is None else {"step": best, **measured[best]}
