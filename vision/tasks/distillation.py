"""Train a backbone to classify images with the help of a teacher.

The recipe's tables: ``[model]`` (the student), ``[teacher]``, ``[[terms]]``, ``[distillation]`` (optional), ``[data]``,
``[augmentation]`` (optional), ``[task]`` (optional; no mixup), ``[training]``. The loss is cross_entropy_weight times
the cross-entropy plus every term times its weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback

from kernels.losses import BatchTooSmall
from kernels.training import AfterStep, RecipeError, TrainingReport, run, take_table
from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import load_backbone
from vision.data.classification import ClassificationData, collate
from vision.data.sources import ImageSource
from vision.distillation.cache import ask_all, collate_taught, with_answers
from vision.distillation.correlation_congruence import gradient_ratio
from vision.distillation.fidelity import fidelity
from vision.distillation.sampler import ClassUniformSampler, SuperclassUniformSampler
from vision.distillation.teacher import Teacher, TeacherOptions, load_teacher
from vision.distillation.terms import Answers, CorrelationTerm, MimicTerm, Term, parse_terms, wants_pairs
from vision.measure.classification import keep_skipped
from vision.tasks.classification import (
    TOP1,
    ClassificationTask,
    ClassifierRecipe,
    TaskOptions,
    build_model,
    choose_depthwise,
    finish,
    watchers,
)

SAMPLERS = ("random", "class_uniform", "superclass_uniform")


@dataclass(frozen=True)
class DistillationOptions:
    """A recipe's ``[distillation]`` table.

    ``cross_entropy_weight`` weighs the labels, 0 leaves them out (as CCKD does). ``sampler`` makes the batches:
    "class_uniform" and "superclass_uniform" draw ``images_per_class`` images of each class, or of each of
    ``num_superclasses`` clusters of the teacher's embeddings. Every ``report_every`` steps the share of the gradient
    that each term has beside all the others is measured, so that a dead term is seen; 0 leaves that out.
    """

    cross_entropy_weight: float = 1.0
    sampler: str = "random"
    images_per_class: int = 4
    num_superclasses: int = 100
    report_every: int = 100

    def __post_init__(self) -> None:
        if self.cross_entropy_weight < 0 or self.report_every < 0:
            raise RecipeError("[distillation] cross_entropy_weight and report_every must be at least 0")
        if self.sampler not in SAMPLERS:
            raise RecipeError(f"distillation.sampler is {self.sampler!r}; allowed are {', '.join(SAMPLERS)}")


class DistillationTask(ClassificationTask):
    """Cross-entropy and distillation terms over a batch of byte images; evaluation is that of classification.

    ``teacher`` None means that the batches carry its answers, or that there is none. ``projection`` maps the student's
    embedding to the teacher's width for a mimic term; it is trained, and not part of the saved backbone.
    """

    steps_done: Tensor

    def __init__(
        self,
        model: Backbone,
        teacher: Teacher | None,
        terms: Mapping[str, Term],
        options: TaskOptions,
        distillation: DistillationOptions,
        teacher_width: int,
        channels_last: bool = False,
    ) -> None:
        super().__init__(model, options, channels_last)
        self.teacher = teacher
        self.terms = dict(terms)
        self.distillation = distillation
        width = model.feature_channels[-1]
        mimics = any(isinstance(term, MimicTerm) for term in terms.values())
        self.projection = nn.Linear(width, teacher_width) if mimics and width != teacher_width else None
        # In the state, so that a resumed run goes on with the weights' warm-up.
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        skipped: Tensor,
        teacher_logits: Tensor | None = None,
        teacher_embedding: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``images`` uint8 [B, 3, H, W], ``labels`` [B]; the teacher's answers where they are cached.

        While training: ``loss``, ``cross_entropy``, each term unweighted under its name, top-1 and top-5 hits, and now
        and then ``TERM_gradient_share``, the norm of the weighted term's gradient over that of everything else.
        """
        if not self.training:
            return super().forward(images, labels, skipped)
        self.skipped += skipped.sum()
        if self.teacher is not None:
            teacher_logits, teacher_embedding = self.teacher(images)
        embedding = self.model.embed(self.inputs(images))
        logits = self.model.classify(embedding)
        losses: dict[str, Tensor] = {}
        if teacher_logits is not None and teacher_embedding is not None:
            losses = self.term_losses(Answers(logits, teacher_logits, embedding, teacher_embedding, labels))
        cross_entropy = self.loss(logits, labels)
        step = int(self.steps_done) + 1
        weighted = {name: self.terms[name].weight_at(step) * loss for name, loss in losses.items()}
        total = self.distillation.cross_entropy_weight * cross_entropy + sum(weighted.values())
        figures = {"cross_entropy": cross_entropy, **losses, **self.gradient_shares(weighted, total, embedding)}
        return {"loss": total, **{k: v.detach() for k, v in figures.items()}, **self.figures(logits, labels)}

    def term_losses(self, answers: Answers) -> dict[str, Tensor]:
        """Every term, unweighted; a mimic term sees the student's embedding at the teacher's width."""
        student = answers.student_embedding
        projected = student if self.projection is None else self.projection(student)
        mimicking = dataclasses.replace(answers, student_embedding=projected)
        return {
            name: term.loss(mimicking if isinstance(term, MimicTerm) else answers) for name, term in self.terms.items()
        }

    def gradient_shares(self, weighted: Mapping[str, Tensor], total: Tensor, embedding: Tensor) -> dict[str, Tensor]:
        """``TERM_gradient_share`` of each term in the student's embedding, every ``report_every`` steps."""
        every = self.distillation.report_every
        if every == 0 or int(self.steps_done) % every or not weighted:
            return {}
        return {
            f"{name}_gradient_share": torch.tensor(gradient_ratio(term, total - term, embedding))
            for name, term in weighted.items()
        }

    def after_step(self) -> None:
        """Count the step; called after each optimiser step."""
        self.steps_done += 1


@dataclass(frozen=True)
class DistillationRecipe:
    """All tables of a recipe, checked; ``teacher`` None only where there are no terms."""

    student: ClassifierRecipe
    teacher: TeacherOptions | None
    terms: dict[str, Term]
    distillation: DistillationOptions

    @property
    def needs_same_classes(self) -> bool:
        """Whether some term compares logits; embeddings may come from a teacher of other classes."""
        return any(not isinstance(term, CorrelationTerm | MimicTerm) for term in self.terms.values())

    @classmethod
    def parse(cls, recipe: dict[str, Any]) -> DistillationRecipe:
        """Read every table. Errors: RecipeError naming the table and the key."""
        own = {"teacher", "terms", "distillation"}
        parsed = cls(
            ClassifierRecipe.parse({table: values for table, values in recipe.items() if table not in own}),
            take_table(recipe, "teacher", TeacherOptions) if "teacher" in recipe else None,
            parse_terms(recipe.get("terms", [])),
            take_table(recipe, "distillation", DistillationOptions),
        )
        if parsed.terms and parsed.teacher is None:
            raise RecipeError("[[terms]] compare with a teacher; name it in [teacher]")
        if parsed.student.task.mixup:
            raise RecipeError("task.mixup mixes labels, which distillation terms do not know; leave it out")
        if parsed.teacher and parsed.teacher.cache and not parsed.student.augmentation.is_deterministic:
            raise RecipeError(
                'teacher.cache needs images that do not change: [augmentation] crop = "centre", flip = false and no '
                "color_jitter, or no cache"
            )
        if wants_pairs(parsed.terms) and parsed.student.training.batch_size < 2:
            raise BatchTooSmall("training.batch_size is 1; a correlation term compares samples and needs at least 2")
        return parsed


def train_distilled(recipe: dict[str, Any], *, resume: bool = False, console: Console | None = None) -> TrainingReport:
    """Run a recipe; ``output/model`` then holds the student, which ``checkpoint`` names.

    ``final`` is that of ``train_classifier``, and the student's ``calibration_error``, its ``agreement`` with the
    teacher and the ``tail_mass`` it puts on classes the teacher excludes, over the evaluation split. A recipe with
    ``terms = []`` trains the student alone and measures it by the same yardsticks. Errors: those of
    ``train_classifier``, TeacherError, SamplerError, LossInputError.
    """
    parsed = DistillationRecipe.parse(recipe)
    if parsed.teacher is None or "terms" not in recipe:
        raise RecipeError("the recipe has no [teacher] or no [[terms]]; without them train a classifier")
    options = parsed.student
    train_source, eval_source = options.data.open_train(), options.data.open_eval()
    lesson = prepare(parsed, train_source, load_teacher(parsed.teacher))
    eval_data = ClassificationData(eval_source, lesson.task.model.preprocessing)
    report = run_lesson(lesson, parsed, eval_data, recipe, resume, console)
    if not report.finished:
        return report
    folder = Path(options.training.output) / "model"
    figures = finish(lesson.task, lesson.data, eval_data, options, report)
    if PartialState().is_main_process and lesson.teacher is not None:
        student = load_backbone(folder).to(lesson.task.model.head.weight.device)
        figures |= measure_fidelity(student, lesson.teacher, eval_data, options.training.batch_size)
    return dataclasses.replace(report, final={**report.final, **figures}, checkpoint=str(folder))


@dataclass(frozen=True)
class Lesson:
    """A task with all it trains on: the images, those with the teacher's answers where they are cached, the teacher."""

    task: DistillationTask
    data: ClassificationData
    taught: Dataset[Any]
    teacher: Teacher | None


def prepare(parsed: DistillationRecipe, source: ImageSource, teacher: Teacher | None) -> Lesson:
    """Build student, task and data of a recipe. Errors: TeacherError where the classes differ."""
    options, side = parsed.student, parsed.student.data.image_size
    if teacher is not None and parsed.needs_same_classes:
        teacher.check_classes(source.class_names)
    torch.manual_seed(options.training.seed)
    model = build_model(options.model, options.data, source.class_names)
    choose_depthwise(model, options.model, options.training, side)
    data = ClassificationData(
        source, model.preprocessing, options.augmentation, options.training.seed, options.data.limit
    )
    width, asked, taught = model.feature_channels[-1], teacher, cast("Dataset[Any]", data)
    if teacher is not None:
        _, example = teacher(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        width = example.shape[1]
        if parsed.teacher and parsed.teacher.cache:
            folder = Path(parsed.teacher.cache).expanduser()
            taught = with_answers(data, teacher, folder, options.training.batch_size)
            asked = None
    task = DistillationTask(
        model, asked, parsed.terms, options.task, parsed.distillation, width, options.model.channels_last
    )
    return Lesson(task, data, taught, teacher)


def run_lesson(
    lesson: Lesson,
    parsed: DistillationRecipe,
    eval_data: ClassificationData | None,
    recipe: dict[str, Any],
    resume: bool,
    console: Console | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingReport:
    """Train the task of ``lesson`` in place; ``callbacks`` watch."""
    return run(
        lesson.task,
        lesson.taught,
        parsed.student.training,
        eval_data=eval_data,
        collate=collate_either,
        batch_sampler=create_sampler(parsed, lesson.data, lesson.teacher),
        callbacks=[
            AfterStep(lesson.task.after_step),
            *watchers(lesson.task, lesson.data, parsed.student),
            *callbacks,
        ],
        recipe=recipe,
        resume=resume,
        console=console,
        metric=TOP1,
    )


def collate_either(samples: list[Any]) -> dict[str, Tensor]:
    """Training batches may carry the teacher's answers; those of the evaluation never do."""
    return collate_taught(samples) if hasattr(samples[0], "embedding") else collate(samples)


def create_sampler(
    parsed: DistillationRecipe, data: ClassificationData, teacher: Teacher | None
) -> Sampler[list[int]] | None:
    """The recipe's batches; None leaves the shuffling to the trainer. Errors: SamplerError."""
    options, training = parsed.distillation, parsed.student.training
    if options.sampler == "random":
        return None
    if options.sampler == "class_uniform":
        labels = [int(data.source.labels[index]) for index in data.indices]
        return ClassUniformSampler(labels, training.batch_size, options.images_per_class, training.seed)
    if teacher is None:
        raise RecipeError(
            'distillation.sampler = "superclass_uniform" clusters a teacher\'s embeddings; name a [teacher]'
        )
    still = ClassificationData(data.source, data.preprocessing, limit=parsed.student.data.limit)
    _, embedding = ask_all(still, teacher, training.batch_size)
    return SuperclassUniformSampler(
        embedding, options.num_superclasses, training.batch_size, options.images_per_class, training.seed
    )


def measure_fidelity(
    model: Backbone, teacher: Teacher, data: ClassificationData, batch_size: int = 64
) -> dict[str, float]:
    """``calibration_error``, ``agreement`` and ``tail_mass`` of a student over all of ``data``, as in ``Fidelity``."""
    device = model.head.weight.device
    student_logits, teacher_logits, all_labels = [], [], []
    model.eval()
    with torch.no_grad():
        for images, labels, _ in DataLoader(data, batch_size, collate_fn=keep_skipped):
            if not len(labels):
                continue
            images = images.to(device)
            student_logits.append(model(model.normalization(images.float() / 255)).cpu())
            teacher_logits.append(teacher(images)[0].cpu())
            all_labels.append(labels)
    return dataclasses.asdict(fidelity(torch.cat(student_logits), torch.cat(teacher_logits), torch.cat(all_labels)))
