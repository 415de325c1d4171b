"""Train a backbone whose embeddings find other images of the same identity: metric learning.

The tables are those of distillation, with ``[teacher]`` and ``[[terms]]`` optional: alone, the network learns to tell
the training identities apart (cross-entropy); beside a teacher, a mimic term takes the place of KD (CCKD, section 3.1).
The evaluation split holds other identities, and what counts is retrieval among them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from kernels.training import RecipeError, TrainingReport
from vision.backbones.checkpoint import save_backbone
from vision.data.classification import ClassificationData
from vision.distillation.teacher import load_teacher
from vision.measure.retrieval import embed_all, retrieval_figures
from vision.tasks.classification import settle_statistics
from vision.tasks.distillation import DistillationRecipe, prepare, run_lesson


def train_embedding(recipe: dict[str, Any], *, resume: bool = False, console: Console | None = None) -> TrainingReport:
    """Run a recipe; ``output/model`` then holds the backbone, which ``checkpoint`` names.

    ``final`` gains ``rank1`` and ``mean_average_precision`` over the evaluation split. Errors: RecipeError where the
    splits share an identity; those of ``train_distilled``.
    """
    parsed = DistillationRecipe.parse(recipe)
    options = parsed.student
    train_source, eval_source = options.data.open_train(), options.data.open_eval()
    shared = sorted(set(train_source.class_names) & set(eval_source.class_names))
    if shared:
        raise RecipeError(
            f"identities {', '.join(shared[:5])} stand in both splits ({len(shared)} in all); split the data by "
            "identity, or the figures say nothing of faces never seen"
        )
    lesson = prepare(parsed, train_source, None if parsed.teacher is None else load_teacher(parsed.teacher))
    report = run_lesson(lesson, parsed, None, recipe, resume, console)
    if not report.finished:
        return report
    task, folder = lesson.task, Path(options.training.output) / "model"
    figures: dict[str, float] = {}
    if PartialState().is_main_process:
        measured = []
        for model in (task.model,) if task.average is None else (task.trained, task.model):
            settle_statistics(task, model, lesson.data, options)
            points, identities, _ = embed_all(model, ClassificationData(eval_source, model.preprocessing))
            measured.append((retrieval_figures(points, identities), model))
        best, chosen = max(measured, key=lambda entry: entry[0].mean_average_precision)
        save_backbone(chosen, folder)
        figures = {"rank1": best.rank1, "mean_average_precision": best.mean_average_precision}
    PartialState().wait_for_everyone()
    return dataclasses.replace(report, final={**report.final, **figures}, checkpoint=str(folder))
