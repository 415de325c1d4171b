"""Train a Dovetail drafter: the paper's losses on the target's features, teacher forced or unrolled.

Alignment (Dovetail, arXiv 2412.18934, and the authors' code): the pair (f_i, t_{i+1}) predicts f_{i+1}, which the LM
head turns into the distribution of t_{i+2}. Of T positions T - 1 have a following token; the mask is that of position
i. The authors pad the last position with zeros and mask it; here it is left out, which is the same sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from drafters.checkpoint import save_drafter
from drafters.network import FEATURES, DovetailConfig, DovetailNetwork
from drafters.train.conversations import pad_batch
from drafters.train.draft_vocabulary import frequent_tokens
from drafters.train.feature_source import DataOptions, FeatureSource, training_layers
from drafters.train.unrolled import unrolled_predictions
from kernels.losses.chunks import sum_over_chunks
from kernels.losses.drafting import (
    MASK_EPS,
    acceptance_loss,
    argmax_agreement,
    blended_acceptance_loss,
    feature_regression,
    soft_cross_entropy,
    with_feature_noise,
)
from kernels.training import RecipeError, TrainingOptions, TrainingReport, run, take_table

TABLES = ("drafter", "loss", "data", "training")

ACCEPTANCE_LOSSES = {"log": acceptance_loss, "lambda": blended_acceptance_loss}

SourceFactory = Callable[[DataOptions, Sequence[str]], FeatureSource]
"""([data] table, feature layers side by side) -> a source of those layers."""

CHUNK_LOGITS = 2**24
"""Logits of one chunk of positions: 64 MiB in fp32, of which the losses hold a handful of copies."""


@dataclass(frozen=True)
class DrafterShape:
    """A recipe's ``[drafter]`` table; hidden size and vocabulary come from the target.

    ``head_dim`` defaults to hidden size / heads, as in Llama; ``features``: ``last``, the paper's, or ``low+mid+high``,
    EAGLE-3's; ``draft_vocab_size`` trims the vocabulary to the most frequent tokens of the training data.
    """

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    num_blocks: int = 1
    head_dim: int | None = None
    fusion: str = "dgf"
    features: str = "last"
    draft_vocab_size: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise RecipeError(f"drafter.features is {self.features!r}; allowed are {', '.join(FEATURES)}")


@dataclass(frozen=True)
class LossOptions:
    """A recipe's ``[loss]`` table; the defaults are the paper's.

    noise: amplitude of the feature noise, 0 for clean features; unrolled_steps: 1 is teacher forcing, more add the
    losses of drafts that deep, each ``unrolled_decay`` times the one before (EAGLE-3's training-time test);
    acceptance_form: ``log`` or ``lambda``, the two forms of the acceptance loss.
    """

    regression_weight: float = 1.0
    cross_entropy_weight: float = 0.1
    acceptance_weight: float = 0.0
    acceptance_form: str = "log"
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


class DrafterTask(nn.Module):
    """Loss and figures of a drafter on batches of a FeatureSource.

    Only ``network`` is trained and saved; embedding and LM head are the target's and frozen.
    """

    embedding: Tensor
    lm_head: Tensor
    draft_head: Tensor | None

    def __init__(self, network: DovetailNetwork, source: FeatureSource, loss: LossOptions) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.compute_features = source.features
        self.register_buffer("embedding", source.embedding().detach(), persistent=False)
        self.register_buffer("lm_head", source.lm_head().detach(), persistent=False)
        trimmed = None if network.draft_ids is None else network.select_head(self.lm_head)
        self.register_buffer("draft_head", trimmed, persistent=False)

    def forward(self, input_ids: Tensor, loss_mask: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``loss_mask`` [B, T], captured ``features`` [B, T, W] or None to ask the source.

        W is the width of ``training_layers``: what the drafter reads comes first, ``last``, which it predicts, stands
        at the end; with one layer they are the same H numbers.

        Returns the ``loss`` of all steps and, for the teacher-forced step, its parts: ``regression`` (SmoothL1),
        ``cross_entropy`` (nats) and ``accuracy``, the share of positions where drafter and target rank the same token
        first. Unrolled steps add ``accuracy_2``, ``accuracy_3`` ... for the second and later drafted token.
        """
        if features is None:
            features = self.compute_features(input_ids)
        hidden_size = self.embedding.shape[1]
        inputs = features[:, :-1, : len(self.network.feature_layers) * hidden_size].float()
        wanted = features[:, 1:, -hidden_size:].float()
        steps = self.predict(inputs, input_ids[:, 1:])
        figures = self.step_figures(steps[0], wanted, loss_mask[:, :-1])
        loss = figures.pop("loss")
        for step, predicted in enumerate(steps[1:], 1):
            # The first positions have no draft of this depth behind them.
            later = self.step_figures(predicted[:, step:], wanted[:, step:], loss_mask[:, step:-1])
            loss = loss + self.loss.unrolled_decay**step * later["loss"]
            figures[f"accuracy_{step + 1}"] = later["accuracy"]
        return {"loss": loss, **{name: value.detach() for name, value in figures.items()}}

    def predict(self, features: Tensor, next_ids: Tensor) -> list[Tensor]:
        """Predicted next features of the pairs, [B, T, H] for each step; noise on the inputs while training only.

        ``features`` [B, T, width of the drafter's layers] belong to the positions before ``next_ids`` [B, T].
        """
        if self.training and self.loss.noise > 0:
            features = with_feature_noise(features, self.loss.noise)
        features = self.network.project(features)
        embedded = functional.embedding(next_ids, self.embedding).float()
        if self.loss.unrolled_steps == 1:
            return [self.network.forward_causal(features, embedded)]
        return unrolled_predictions(self.network, features, embedded, self.loss.unrolled_steps)

    def step_figures(self, predicted: Tensor, wanted: Tensor, loss_mask: Tensor) -> dict[str, Tensor]:
        """Loss, its parts and the accuracy of one step; predicted and wanted features [B, T, H], mask [B, T]."""
        # Only positions that count reach the losses: with chats most do not, and the LM head is the widest product.
        counted = loss_mask > 0
        predicted, wanted, mask = predicted[counted], wanted[counted], loss_mask[counted]
        regression = feature_regression(predicted, wanted, mask)
        rows = max(1, CHUNK_LOGITS // len(self.lm_head))
        sums = sum_over_chunks(self.head_sums, (predicted, wanted, mask), rows)
        cross_entropy, missed, agreed, learnable = sums.unbind()
        cross_entropy = cross_entropy / (learnable + MASK_EPS)
        loss = self.loss.regression_weight * regression + self.loss.cross_entropy_weight * cross_entropy
        loss = loss + self.loss.acceptance_weight * missed / (learnable + MASK_EPS)
        # A choice outside the draft vocabulary counts as missed.
        accuracy = agreed / (mask.sum() + MASK_EPS)
        return {"loss": loss, "regression": regression, "cross_entropy": cross_entropy, "accuracy": accuracy}

    def head_sums(self, predicted: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        """What needs logits, summed over positions: predicted and wanted features [n, H], mask [n].

        Returns [4]: cross-entropy, acceptance loss (0 where it is not asked for), agreements with the target's choice,
        and the positions that could be learnt from, over which the others are summed.
        """
        draft_logits = self.logits(predicted)
        with torch.no_grad():
            target_logits = functional.linear(wanted.to(self.lm_head.dtype), self.lm_head)
        learnable = mask
        if self.network.draft_ids is not None:
            best = target_logits.max(dim=-1).values
            target_logits = target_logits[:, self.network.draft_ids]
            # Where the target's own choice cannot be drafted there is nothing to learn about it (as in EAGLE-3).
            learnable = mask * (target_logits.max(dim=-1).values == best)
        count = learnable.sum()
        means = [soft_cross_entropy(draft_logits, target_logits, learnable)]
        if self.loss.acceptance_weight > 0:
            means.append(ACCEPTANCE_LOSSES[self.loss.acceptance_form](draft_logits, target_logits, learnable))
        else:
            means.append(count.new_zeros(()))
        means.append(argmax_agreement(draft_logits, target_logits, learnable))
        return torch.stack([*(mean * (count + MASK_EPS) for mean in means), count])

    def logits(self, features: Tensor) -> Tensor:
        """The LM head, of the tokens that can be drafted, on features [..., H]."""
        head = self.lm_head if self.draft_head is None else self.draft_head
        return functional.linear(features.to(head.dtype), head)


def drafter_config(shape: DrafterShape, source: FeatureSource) -> DovetailConfig:
    """The drafter's whole configuration: the recipe's part and the target's."""
    vocab_size, hidden_size = source.embedding().shape
    values = dataclasses.asdict(shape)
    if shape.head_dim is None:
        if hidden_size % shape.num_heads:
            raise RecipeError(
                f"the target's hidden size {hidden_size} is not a multiple of drafter.num_heads {shape.num_heads}; "
                "give drafter.head_dim or another number of heads"
            )
        values["head_dim"] = hidden_size // shape.num_heads
    return DovetailConfig(hidden_size=hidden_size, vocab_size=vocab_size, target=source.fingerprint, **values)


def check_unrolling(shape: DrafterShape, loss: LossOptions) -> None:
    """Refuse projected features without unrolled steps: drafted positions would read what training never showed."""
    if shape.features != "last" and loss.unrolled_steps == 1:
        raise RecipeError(
            f'drafter.features = "{shape.features}" needs loss.unrolled_steps of at least 2 (EAGLE-3 takes 7): a drafted '
            "position reads the drafter's own output, not the three layers, and only unrolled steps train that"
        )


def train_drafter(
    recipe: dict[str, Any], source_factory: SourceFactory, *, resume: bool = False, console: Console | None = None
) -> TrainingReport:
    """Run a recipe; ``output/drafter`` then holds a folder for ``drafters.dovetail.load_drafter``.

    ``source_factory`` builds the FeatureSource from the ``[data]`` table. Errors: RecipeError for the recipe and its
    data, DrafterError for a shape that no drafter can have.
    """
    if unknown := sorted(set(recipe) - set(TABLES)):
        raise RecipeError(f"the recipe has unknown tables {', '.join(unknown)}; allowed are {', '.join(TABLES)}")
    shape = take_table(recipe, "drafter", DrafterShape)
    loss = take_table(recipe, "loss", LossOptions)
    check_unrolling(shape, loss)
    data = take_table(recipe, "data", DataOptions)
    options = take_table(recipe, "training", TrainingOptions)
    source = source_factory(data, training_layers(shape.features))
    torch.manual_seed(options.seed)
    network = DovetailNetwork(drafter_config(shape, source))
    if network.draft_ids is not None:
        chosen = frequent_tokens(source.train_data, network.config.vocab_size, len(network.draft_ids))
        network.draft_ids.copy_(chosen)
    task = DrafterTask(network, source, loss)
    report = run(
        task,
        source.train_data,
        options,
        eval_data=source.held_out_data,
        collate=pad_batch,
        recipe=recipe,
        resume=resume,
        console=console,
    )
    folder = Path(options.output) / "drafter"
    save_drafter(task.network, folder)
    return dataclasses.replace(report, checkpoint=str(folder))
