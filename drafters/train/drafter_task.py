"""Train a Dovetail drafter: the paper's losses on the target's features, teacher forced or unrolled.

Alignment (Dovetail, arXiv 2412.18934, and the authors' code): the pair (f_i, t_{i+1}) predicts f_{i+1}, which the LM
head turns into the distribution of t_{i+2}. Of T positions T - 1 have a following token; the mask is that of position
i. The authors pad the last position with zeros and mask it; here it is left out, which is the same sum.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from drafters.checkpoint import save_drafter
from drafters.network import DovetailNetwork
from drafters.train.conversations import pad_batch
from drafters.train.draft_vocabulary import frequent_tokens
from drafters.train.feature_source import DataOptions, FeatureSource, training_layers
from drafters.train.memory import MemoryEstimate, chunk_rows
from drafters.train.options import ACCEPTANCE_LOSSES, DrafterRecipe, LossOptions
from drafters.train.unrolled import unrolled_predictions
from kernels.losses.chunks import sum_over_chunks
from kernels.losses.drafting import (
    MASK_EPS,
    argmax_agreement,
    confidence_loss,
    feature_regression,
    soft_cross_entropy,
    with_feature_noise,
)
from kernels.training import TrainingReport, run
from kernels.training.processes import is_first_process

logger = logging.getLogger(__name__)

SourceFactory = Callable[[DataOptions, Sequence[str]], FeatureSource]
"""([data] table, feature layers side by side) -> a source of those layers."""


class DrafterTask(nn.Module):
    """Loss and figures of a drafter on batches of a FeatureSource.

    Only ``network`` is trained and saved; embedding and LM head are the target's and frozen.
    """

    embedding: Tensor
    own_lm_head: Tensor | None
    draft_head: Tensor | None

    def __init__(self, network: DovetailNetwork, source: FeatureSource, loss: LossOptions) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.compute_features = source.features
        self.register_buffer("embedding", source.embedding().detach(), persistent=False)
        is_tied = source.lm_head() is source.embedding()
        self.register_buffer("own_lm_head", None if is_tied else source.lm_head().detach(), persistent=False)
        trimmed = None if network.draft_ids is None else network.select_head(self.lm_head)
        self.register_buffer("draft_head", trimmed, persistent=False)

    @property
    def lm_head(self) -> Tensor:
        """[V, H]; where it is tied to the embedding, a device holds one of them."""
        return self.embedding if self.own_lm_head is None else self.own_lm_head

    def forward(self, input_ids: Tensor, loss_mask: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``loss_mask`` [B, T], captured ``features`` [B, T, W] or None to ask the source.

        W is the width of ``training_layers``: what the drafter reads comes first, ``last``, which it predicts, stands
        at the end; with one layer they are the same H numbers.

        Returns the ``loss`` of all steps and, for the teacher-forced step, its parts: ``regression`` (SmoothL1),
        ``cross_entropy`` (nats) and ``accuracy``, the share of positions where drafter and target rank the same token
        first; with a confidence its cross-entropy, ``confidence`` (nats). Unrolled steps add ``accuracy_2``,
        ``accuracy_3`` ... for the second and later drafted token.
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
        sums = sum_over_chunks(self.head_sums, (predicted, wanted, mask), chunk_rows(len(self.lm_head)))
        cross_entropy, missed, agreed, learnable, confidence = sums.unbind()
        cross_entropy = cross_entropy / (learnable + MASK_EPS)
        loss = self.loss.regression_weight * regression + self.loss.cross_entropy_weight * cross_entropy
        loss = loss + self.loss.acceptance_weight * missed / (learnable + MASK_EPS)
        # A choice outside the draft vocabulary counts as missed.
        accuracy = agreed / (mask.sum() + MASK_EPS)
        figures = {"regression": regression, "cross_entropy": cross_entropy, "accuracy": accuracy}
        if self.network.config.confidence:
            figures["confidence"] = confidence / (mask.sum() + MASK_EPS)
            loss = loss + self.loss.confidence_weight * figures["confidence"]
        return {"loss": loss, **figures}

    def head_sums(self, predicted: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        """What needs logits, summed over positions: predicted and wanted features [n, H], mask [n].

        Returns [5]: cross-entropy, acceptance loss (0 where it is not asked for), agreements with the target's choice,
        the positions that could be learnt from, over which these are summed; and the confidence's cross-entropy, summed
        over all positions (0 where there is none).
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
        sums = [mean * (count + MASK_EPS) for mean in means]
        return torch.stack([*sums, count, self.confidence_sum(predicted, draft_logits, target_logits, learnable, mask)])

    def confidence_sum(
        self, predicted: Tensor, draft_logits: Tensor, target_logits: Tensor, learnable: Tensor, mask: Tensor
    ) -> Tensor:
        """Cross-entropy of the confidence against greedy acceptance; no gradient reaches what the drafter predicts.

        A choice of the target's that cannot be drafted is a draft that is not accepted.
        """
        confidence = self.network.confidence(predicted.detach())
        if confidence is None:
            return mask.new_zeros(())
        same = draft_logits.max(dim=-1).indices == target_logits.max(dim=-1).indices
        return confidence_loss(confidence, same & (learnable > 0), mask) * (mask.sum() + MASK_EPS)

    def logits(self, features: Tensor) -> Tensor:
        """The LM head, of the tokens that can be drafted, on features [..., H]."""
        head = self.lm_head if self.draft_head is None else self.draft_head
        return functional.linear(features.to(head.dtype), head)


def train_drafter(
    recipe: dict[str, Any], source_factory: SourceFactory, *, resume: bool = False, console: Console | None = None
) -> TrainingReport:
    """Run a recipe; ``output/drafter`` then holds a folder for ``drafters.dovetail.load_drafter``.

    ``source_factory`` builds the FeatureSource from the ``[data]`` table; its samples are asked for after the recipe is
    checked and the memory it takes is told. Errors: RecipeError for the recipe and its data, DrafterError for a shape
    that no drafter can have.
    """
    tables = DrafterRecipe.read(recipe)
    options = tables.training
    source = source_factory(tables.data, training_layers(tables.shape.features))
    vocab_size, hidden_size = source.embedding().shape
    config = tables.config(vocab_size, hidden_size, source.fingerprint)
    tell_memory(tables.memory(config, borrowed_bytes(source)))
    torch.manual_seed(options.seed)
    network = DovetailNetwork(config)
    if network.draft_ids is not None:
        chosen = frequent_tokens(source.train_data, vocab_size, len(network.draft_ids))
        network.draft_ids.copy_(chosen)
    task = DrafterTask(network, source, tables.loss)
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
    if is_first_process():
        save_drafter(task.network, folder)
    return dataclasses.replace(report, checkpoint=str(folder))


def borrowed_bytes(source: FeatureSource) -> int:
    """Bytes of the target's embedding and LM head, once where they are tied."""
    embedding, lm_head = source.embedding(), source.lm_head()
    return embedding.nbytes + (0 if lm_head is embedding else lm_head.nbytes)


def tell_memory(estimate: MemoryEstimate) -> None:
    """Log what training will take, and a warning where the GPU has less."""
    logger.info("training takes about %s", estimate)
    if torch.cuda.is_available() and estimate.total > (free := torch.cuda.mem_get_info()[0]):
        logger.warning(
            "the GPU has %.2f GB free, less than that; fewer blocks, a shorter window, a smaller batch or fewer "
            "unrolled steps take less",
            free / 1e9,
        )
