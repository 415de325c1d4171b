"""The weighted terms of a distillation loss, as a recipe lists them in ``[[terms]]``.

``kind`` chooses the loss, the other keys are its settings: ``kd``, ``bdd`` (balance divergence), ``dkd``, ``cckd`` (the
correlation term alone; an instance term stands beside it) and ``mimic`` (the L2 distance of embeddings, CCKD's instance
term for metric learning). Every term has a ``weight`` and ``warmup_steps``, over which the weight grows from zero:
relational and reverse terms are large while the student knows nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from kernels.losses import ShapeMismatch, bilinear_correlation, mean_difference_correlation
from kernels.training import RecipeError, take_table
from vision.distillation.balance_divergence import BalanceDivergenceLoss
from vision.distillation.correlation_congruence import CongruenceLoss, Correlation, CorrelationCongruenceLoss
from vision.distillation.decoupled import DKDLoss
from vision.distillation.kd import KDLoss

CORRELATIONS = ("rbf", "bilinear", "mean_difference")


@dataclass(frozen=True)
class Answers:
    """What both networks say of one batch: logits [N, C] or [N, C, H, W], embeddings [N, D] (of two widths).

    ``labels`` are [N] or [N, H, W]; ``valid``, of the labels' shape, is False where there is no label.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    student_embedding: Tensor
    teacher_embedding: Tensor
    labels: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One addend. ``weight`` has no default: it decides more than the choice of the loss does."""

    weight: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.warmup_steps < 0:
            raise RecipeError(f"a term has weight {self.weight} and warmup_steps {self.warmup_steps}; leave out a term "
                              "rather than weigh it 0")  # fmt: skip

    @abstractmethod
    def loss(self, answers: Answers) -> Tensor:
        """The unweighted loss, a scalar."""

    def weight_at(self, step: int) -> float:
        """The weight of the ``step``-th optimiser step, counted from 1."""
        return self.weight * min(1.0, step / self.warmup_steps) if self.warmup_steps else self.weight


@dataclass(frozen=True, kw_only=True)
class KDTerm(Term):
    """``KDLoss``: 0.9 at temperature 4 is customary on CIFAR, 0.5 at 1 on ImageNet."""

    temperature: float

    def loss(self, answers: Answers) -> Tensor:
        """T^2 KL(teacher || student)."""
        loss = KDLoss(self.temperature)
        value: Tensor = loss(answers.student_logits, answers.teacher_logits, answers.valid)
        return value


@dataclass(frozen=True, kw_only=True)
class BalanceDivergenceTerm(Term):
    """``BalanceDivergenceLoss``; the two shares must add up to 1, so that ``weight`` compares with KD's.

    The paper's own numbers are not known: shares and temperatures here are ours.
    """

    forward_share: float = 0.5
    reverse_share: float = 0.5
    forward_temperature: float = 4.0
    reverse_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.forward_share + self.reverse_share - 1) > 1e-6:
            raise RecipeError(
                f"forward_share {self.forward_share} and reverse_share {self.reverse_share} must add up to 1; "
                "the term's size is its weight"
            )

    def loss(self, answers: Answers) -> Tensor:
        """Both divergences."""
        loss = BalanceDivergenceLoss(
            self.forward_share, self.reverse_share, self.forward_temperature, self.reverse_temperature
        )
        value: Tensor = loss(answers.student_logits, answers.teacher_logits, answers.valid)
        return value


@dataclass(frozen=True, kw_only=True)
class DecoupledTerm(Term):
    """``DKDLoss`` with its target part weighed 1; the authors warm it up over 20 epochs on CIFAR-100."""

    non_target_weight: float = 8.0
    temperature: float = 4.0

    def loss(self, answers: Answers) -> Tensor:
        """TCKD and NCKD; classification only."""
        loss = DKDLoss(1.0, self.non_target_weight, self.temperature)
        value: Tensor = loss(answers.student_logits, answers.teacher_logits, answers.labels)
        return value


@dataclass(frozen=True, kw_only=True)
class CorrelationTerm(Term):
    """``CorrelationCongruenceLoss`` of unit embeddings; weigh it by the share of the gradient it gets (10 to 100).

    ``order`` 0 takes the exact Gaussian instead of its Taylor series.
    """

    correlation: str = "rbf"
    gamma: float = 0.4
    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correlation not in CORRELATIONS:
            raise RecipeError(f"correlation is {self.correlation!r}; allowed are {', '.join(CORRELATIONS)}")

    def loss(self, answers: Answers) -> Tensor:
        """Mean squared difference of the correlations."""
        others: dict[str, Correlation] = {
            "bilinear": bilinear_correlation,
            "mean_difference": mean_difference_correlation,
        }
        if self.correlation == "rbf":
            loss: CongruenceLoss = CorrelationCongruenceLoss(self.gamma, self.order or None)
        else:
            loss = CongruenceLoss(others[self.correlation])
        value: Tensor = loss(answers.student_embedding, answers.teacher_embedding)
        return value


@dataclass(frozen=True, kw_only=True)
class MimicTerm(Term):
    """Mean squared distance of unit embeddings; both networks' must have the same width.

    The paper (CCKD, section 3.1) does not say whether embeddings are scaled; ours are, as for the correlation.
    """

    def loss(self, answers: Answers) -> Tensor:
        """mean ||f_s - f_t||^2."""
        student, teacher = answers.student_embedding, answers.teacher_embedding
        if student.shape != teacher.shape:
            raise ShapeMismatch(
                f"student embeddings are {tuple(student.shape)}, teacher embeddings {tuple(teacher.shape)}; a mimic "
                "term needs equal widths, or a layer between them"
            )
        difference = functional.normalize(student.float()) - functional.normalize(teacher.detach().float())
        return difference.square().sum(dim=1).mean()


KINDS: Mapping[str, type[Term]] = {
    "kd": KDTerm,
    "bdd": BalanceDivergenceTerm,
    "dkd": DecoupledTerm,
    "cckd": CorrelationTerm,
    "mimic": MimicTerm,
}


def parse_terms(tables: Any) -> dict[str, Term]:
    """Name -> term of a recipe's ``[[terms]]``; a second of one kind is called ``kd_2``. Errors: RecipeError."""
    if not isinstance(tables, Sequence) or not all(isinstance(table, Mapping) for table in tables):
        raise RecipeError("terms must be a list of tables: write [[terms]] before each")
    terms: dict[str, Term] = {}
    for table in tables:
        kind = table.get("kind")
        if kind not in KINDS:
            raise RecipeError(f"a term's kind is {kind!r}; allowed are {', '.join(KINDS)}")
        same = sum(name.partition("_")[0] == kind for name in terms)
        name = f"{kind}_{same + 1}" if same else str(kind)
        settings = {key: value for key, value in table.items() if key != "kind"}
        terms[name] = take_table({name: settings}, name, KINDS[kind])
    return terms


def wants_pairs(terms: Mapping[str, Term]) -> bool:
    """Whether some term compares samples with each other, so that a batch of one teaches nothing."""
    return any(isinstance(term, CorrelationTerm) for term in terms.values())
