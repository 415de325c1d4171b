"""Train a Dovetail drafter: the paper's losses on the target's features, teacher forced or unrolled.

Alignment (Dovetail, arXiv 2412.18934, and the authors' code): the pair (f_i, t_{i+1}) predicts f_{i+1}, which the LM
head turns into the distribution of t_{i+2}. Of T positions T - 1 have a following token; the mask is that of position
i. The authors pad the last position with zeros and mask it; here it is left out, which is the same sum.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from drafters.checkpoint import save_drafter
from drafters.network import DovetailNetwork
from drafters.train.batches import SimilarLengths, lengths_of
from drafters.train.conversations import pad_batch
from drafters.train.draft_vocabulary import frequent_tokens
from drafters.train.feature_source import DataOptions, FeatureSource, training_layers
from drafters.train.memory import MemoryEstimate, chunk_rows
from drafters.train.options import ACCEPTANCE_LOSSES, DrafterRecipe, LossOptions
from drafters.train.unrolled import unrolled_predictions
from kernels.losses.chunks import sum_over_chunks
from kernels.losses.drafting import (
    MASK_EPS,
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


@dataclass(frozen=True)
class HeadLosses:
    """Of S steps and n positions: the weighted loss [S], cross-entropy in nats [S], and 1 where both rank the same
    token first [S, n]."""

    loss: Tensor
    cross_entropy: Tensor
    agreed: Tensor


class DrafterTask(nn.Module):
    """Loss and figures of a drafter on batches of a FeatureSource.

    Only ``network`` is trained and saved; embedding and LM head are the target's and frozen.
    """

    embedding: Tensor
    own_lm_head: Tensor | None
    draft_head: Tensor | None

    def __init__(
        self, network: DovetailNetwork, source: FeatureSource, loss: LossOptions, dtype: torch.dtype | None = None
    ) -> None:
        """``dtype``: what embedding and LM head are held in; None leaves them as the source gives them."""
        super().__init__()
        self.network = network
        self.loss = loss
        self.compute_features = source.features
        self.register_buffer("embedding", source.embedding().detach().to(dtype), persistent=False)
        is_tied = source.lm_head() is source.embedding()
        self.register_buffer("own_lm_head", None if is_tied else source.lm_head().detach().to(dtype), persistent=False)
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
        return self.figures(self.predict(inputs, input_ids[:, 1:]), wanted, loss_mask[:, :-1])

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

    def figures(self, steps: Sequence[Tensor], wanted: Tensor, loss_mask: Tensor) -> dict[str, Tensor]:
        """What ``forward`` returns, from predicted features of every step and the wanted ones [B, T, H], and the mask.

        Only positions that count reach the losses: with chats most do not, and the LM head is the widest product.
        """
        counted = loss_mask > 0
        predicted, wanted = torch.stack([step[counted] for step in steps]), wanted[counted]
        masks = [functional.pad(loss_mask[:, step:], (step, 0)) for step in range(len(steps))]
        # The first positions of a later step have no draft of this depth behind them.
        mask = torch.stack([step_mask[counted] for step_mask in masks])
        head = self.head_losses(predicted, wanted, mask)
        weights = self.loss.unrolled_decay ** torch.arange(len(steps), device=mask.device)
        regression = torch.stack([feature_regression(p, wanted, m) for p, m in zip(predicted, mask, strict=True)])
        # A choice outside the draft vocabulary counts as missed.
        accuracy = head.agreed.sum(dim=-1) / (mask.sum(dim=-1) + MASK_EPS)
        loss = self.loss.regression_weight * regression + head.loss
        found = {"regression": regression[0], "cross_entropy": head.cross_entropy[0], "accuracy": accuracy[0]}
        confidence = self.network.confidence(predicted.detach())  # no gradient reaches what the drafter predicts
        if confidence is not None:
            entropies = [confidence_loss(*of_step) for of_step in zip(confidence, head.agreed, mask, strict=True)]
            found["confidence"] = entropies[0]
            loss = loss + self.loss.confidence_weight * torch.stack(entropies)
        found |= {f"accuracy_{step + 1}": accuracy[step] for step in range(1, len(steps))}
        return {"loss": (weights * loss).sum(), **{name: value.detach() for name, value in found.items()}}

    def head_losses(self, predicted: Tensor, wanted: Tensor, mask: Tensor) -> HeadLosses:
        """What needs logits: predicted [S, n, H] and wanted features [n, H], mask [S, n].

        Where the target's own choice cannot be drafted there is nothing to learn about it (as in EAGLE-3).
        """
        form = ACCEPTANCE_LOSSES[self.loss.acceptance_form]

        def part(rows: Tensor, where: slice) -> tuple[Tensor, Tensor]:
            choices, target_probs = self.target_view(wanted[where])
            learnable = mask[:, where] * (choices >= 0)
            draft_logits = self.logits(rows)
            log_probs = torch.log_softmax(draft_logits, dim=-1, dtype=torch.float32)
            entropy = soft_cross_entropy(log_probs, target_probs)
            wrong = self.loss.cross_entropy_weight * entropy
            if self.loss.acceptance_weight > 0:
                wrong = wrong + self.loss.acceptance_weight * form(log_probs, target_probs)
            # ``max`` and not ``argmax``: over bf16 on a CPU it takes a quarter of the time (7 against 30 ms).
            agreed = learnable * (draft_logits.detach().max(dim=-1).indices == choices)
            return (learnable * wrong).sum(dim=-1), torch.stack((agreed, learnable, learnable * entropy))

        chunk = chunk_rows(len(self.lm_head), len(predicted))
        sums, rows = sum_over_chunks(part, predicted, chunk)
        agreed, learnable, entropy = rows
        count = learnable.sum(dim=-1) + MASK_EPS
        return HeadLosses(sums / count, entropy.sum(dim=-1) / count, agreed)

    @torch.no_grad()
    def target_view(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Of wanted features [n, H] the target's choice [n], and its distribution over the draft vocabulary [n, draft].

        A choice is a column of the draft vocabulary, -1 where it is not in it.
        """
        logits = functional.linear(wanted.to(self.lm_head.dtype), self.lm_head)
        choices = logits.max(dim=-1).indices
        draft_ids = self.network.draft_ids
        if draft_ids is not None:
            column = torch.searchsorted(draft_ids, choices).clamp_max(len(draft_ids) - 1)
            choices = torch.where(draft_ids[column] == choices, column, -1)
            logits = self.logits(wanted)
        return choices, torch.softmax(logits, dim=-1, dtype=torch.float32)

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
    # Mixed precision would cast them anew for every product.
    task = DrafterTask(network, source, tables.loss, torch.bfloat16 if options.precision == "bf16" else None)
    report = run(
        task,
        source.train_data,
        options,
        eval_data=source.held_out_data,
        collate=pad_batch,
        batch_sampler=SimilarLengths(
            lengths_of(source.train_data), options.batch_size, options.seed, options.drop_last
        ),
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
