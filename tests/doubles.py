"""Test doubles: tiny random targets in fp32, and a drafter that knows everything or nothing."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from drafters.drafter import DraftState, Observation
from drafters.proposal import Budget, Proposal, TreeGrowth


class OracleDrafter:
    """Knows the true continuation of every prompt: drafts it as a chain, beside as many wrong branches as fit."""

    name = "oracle"
    feature_layers: tuple[str, ...] = ()

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int, wrong: bool = False) -> None:
        self.texts = [list(text) for text in texts]
        self.vocab_size = vocab_size
        self.wrong = wrong

    def next_token(self, prefix: Sequence[int]) -> int | None:
        for text in self.texts:
            if len(text) > len(prefix) and text[: len(prefix)] == list(prefix):
                return text[len(prefix)]
        return None

    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        return [self.grow(list(state.token_ids), budget) for state in states]

    def grow(self, prefix: list[int], budget: Budget) -> Proposal:
        growth = TreeGrowth(budget)
        prefixes: dict[int | None, list[int]] = {None: prefix}
        parents: list[int | None] = [None]
        for _ in range(budget.depth + 1):
            level = []
            for parent in parents:
                true = self.next_token(prefixes[parent])
                others = [t for t in range(self.vocab_size) if t != true][: budget.top_k]
                tokens = others if true is None or self.wrong else [true, *others[: budget.top_k - 1]]
                level.append((parent, tokens, [-0.01] + [-3.0] * (len(tokens) - 1)))
            growth.add(level)
            for node in growth.newest:
                prefixes[node] = [*prefixes[growth.parents[node]], growth.token_ids[node]]
            parents = list(growth.beam())
            if not parents:
                break
        return growth.proposal()

    def observe(self, batch: Sequence[Observation]) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


def tiny_llama(vocab_size: int = 67, seed: int = 0, num_layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocab_size, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_qwen3(vocab_size: int = 67, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, vocab_size=vocab_size, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def save_word_tokenizer(folder: Path, words: Sequence[str] | None = None) -> None:
    """A tokenizer of whole words, ``word0`` to ``word66``, which is what the tiny models' vocabulary holds."""
    words = [f"word{i}" for i in range(67)] if words is None else words
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


class LetterCodec:
    """One token a letter; a chat is its messages behind one another."""

    stop_ids = frozenset({66})

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 60 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(65 + token_id) for token_id in token_ids)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [61, *(token_id for message in messages for token_id in self.encode(message["content"]))]
