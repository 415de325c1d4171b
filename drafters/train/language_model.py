"""Train a small LLaMA-architecture language model from text: the tiny target, or a small-model drafter.

The recipe's tables: ``[model]`` (shape), ``[corpus]`` with ``[[corpus.sources]]``, ``[training]``. The tokenizer is
trained on the corpus unless ``corpus.tokenizer`` names a folder that holds one.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from drafters.train import corpus
from kernels.training import RecipeError, TrainingOptions, TrainingReport, run, take_table

logger = logging.getLogger(__name__)

MAX_SHARD = "11MB"  # files this small can be kept in a repository


@dataclass(frozen=True)
class LanguageModelShape:
    """LLaMA shape. ``context_length`` is both the longest position and the length of a training window."""

    hidden_size: int = 192
    intermediate_size: int = 576
    num_layers: int = 24
    num_heads: int = 3
    num_kv_heads: int = 1
    vocab_size: int = 4096
    context_length: int = 256
    max_position: int = 1024
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class CorpusOptions:
    """Where the text comes from. ``unseen`` names benchmark files whose text must not occur in it."""

    sources: tuple[Any, ...]
    unseen: tuple[str, ...] = ()
    tokenizer: str | None = None
    held_out_share: float = 0.01
    seed: int = 0


class PackedWindows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a packed corpus: ``input_ids`` [T] and the same ids as labels (the model shifts them)."""

    def __init__(self, token_ids: NDArray[np.uint16], length: int) -> None:
        self.token_ids = token_ids
        self.length = length

    def __len__(self) -> int:
        return len(self.token_ids) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.token_ids[index * self.length : (index + 1) * self.length].astype(np.int64)
        ids = torch.from_numpy(window)
        return {"input_ids": ids, "labels": ids}


class LanguageModelTask(nn.Module):
    """Next-token cross-entropy of a causal transformers model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.is_tied: bool = model.config.tie_word_embeddings

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` [B, T]; returns the mean loss in nats a token."""
        return {"loss": self.model(input_ids=input_ids, labels=labels, use_cache=False).loss}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state without the tied copy of the embedding, which safetensors would refuse."""
        state = super().state_dict(*args, **kwargs)
        if self.is_tied:
            state.pop("model.lm_head.weight", None)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Restore; the tied head follows the embedding."""
        if self.is_tied:
            state_dict = {**state_dict, "model.lm_head.weight": state_dict["model.model.embed_tokens.weight"]}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        model: Any = self.model
        model.tie_weights()
        return result


def create_model(shape: LanguageModelShape, end_id: int) -> Any:
    """A freshly initialised LLaMA model with tied embeddings. Eager attention is the fastest on a CPU at this size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def benchmark_texts(files: tuple[str, ...]) -> Iterator[str]:
    """Every string inside the JSONL files (gzip allowed) whose text must stay unseen."""
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"corpus.unseen names {path}, which does not exist")
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for line in lines:
                yield from strings_in(json.loads(line))


def strings_in(value: Any) -> Iterator[str]:
    """All strings of a JSON value, depth first."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)


def prepare_corpus(
    options: CorpusOptions, shape: LanguageModelShape, folder: Path
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], int]:
    """(training ids, held-out ids, end-of-text id). Kept in ``folder``, so a resumed run reads them back."""
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    packed, tokenizer_file = folder / "tokens.npy", folder / "tokenizer" / "tokenizer.json"
    if not packed.is_file():
        sources = [corpus.Source(**source) for source in options.sources]
        texts = corpus.collect(sources, benchmark_texts(options.unseen), options.seed)
        if options.tokenizer is None:
            tokenizer = corpus.train_tokenizer(texts, shape.vocab_size)
            corpus.save_tokenizer(tokenizer, tokenizer_file.parent, shape.max_position)
        else:
            tokenizer = Tokenizer.from_file(str(Path(options.tokenizer) / "tokenizer.json"))
            tokenizer_file.parent.mkdir(exist_ok=True)
            tokenizer.save(str(tokenizer_file))
        np.save(packed, corpus.pack(texts, tokenizer, tokenizer.token_to_id(corpus.END_OF_TEXT)))
    ids = np.load(packed, mmap_mode="r")
    end_id = Tokenizer.from_file(str(tokenizer_file)).token_to_id(corpus.END_OF_TEXT)
    if end_id is None:
        raise RecipeError(f"{tokenizer_file} has no token {corpus.END_OF_TEXT}, which closes every document")
    split = int(len(ids) * (1 - options.held_out_share)) // shape.context_length * shape.context_length
    logger.info("corpus: %d tokens to train on, %d held out", split, len(ids) - split)
    return ids[:split], ids[split:], end_id


def train_language_model(
    recipe: dict[str, Any], *, resume: bool = False, console: Console | None = None
) -> TrainingReport:
    """Run a recipe; ``output/model`` then holds bf16 safetensors, config and tokenizer as transformers reads them."""
    shape = take_table(recipe, "model", LanguageModelShape)
    corpus_options = take_table(recipe, "corpus", CorpusOptions)
    options = take_table(recipe, "training", TrainingOptions)
    output = Path(options.output)
    train_ids, held_out_ids, end_id = prepare_corpus(corpus_options, shape, output / "corpus")
    torch.manual_seed(options.seed)
    task = LanguageModelTask(create_model(shape, end_id))
    report = run(
        task,
        PackedWindows(train_ids, shape.context_length),
        options,
        eval_data=PackedWindows(held_out_ids, shape.context_length),
        recipe=recipe,
        resume=resume,
        console=console,
    )
    save_model(task, output)
    return dataclasses.replace(report, checkpoint=str(output / "model"))


def save_model(task: LanguageModelTask, output: Path) -> None:
    """bf16 weights, config, generation config and tokenizer in ``output/model``."""
    from transformers import PreTrainedTokenizerFast

    folder = output / "model"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "corpus" / "tokenizer")
    tokenizer.save_pretrained(folder)
    model: Any = task.model
    turn_end = tokenizer.convert_tokens_to_ids(corpus.TURN_END)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, turn_end]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=MAX_SHARD)
