"""What a drafter recipe may say; the ``[data]`` table stands with the feature source, ``[training]`` is everybody's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from drafters.network import FEATURES, DovetailConfig
from drafters.train.feature_source import DataOptions
from drafters.train.memory import MemoryEstimate, estimate_memory
from kernels.losses.drafting import acceptance_loss, blended_acceptance_loss, total_variation
from kernels.training import RecipeError, TrainingOptions, check_tables, take_table
from kernels.training.processes import num_processes

TABLES = ("drafter", "loss", "data", "training")
ACCEPTANCE_LOSSES = {"log": acceptance_loss, "lambda": blended_acceptance_loss, "total_variation": total_variation}


@dataclass(frozen=True)
class DrafterShape:
    """A recipe's ``[drafter]`` table; hidden size and vocabulary come from the target.

    ``head_dim`` defaults to hidden size / heads, as in Llama; ``features``: ``last``, the paper's, or ``low+mid+high``,
    EAGLE-3's; ``draft_vocab_size`` trims the vocabulary to the most frequent tokens of the training data;
    ``confidence`` adds an output that predicts whether the drafter's first choice is accepted, by which trees grow.
    """

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    num_blocks: int = 1
    head_dim: int | None = None
    fusion: str = "dgf"
    features: str = "last"
    draft_vocab_size: int | None = None
    confidence: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise RecipeError(f"drafter.features is {self.features!r}; allowed are {', '.join(FEATURES)}")


@dataclass(frozen=True)
class LossOptions:
    """A recipe's ``[loss]`` table; the defaults are the paper's.

    noise: amplitude of the feature noise, 0 for clean features; unrolled_steps: 1 is teacher forcing, more add the
    losses of drafts that deep, the k-th weighted ``unrolled_decay`` ** (k - 1) (EAGLE-3's training-time test; with
    DSpark's exp(-(k - 1) / gamma) the decay is exp(-1 / gamma)); acceptance_form: ``log``, ``lambda`` or
    ``total_variation``, three forms of the acceptance loss; confidence_weight: of the confidence's cross-entropy, where
    the drafter has one. It does not move the drafts.
    """

    regression_weight: float = 1.0
    cross_entropy_weight: float = 0.1
    acceptance_weight: float = 0.0
    acceptance_form: str = "log"
    confidence_weight: float = 1.0
    noise: float = 0.2
    unrolled_steps: int = 1
    unrolled_decay: float = 0.8

    def __post_init__(self) -> None:
        if self.unrolled_steps < 1:
            raise RecipeError(f"loss.unrolled_steps is {self.unrolled_steps}; 1 is teacher forcing, more unroll")
        if self.acceptance_form not in ACCEPTANCE_LOSSES:
            raise RecipeError(
                f"loss.acceptance_form is {self.acceptance_form!r}; allowed are {', '.join(ACCEPTANCE_LOSSES)}"
            )


@dataclass(frozen=True)
class DrafterRecipe:
    """All tables of a drafter recipe, read and checked against one another."""

    shape: DrafterShape
    loss: LossOptions
    data: DataOptions
    training: TrainingOptions

    def __post_init__(self) -> None:
        if self.shape.features != "last" and self.loss.unrolled_steps == 1:
            raise RecipeError(
                f'drafter.features = "{self.shape.features}" needs loss.unrolled_steps of at least 2 (EAGLE-3 takes '
                "7): a drafted position reads the drafter's own output, not the three layers, and only unrolled steps "
                "train that"
            )

    @classmethod
    def read(cls, recipe: dict[str, Any]) -> DrafterRecipe:
        """The tables of a TOML recipe. Errors: RecipeError naming table and key."""
        check_tables(recipe, TABLES)
        return cls(
            take_table(recipe, "drafter", DrafterShape),
            take_table(recipe, "loss", LossOptions),
            take_table(recipe, "data", DataOptions),
            take_table(recipe, "training", TrainingOptions),
        )

    def config(self, vocab_size: int, hidden_size: int, fingerprint: str | None = None) -> DovetailConfig:
        """The drafter's whole configuration: the recipe's part and the target's."""
        values = dataclasses.asdict(self.shape)
        if self.shape.head_dim is None:
            if hidden_size % self.shape.num_heads:
                raise RecipeError(
                    f"the target's hidden size {hidden_size} is not a multiple of drafter.num_heads "
                    f"{self.shape.num_heads}; give drafter.head_dim or another number of heads"
                )
            values["head_dim"] = hidden_size // self.shape.num_heads
        return DovetailConfig(hidden_size=hidden_size, vocab_size=vocab_size, target=fingerprint, **values)

    def memory(self, config: DovetailConfig, borrowed: int | None = None) -> MemoryEstimate:
        """What training takes on its device; ``borrowed`` as in ``estimate_memory``."""
        return estimate_memory(
            config, self.training, self.data.window_length, self.loss.unrolled_steps, borrowed, num_processes()
        )
