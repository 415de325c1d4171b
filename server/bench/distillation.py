"""What the trainer costs: a distillation recipe run by it and by a plain loop, in turns, in images per second.

The plain loop is what one would write in an afternoon: the same networks, images, optimiser and loss (cross-entropy and
Hinton's KD, arXiv 1503.02531), without progress, history, checkpoints or averages.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from kernels.training import AfterStep, RecipeError
from kernels.training.optimizer import create_optimizer
from server.placement.machine import measure_machine
from vision.data.classification import collate
from vision.distillation.teacher import load_teacher
from vision.distillation.terms import KDTerm
from vision.tasks.distillation import DistillationRecipe, Lesson, prepare, run_lesson

WARMUP_STEPS = 3
# A trainer reports, evaluates and saves now and then; within a measurement it only trains.
NEVER = 1_000_000


def measure_distillation(
    recipe: dict[str, Any], steps: int, repeats: int, show: Callable[[str], None]
) -> dict[str, Any]:
    """Images per second of both over ``steps`` steps after a few for warming up, ``repeats`` times in turns.

    ``ratio`` is the median over the repeats of the trainer's speed over the plain loop's; the repeats stand beside it.
    Errors: those of ``train_distilled``; RecipeError for terms other than ``kd``, which the plain loop does not know.
    """
    parsed = shortened(DistillationRecipe.parse(recipe), steps + WARMUP_STEPS)
    others = [name for name, term in parsed.terms.items() if not isinstance(term, KDTerm)]
    if others or parsed.teacher is None or parsed.distillation.sampler != "random":
        raise RecipeError(
            f"the plain loop knows a teacher, kd terms and random batches; the recipe has "
            f"{', '.join(parsed.terms) or 'no terms'} and sampler {parsed.distillation.sampler}"
        )
    speeds: dict[str, list[float]] = {"trainer": [], "plain": []}
    for turn in range(repeats):
        for name, moments_of in {"trainer": by_trainer, "plain": by_plain_loop}.items():
            moments = moments_of(parsed)
            images = (len(moments) - WARMUP_STEPS) * parsed.student.training.batch_size
            speeds[name].append(images / (moments[-1] - moments[WARMUP_STEPS - 1]))
            show(f"turn {turn + 1} of {repeats}: {name} {speeds[name][-1]:.1f} images/s")
    ratios = [ours / plain for ours, plain in zip(speeds["trainer"], speeds["plain"], strict=True)]
    return {
        "hardware": measure_machine().json(),
        "student": parsed.student.model.backbone,
        "batch_size": parsed.student.training.batch_size,
        "image_size": parsed.student.data.image_size,
        "steps": steps,
        "images_per_s": {name: [round(value, 2) for value in values] for name, values in speeds.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def shortened(parsed: DistillationRecipe, steps: int) -> DistillationRecipe:
    """The recipe of a run of ``steps`` without pauses."""
    training = dataclasses.replace(
        parsed.student.training, steps=steps, log_every=NEVER, save_every=NEVER, evaluate_every=None, warmup_steps=0
    )
    return dataclasses.replace(
        parsed,
        student=dataclasses.replace(parsed.student, training=training),
        distillation=dataclasses.replace(parsed.distillation, report_every=0),
    )


def lesson_of(parsed: DistillationRecipe) -> Lesson:
    """A fresh student with its data and teacher."""
    assert parsed.teacher is not None
    return prepare(parsed, parsed.student.data.open_train(), load_teacher(parsed.teacher))


def by_trainer(parsed: DistillationRecipe) -> list[float]:
    """The moments at which the trainer's steps end."""
    moments: list[float] = []
    with TemporaryDirectory() as folder:
        training = dataclasses.replace(parsed.student.training, output=str(Path(folder) / "run"))
        here = dataclasses.replace(parsed, student=dataclasses.replace(parsed.student, training=training))
        clock = AfterStep(lambda: moments.append(time.perf_counter()))
        run_lesson(lesson_of(here), here, None, {}, False, Console(file=io.StringIO()), [clock])
    return moments


def by_plain_loop(parsed: DistillationRecipe) -> list[float]:
    """The moments at which the steps of a plain loop end."""
    lesson, training = lesson_of(parsed), parsed.student.training
    student = lesson.task.model.train()
    assert lesson.teacher is not None
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    optimizer = create_optimizer(student, training)
    loader = DataLoader(lesson.data, training.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    moments = []
    for batch in itertools.islice(forever(loader), training.steps):
        teacher_logits, _ = lesson.teacher(batch["images"])
        logits = student(student.normalization(batch["images"].float() / 255))
        loss = plain_loss(parsed, logits, teacher_logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if training.clip_norm:
            torch.nn.utils.clip_grad_norm_(student.parameters(), training.clip_norm)
        optimizer.step()
        moments.append(time.perf_counter())
    return moments


def forever(loader: DataLoader[Any]) -> Iterator[dict[str, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def plain_loss(parsed: DistillationRecipe, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Weighted cross-entropy and KD, written out."""
    loss = parsed.distillation.cross_entropy_weight * F.cross_entropy(logits, labels)
    for term in parsed.terms.values():
        assert isinstance(term, KDTerm)
        student = F.log_softmax(logits / term.temperature, dim=1)
        teacher = F.log_softmax(teacher_logits / term.temperature, dim=1)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss = loss + term.weight * term.temperature**2 * divergence
    return loss
