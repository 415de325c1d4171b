"""A folder's tokenizer in GGUF's terms: byte-level BPE with llama.cpp's name for its cut, or SentencePiece's BPE.

llama.cpp knows a fixed list of cuts: where the model's own is not among them, text that llama.cpp itself tokenises may
be cut otherwise; token ids mean the same in any case.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from server.targets.gguf.pre_tokenizers import GPT2, LLAMA3, QWEN2
from server.tokenizer_files import read_tokenizer

logger = logging.getLogger(__name__)

# The models' own spelling of the contractions, which ours writes out.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    re.sub(r"^\(\?:.*?\)(?=\|)", lambda _: CONTRACTIONS, expression): name
    for expression, name in ((LLAMA3, "llama-bpe"), (QWEN2, "qwen2"))
} | {GPT2: "gpt-2"}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class GGUFError(ValueError):
    """A model cannot be written as GGUF; the message names what stands in the way."""


@dataclass(frozen=True)
class Vocabulary:
    """A BPE tokenizer in GGUF's terms; tokens without a meaning fill the embedding's rows.

    pre_tokenizer: llama.cpp's name for a byte-level one; None: SentencePiece's, whose ``scores`` order the merges.
    """

    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    pre_tokenizer: str | None
    adds_bos: bool
    begins_with_space: bool = False
    scores: list[float] = field(default_factory=list)


def read_vocabulary(folder: Path, num_tokens: int) -> Vocabulary:
    """Read tokenizer.json. Errors: GGUFError for a missing file and for tokenizers of another kind."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise GGUFError(f"{folder} has no tokenizer.json; a GGUF file carries its tokenizer")
    data = json.loads(file.read_text(encoding="utf-8"))
    pieces = pre_tokenizer_pieces(data)
    byte_level = any(piece["type"] == "ByteLevel" for piece in pieces)
    if data["model"].get("type") != "BPE" or not (byte_level or data["model"].get("byte_fallback")):
        raise GGUFError(f"the tokenizer in {folder} is neither byte-level BPE nor SentencePiece's BPE")
    tokens = [f"[UNUSED{i}]" for i in range(num_tokens)]
    types = [gguf.TokenType.UNUSED] * num_tokens
    for token, token_id in data["model"]["vocab"].items():
        tokens[token_id], types[token_id] = token, gguf.TokenType.NORMAL
        if not byte_level and BYTE.fullmatch(token):
            types[token_id] = gguf.TokenType.BYTE
    for added in data["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    unknown = data["model"].get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = gguf.TokenType.UNKNOWN
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    adds_bos = bool(Tokenizer.from_file(str(file)).encode("").ids)
    if byte_level:
        return Vocabulary(tokens, types, merges, pre_tokenizer_name(pieces), adds_bos)
    ranks = {merge.replace(" ", "", 1): -float(rank) for rank, merge in reversed(list(enumerate(merges, 1)))}
    lowest = -float(len(merges) + 1)
    scores = [ranks.get(token, lowest) for token in tokens]
    return Vocabulary(tokens, types, [], None, adds_bos, "Prepend" in json.dumps(data["normalizer"]), scores)


def pre_tokenizer_pieces(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizer's steps."""
    pre = data["pre_tokenizer"] or {"type": "None"}
    pieces: list[dict[str, Any]] = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return pieces


def pre_tokenizer_name(pieces: list[dict[str, Any]]) -> str:
    """llama.cpp's name for these steps, or its nearest."""
    for piece in pieces:
        if piece["type"] == "Split" and (name := SPLITS.get(piece["pattern"].get("Regex", ""))):
            return name
    if any(piece["type"] == "Split" for piece in pieces):
        logger.warning("llama.cpp has no name for this pre-tokenizer; text it tokenises itself may be cut otherwise")
    return "smollm" if any(piece["type"] == "Digits" and piece["individual_digits"] for piece in pieces) else "gpt-2"


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, folder: Path, config: Any) -> None:
    """Tokens, merges, special ids and the chat template."""
    if vocabulary.pre_tokenizer is None:
        writer.add_tokenizer_model("llama")
        if gguf.TokenType.UNKNOWN in vocabulary.types:
            writer.add_unk_token_id(vocabulary.types.index(gguf.TokenType.UNKNOWN))
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.begins_with_space)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
        writer.add_token_merges(vocabulary.merges)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_add_bos_token(vocabulary.adds_bos)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    # GGUF has a key for the end of a text and one for the end of a turn, transformers a list of both.
    for add, token_id in zip((writer.add_eos_token_id, writer.add_eot_token_id), eos_ids(folder, config), strict=False):
        add(token_id)
    templates = read_tokenizer(folder).templates
    if templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])


def eos_ids(folder: Path, config: Any) -> list[int]:
    """Ids that end a text, generation_config.json before config.json."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = settings.get("eos_token_id", config.eos_token_id)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
