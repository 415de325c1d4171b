"""Every student of a distillation study trained at once: small perceptrons, all variants and seeds in one run.

A claim of one or two points needs dozens of paired trainings; a study of convolutional students cell by cell is hours
on a small machine. Here a student has one hidden layer and sees the image reduced to ``side`` x ``side`` grey cells,
and the students of all cells lie in stacked tensors. Their losses are summed and none of them shares a weight, so each
is trained as if it were alone: the optimisers act element by element, and the gradient is not clipped. A seed sets
initial weights and the order of the images, the same in every variant.

The recipe's tables: ``[study]``, ``[student]``, ``[teacher]``, ``[[terms]]``, ``[distillation]``, ``[data]``,
``[training]``; variants may change the student, the terms and how they are taught.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from kernels.training import RecipeError, TrainingOptions, check_tables, take_table
from kernels.training.study import REPORT_FILE, Cell, Outcome, write_outcomes
from vision.data.classification import ClassificationData, DataOptions
from vision.data.sources import ImageSource
from vision.distillation.cache import ask_all
from vision.distillation.fidelity import fidelity
from vision.distillation.sampler import ClassUniformSampler
from vision.distillation.teacher import Teacher, TeacherOptions, load_teacher
from vision.distillation.terms import Answers, CorrelationTerm, Term, parse_terms
from vision.tasks.distillation import DistillationOptions
from vision.tasks.together import RUN_FOLDER, Figures, StackedTask, check_shared, train_all, write_reports

SAMPLERS = ("random", "class_uniform")


@dataclass(frozen=True)
class StudentOptions:
    """A recipe's ``[student]``: units of the hidden layer, and the side of the grey image that it sees."""

    hidden: int = 16
    side: int = 8

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.side < 1:
            raise RecipeError(f"[student] hidden is {self.hidden} and side {self.side}; both must be at least 1")


@dataclass(frozen=True)
class Variant:
    """What the students of one variant learn from."""

    name: str
    student: StudentOptions
    terms: dict[str, Term]
    distillation: DistillationOptions

    @classmethod
    def parse(cls, name: str, recipe: dict[str, Any]) -> Variant:
        """Read its tables. Errors: RecipeError."""
        check_tables(recipe, ("student", "teacher", "terms", "distillation", "data", "training"))
        parsed = cls(
            name,
            take_table(recipe, "student", StudentOptions),
            parse_terms(recipe.get("terms", [])),
            take_table(recipe, "distillation", DistillationOptions),
        )
        if parsed.distillation.sampler not in SAMPLERS:
            raise RecipeError(f"{name}: distillation.sampler must be one of {', '.join(SAMPLERS)} here")
        return parsed


@dataclass(frozen=True)
class Lesson:
    """Images of one split as students see them [N, side^2], with labels [N] and the teacher's answers."""

    inputs: Tensor
    labels: Tensor
    teacher_logits: Tensor
    teacher_embedding: Tensor

    @classmethod
    def read(cls, source: ImageSource, data: DataOptions, teacher: Teacher, side: int) -> Lesson:
        """All images of ``source``, each scaled to mean 0 and deviation 1."""
        images = ClassificationData(source, data.preprocessing)
        logits, embedding = ask_all(images, teacher, 256)
        pixels = torch.stack([images[position].image for position in range(len(images))])  # type: ignore[union-attr]
        cells = functional.adaptive_avg_pool2d(pixels.float().mean(1), side).flatten(1)
        inputs = (cells - cells.mean(1, keepdim=True)) / cells.std(1, keepdim=True)
        return cls(inputs, torch.as_tensor(source.labels), logits, embedding)


class Orders(Dataset[Tensor]):
    """For each step the images of every sampler and seed, [samplers, seeds, batch]."""

    def __init__(
        self, samplers: Sequence[DistillationOptions], seeds: Sequence[int], labels: Tensor, options: TrainingOptions
    ) -> None:
        self.orders = torch.stack(
            [torch.stack([order_of(sampler, labels, seed, options) for seed in seeds]) for sampler in samplers]
        )

    def __len__(self) -> int:
        return self.orders.shape[2]

    def __getitem__(self, step: int) -> Tensor:
        return self.orders[:, :, step]


def order_of(sampler: DistillationOptions, labels: Tensor, seed: int, options: TrainingOptions) -> Tensor:
    """The images of every step of one training, [steps, batch]: whole epochs without what is left over."""
    batches: list[Tensor] = []
    for epoch in range(options.steps):
        if sampler.sampler == "class_uniform":
            drawn = ClassUniformSampler(labels, options.batch_size, sampler.images_per_class, seed)
            drawn.set_epoch(epoch)
            batches += [torch.tensor(batch) for batch in drawn]
        else:
            shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
            whole = len(labels) // options.batch_size * options.batch_size
            batches += shuffled[:whole].view(-1, options.batch_size)
        if len(batches) >= options.steps:
            break
    return torch.stack(batches[: options.steps])


class Students(nn.Module):
    """Perceptrons of one size in stacked tensors: V variants with S seeds; those of one seed begin alike."""

    def __init__(self, variants: int, seeds: Sequence[int], num_inputs: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        first, second = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            first.append(torch.randn(num_inputs, hidden, generator=generator) * (2 / num_inputs) ** 0.5)
            second.append(torch.randn(hidden, num_classes, generator=generator) * (1 / hidden) ** 0.5)
        self.first = nn.Parameter(torch.stack(first).repeat(variants, 1, 1, 1))  # [V, S, inputs, hidden]
        self.second = nn.Parameter(torch.stack(second).repeat(variants, 1, 1, 1))  # [V, S, hidden, classes]
        self.first_bias = nn.Parameter(torch.zeros(variants, len(seeds), 1, hidden))
        self.second_bias = nn.Parameter(torch.zeros(variants, len(seeds), 1, num_classes))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [V or 1, S or 1, B, inputs] -> hidden units [V, S, B, hidden] and logits [V, S, B, classes]."""
        hidden = (inputs @ self.first + self.first_bias).relu()
        return hidden, hidden @ self.second + self.second_bias


class TogetherTask(StackedTask):
    """The sum of all students' losses over one batch each."""

    inputs: Tensor
    labels: Tensor
    teacher_logits: Tensor
    teacher_embedding: Tensor

    def __init__(self, students: Students, variants: Sequence[Variant], lesson: Lesson) -> None:
        super().__init__()
        self.students, self.variants = students, list(variants)
        self.samplers = samplers_of(variants)
        for name in ("inputs", "labels", "teacher_logits", "teacher_embedding"):
            self.register_buffer(name, getattr(lesson, name), persistent=False)

    def forward(self, order: Tensor) -> dict[str, Tensor]:
        """``order`` [samplers, S, B]: the images that each seed sees in this step."""
        drawn = order[[self.samplers.index(sampler_of(variant)) for variant in self.variants]]  # [V, S, B]
        hidden, logits = self.students(self.inputs[drawn])
        losses = [
            self.loss(variant, *of_variant)
            for variant, *of_variant in zip(self.variants, drawn, hidden, logits, strict=True)
        ]
        return {"loss": torch.stack(losses).sum()}

    def loss(self, variant: Variant, drawn: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        """The losses of one variant's students, added up over the seeds: [S, B], [S, B, hidden], [S, B, classes]."""
        seeds, step = len(drawn), int(self.steps_done) + 1
        total = logits.new_zeros(())
        if variant.distillation.cross_entropy_weight:
            labels = self.labels[drawn].flatten()
            mean = functional.cross_entropy(logits.flatten(0, 1), labels)
            total = variant.distillation.cross_entropy_weight * seeds * mean
        for term in variant.terms.values():
            # A correlation is one of the samples of a batch, and there is a batch for each seed.
            parts: Sequence[int | slice] = range(seeds) if isinstance(term, CorrelationTerm) else [slice(None)]
            for part in parts:
                answers = self.answers(drawn[part].flatten(), hidden[part], logits[part])
                total = total + term.weight_at(step) * seeds / len(parts) * term.loss(answers)
        return total

    def answers(self, drawn: Tensor, hidden: Tensor, logits: Tensor) -> Answers:
        """What students and teacher say of the images ``drawn`` [N]."""
        return Answers(
            logits.flatten(0, -2), self.teacher_logits[drawn],
            hidden.flatten(0, -2), self.teacher_embedding[drawn], self.labels[drawn],
        )  # fmt: skip


def sampler_of(variant: Variant) -> DistillationOptions:
    """What of a variant's options makes its batches."""
    return DistillationOptions(
        sampler=variant.distillation.sampler, images_per_class=variant.distillation.images_per_class
    )


def samplers_of(variants: Sequence[Variant]) -> list[DistillationOptions]:
    """The different ways in which batches are made, in order."""
    return list(dict.fromkeys(map(sampler_of, variants)))


def train_together(cells: Sequence[Cell], folder: Path, console: Console | None = None) -> list[Outcome]:
    """Train all cells that have no report yet, students of one size at a time, and return where every cell stands.

    Each cell's report has ``top1``, ``calibration_error``, ``agreement`` and ``tail_mass`` over the evaluation split.
    An interrupted run is resumed by the same call. Errors: RecipeError, DataError, TeacherError, TrainingDivergedError.
    """
    parsed = {cell.variant: Variant.parse(cell.variant, cell.recipe) for cell in cells}
    check_shared(cells, ("teacher", "data", "training"))
    options = take_table(cells[0].recipe, "training", TrainingOptions)
    lessons: dict[int, tuple[Lesson, Lesson]] = {}
    for student in dict.fromkeys(variant.student for variant in parsed.values()):
        own = [cell for cell in cells if parsed[cell.variant].student == student]
        if all((cell.output / REPORT_FILE).is_file() for cell in own):
            continue
        if student.side not in lessons:
            lessons[student.side] = read_lessons(cells[0].recipe, student.side)
        place = folder / RUN_FOLDER / f"hidden_{student.hidden}"
        group = Group([parsed[name] for name in dict.fromkeys(cell.variant for cell in own)], own)
        if not train_group(
            group, lessons[student.side], dataclasses.replace(options, output=str(place), seed=0), console
        ):
            break
    return write_outcomes(cells, folder)


@dataclass(frozen=True)
class Group:
    """Students of one size: their variants, and a cell for each of them and each seed."""

    variants: list[Variant]
    cells: list[Cell]

    @property
    def seeds(self) -> list[int]:
        """In rising order."""
        return sorted({cell.seed for cell in self.cells})


def read_lessons(recipe: dict[str, Any], side: int) -> tuple[Lesson, Lesson]:
    """What students are trained and measured on. Errors: DataError, TeacherError where the classes differ."""
    data, teacher = take_table(recipe, "data", DataOptions), load_teacher(take_table(recipe, "teacher", TeacherOptions))
    train, held_out = data.open_train(), data.open_eval()
    teacher.check_classes(train.class_names)
    return Lesson.read(train, data, teacher, side), Lesson.read(held_out, data, teacher, side)


def train_group(
    group: Group, lessons: tuple[Lesson, Lesson], options: TrainingOptions, console: Console | None
) -> bool:
    """Train the students of one size and write the reports of their cells; False where it was interrupted."""
    train, held_out = lessons
    size = group.variants[0].student
    students = Students(
        len(group.variants), group.seeds, train.inputs.shape[1], size.hidden, train.teacher_logits.shape[1]
    )
    task = TogetherTask(students, group.variants, train)
    orders = Orders(task.samplers, group.seeds, task.labels, options)
    seconds = train_all(task, orders, group.cells, options, console)
    if seconds is None:
        return False
    write_reports(group.cells, measure(students, held_out), seconds, options.output)
    return True


@torch.no_grad()
def measure(students: Students, held_out: Lesson) -> Figures:
    """The figures of every student."""
    students.cpu()
    figures = {}
    for variant, seed in itertools.product(*map(range, students.first.shape[:2])):
        first, second, first_bias, second_bias = (
            weights[variant, seed]
            for weights in (students.first, students.second, students.first_bias, students.second_bias)
        )
        logits = (held_out.inputs @ first + first_bias).relu() @ second + second_bias
        figures[variant, seed] = figures_of(logits, held_out)
    return figures


def figures_of(logits: Tensor, held_out: Lesson) -> dict[str, float]:
    """Accuracy, and what ``fidelity`` says."""
    top1 = float((logits.argmax(1) == held_out.labels).double().mean())
    return {"top1": top1, **dataclasses.asdict(fidelity(logits, held_out.teacher_logits, held_out.labels))}
