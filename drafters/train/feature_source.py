"""What a drafter is trained on: token ids with the target's features, however they are made.

``drafters.train`` never loads a target. Whoever owns one builds a source from it and hands it in: features computed on
the fly, as here, or read back from disk, where the samples carry them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from drafters.train.conversations import ChatTokenizer, TokenSamples, load_samples
from drafters.train.language_model import PackedWindows
from drafters.train.records import READERS
from kernels.training import RecipeError

Samples = Dataset[dict[str, Tensor]]


class FeatureSource(Protocol):
    """Tokens, features and the two matrices a drafter borrows from its target.

    A sample of the data sets is ``input_ids`` [T], ``loss_mask`` [T] (1 where the position counts) and, where they
    were captured before, ``features`` [T, W]. W is the width of the layers asked for, side by side (see
    ``training_layers``). Data sets are addressed by index, so a resumed run skips what it has seen without asking the
    target for it.
    """

    @property
    def fingerprint(self) -> str:
        """Identifies the target's weights; kept in the drafter's configuration."""
        ...

    @property
    def train_data(self) -> Samples:
        """Samples to learn from."""
        ...

    @property
    def held_out_data(self) -> Samples | None:
        """Samples to evaluate on, or None."""
        ...

    def embedding(self) -> Tensor:
        """[V, H] the target's input embedding."""
        ...

    def lm_head(self) -> Tensor:
        """[V, H] the target's output projection; the same tensor as ``embedding()`` where they are tied."""
        ...

    def features(self, token_ids: Tensor) -> Tensor:
        """[B, T, W] the target's features, for samples [B, T] that do not carry them."""
        ...


def training_layers(features: str) -> tuple[str, ...]:
    """The layers a source must give for a drafter that reads ``features`` (``last`` or ``low+mid+high``).

    Those it reads and, at the end, ``last``, from which the target's distribution is computed.
    """
    layers = tuple(features.split("+"))
    return layers if layers[-1] == "last" else (*layers, "last")


@dataclass(frozen=True)
class DataOptions:
    """A recipe's ``[data]`` table.

    target: the model to draft for, as the server names targets, None: the default; one of tokens, a ``.npy`` file of
    packed token ids, and conversations, a file in the given format (``messages``: JSONL as OpenAI's clients write it,
    ``sharegpt``, ``text``); weights: the type the target's weights are held in while it computes features, None: as its
    files have them; window_length: tokens of one sample, at most; captured: a folder that features are written to
    before training begins, and read from (None: computed anew for every batch); held_out_share: what is kept for
    evaluation, the end of a packed file; max_samples: train on a random choice of that many samples (None: on all);
    seed: of the shuffling of conversations, that choice and answers that are not greedy; answers: a JSONL file in which
    the target itself answers the users' turns before training begins (None: the answers of the data), each with at most
    ``answer_tokens``, greedy or at ``answer_temperature``.
    """

    target: str | None = None
    tokens: str | None = None
    conversations: str | None = None
    format: str = "messages"
    weights: str | None = None
    window_length: int = 256
    held_out_share: float = 0.01
    max_samples: int | None = None
    seed: int = 0
    captured: str | None = None
    answers: str | None = None
    answer_tokens: int = 512
    answer_temperature: float = 0.0

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.conversations is None):
            raise RecipeError("[data] needs one of tokens (packed ids) and conversations (a data file), not both")
        if self.window_length < 3:
            raise RecipeError(f"data.window_length is {self.window_length}; a sample needs at least 3 tokens")
        if not 0.0 <= self.held_out_share < 1.0:
            raise RecipeError(f"data.held_out_share is {self.held_out_share}; allowed are 0 up to, not including, 1")
        if self.max_samples is not None and self.max_samples < 1:
            raise RecipeError(f"data.max_samples is {self.max_samples}; give at least 1, or leave it out to use all")
        if self.answers is not None and (self.conversations is None or self.format not in READERS):
            raise RecipeError(f"data.answers needs data.conversations in a format with turns: {', '.join(READERS)}")
        if self.answer_tokens < 1:
            raise RecipeError(f"data.answer_tokens is {self.answer_tokens}; an answer takes at least 1")
        if self.answer_temperature < 0:
            raise RecipeError(f"data.answer_temperature is {self.answer_temperature}; 0 is greedy, more is sampled")


class DraftingWindows(Dataset[dict[str, Tensor]]):
    """Windows of a packed corpus in which every position counts."""

    def __init__(self, windows: PackedWindows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        token_ids = self.windows[index]["input_ids"]
        return {"input_ids": token_ids, "loss_mask": torch.ones(len(token_ids))}


def data_samples(options: DataOptions, codec: ChatTokenizer | None, vocab_size: int) -> tuple[Samples, Samples | None]:
    """(training samples, held-out samples or None) of whatever the table names; only packed tokens need no codec.

    Errors: RecipeError and CorpusError for files that hold no samples, or tokens that the target does not have.
    """
    if options.conversations is None:
        train, held_out = packed_windows(options, vocab_size)
    else:
        assert codec is not None
        train, held_out = conversation_samples(options, codec, vocab_size)
    return random_choice(train, options.max_samples, options.seed), held_out


def conversation_samples(
    options: DataOptions, codec: ChatTokenizer, vocab_size: int
) -> tuple[TokenSamples, TokenSamples | None]:
    """(training samples, held-out samples or None) of the data file."""
    assert options.conversations is not None
    file = Path(options.conversations).expanduser()
    train, held_out = load_samples(
        file, options.format, codec, options.window_length, options.held_out_share, options.seed
    )
    for samples in (train, held_out):
        if samples is not None:
            largest = max(int(ids.max()) for ids, _ in samples.samples)
            check_vocabulary(f"the tokenizer of {options.target}", largest, vocab_size)
    return train, held_out


def random_choice(samples: Samples, count: int | None, seed: int) -> Samples:
    """``count`` of the samples, drawn with ``seed`` and kept in their order; all of them for None or too few."""
    available = len(samples)  # type: ignore[arg-type]
    if count is None or count >= available:
        return samples
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return Subset(samples, chosen.sort().values.tolist())


def check_vocabulary(origin: str, largest_id: int, vocab_size: int) -> None:
    """Refuse tokens that the target has no embedding for."""
    if largest_id >= vocab_size:
        raise RecipeError(
            f"{origin} gives token {largest_id}, and the target's vocabulary has {vocab_size}; data and drafter must "
            "have the target's own vocabulary"
        )


def packed_windows(options: DataOptions, vocab_size: int) -> tuple[Samples, Samples | None]:
    """(training samples, held-out samples or None) of the packed file, split as language-model training splits it."""
    assert options.tokens is not None
    file, length = Path(options.tokens).expanduser(), options.window_length
    if not file.is_file():
        raise RecipeError(
            f"data.tokens names {file}, which does not exist; a language-model run writes corpus/tokens.npy"
        )
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RecipeError(f"{file} is no array of token ids: {error}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RecipeError(f"{file} holds {ids.dtype} of shape {ids.shape}; packed token ids are one row of integers")
    check_vocabulary(str(file), int(ids.max(initial=0)), vocab_size)
    split = int(len(ids) * (1 - options.held_out_share)) // length * length
    train, held_out = PackedWindows(ids[:split], length), PackedWindows(ids[split:], length)
    if len(train) == 0:
        raise RecipeError(f"{file} holds {len(ids)} tokens; one window takes {length}")
    return DraftingWindows(train), DraftingWindows(held_out) if len(held_out) else None


@dataclass(frozen=True)
class OnTheFlySource:
    """A FeatureSource that asks the target anew for every batch whose samples carry no features.

    ``compute`` maps token ids [B, T] to features [B, T, W]; it runs without gradients and outside autocast, so the
    target computes in its own type. ``load`` gives training and held-out samples; it is called when they are first
    asked for, since preparing them may take long.
    """

    compute: Callable[[Tensor], Tensor]
    target_embedding: Tensor
    target_lm_head: Tensor
    fingerprint: str
    load: Callable[[], tuple[Samples, Samples | None]]

    @cached_property
    def samples(self) -> tuple[Samples, Samples | None]:
        """(training samples, held-out samples or None), loaded once."""
        return self.load()

    @property
    def train_data(self) -> Samples:
        """Samples to learn from."""
        return self.samples[0]

    @property
    def held_out_data(self) -> Samples | None:
        """Samples to evaluate on, or None."""
        return self.samples[1]

    def embedding(self) -> Tensor:
        """[V, H]."""
        return self.target_embedding

    def lm_head(self) -> Tensor:
        """[V, H]."""
        return self.target_lm_head

    def features(self, token_ids: Tensor) -> Tensor:
        """[B, T, W]."""
        with torch.no_grad(), torch.autocast(token_ids.device.type, enabled=False):
            return self.compute(token_ids)
