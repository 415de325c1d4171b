"""The tokenizer in a GGUF file's metadata, built for the ``tokenizers`` library: byte-level BPE and SentencePiece.

Equal to llama.cpp's own tokenizer on the same file (tests hold it to that); the chat template, special tokens and ends
of text come from the same metadata. No torch here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from server.targets.gguf.header import GGUFFile, open_gguf
from server.targets.gguf.pre_tokenizers import CUTS, Cut, pre_tokenizer
from server.text import TextCodec, TextError
from server.tokenizer_files import DEFAULT_TEMPLATE

PREFIX = "tokenizer.ggml."
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
MARK = "▁"  # SentencePiece's space
# A file names one end of text and, at best, one end of turn; these end a turn in every model that has them.
ENDS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
        "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "</s>",
    )
)  # fmt: skip
# Phi-3's special tokens take the space behind them along, but for these; nothing in the file says so but its name.
STRIPS_SPACE = re.compile("phi-?3")
KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def read_codec(path: Path) -> TextCodec:
    """The codec of a GGUF file. Errors: TargetError for a damaged file, TextError for a tokenizer that is not read."""
    file = open_gguf(path)
    tokens, types = read_tokens(file)
    special = special_tokens(file, tokens)
    try:
        tokenizer = build_tokenizer(file, tokens, types, special)
    except TextError:
        raise
    except Exception as error:  # the tokenizers package raises bare Exception
        raise TextError(f"the tokenizer in {path} cannot be built: {error}") from error
    ends = {token_id for role, token_id in special.items() if role in ("eos", "eot", "eom")}
    ends |= {token_id for token_id, token in enumerate(tokens) if token in ENDS and types[token_id] != 1}
    return TextCodec(
        tokenizer,
        stop_ids=frozenset(ends),
        templates=read_templates(file),
        template_variables={f"{role}_token": tokens[token_id] for role, token_id in special.items()},
    )


def read_templates(file: GGUFFile) -> dict[str, str]:
    """Chat templates by name; the unnamed one is the default."""
    names = {"tokenizer.chat_template": DEFAULT_TEMPLATE}
    for name in file.get("tokenizer.chat_templates", list, []):
        names[f"tokenizer.chat_template.{name}"] = str(name)
    found = {name: file.get(key, str) for key, name in names.items()}
    return {name: template for name, template in found.items() if template is not None}


def read_tokens(file: GGUFFile) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens. Errors: TextError where they are missing or do not belong together."""
    tokens: list[str] = file.get(f"{PREFIX}tokens", list, [])
    types: list[int] = file.get(f"{PREFIX}token_type", list, [1] * len(tokens))
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise TextError(f"{file.path} holds no vocabulary ({PREFIX}tokens)")
    if len(types) != len(tokens):
        raise TextError(f"{file.path}: {len(tokens)} tokens and {len(types)} token types do not belong together")
    return tokens, types


def special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, int]:
    """Ids by role: bos, eos, eot, eom, unk, pad, as far as the file names them."""
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    found = {role: file.get(f"{PREFIX}{key}_token_id", int) for role, key in keys.items()}
    for role, token_id in found.items():
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise TextError(
                f"{file.path}: the {role} token's id is {token_id}, the vocabulary has {len(tokens)} tokens"
            )
    return {role: token_id for role, token_id in found.items() if token_id is not None}


def build_tokenizer(file: GGUFFile, tokens: list[str], types: list[int], special: dict[str, int]) -> Tokenizer:
    """The whole tokenizer. Errors: TextError for kinds that are not read."""
    kind = file.get(f"{PREFIX}model", str, "")
    if kind == BYTE_LEVEL:
        name = file.get(f"{PREFIX}pre", str, "default")
        if name not in CUTS:
            raise TextError(f"{file.path}: the pre-tokenizer {name!r} is not read; known are {', '.join(sorted(CUTS))}")
        tokenizer, adds_bos = byte_level(file, tokens, CUTS[name]), CUTS[name].adds_bos
    elif kind == SENTENCEPIECE:
        tokenizer, adds_bos = sentencepiece(file, tokens, special.get("unk")), True
    else:
        raise TextError(f"{file.path}: a tokenizer of kind {kind!r} is not read; {BYTE_LEVEL} and {SENTENCEPIECE} are")
    strips = STRIPS_SPACE.search(file.get("general.name", str, "").lower()) is not None
    by_kind = {kind: [token for token, one in zip(tokens, types, strict=True) if one == kind] for kind in set(types)}
    special_texts = [token for kind in (CONTROL, UNKNOWN) for token in by_kind.get(kind, []) if token]
    tokenizer.add_special_tokens([added(token, True, strips) for token in special_texts])
    tokenizer.add_tokens([added(token, False, strips) for token in by_kind.get(USER_DEFINED, [])])
    frame = {
        "bos": file.get(f"{PREFIX}add_bos_token", bool, adds_bos),
        "eos": file.get(f"{PREFIX}add_eos_token", bool, False),
    }
    around = {
        role: [(tokens[special[role]], special[role])] if wanted and role in special else []
        for role, wanted in frame.items()
    }
    if any(around.values()):
        template = [token for token, _ in around["bos"]] + ["$A"] + [token for token, _ in around["eos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list({*around["bos"], *around["eos"]})
        )
    return tokenizer


def added(token: str, special: bool, strips: bool) -> AddedToken:
    """A token that is found in a text before anything else; ``strips``: with the space behind it, in most cases."""
    rstrip = strips and token not in KEEP_SPACE
    return AddedToken(token, special=special, normalized=False, lstrip=False, rstrip=rstrip)


def byte_level(file: GGUFFile, tokens: list[str], cut: Cut) -> Tokenizer:
    """Byte-level BPE."""
    merges: list[Any] = file.get(f"{PREFIX}merges", list, [])
    # A merge is two tokens with a space between; the first may begin with one.
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cut.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(file: GGUFFile, tokens: list[str], unknown_id: int | None) -> Tokenizer:
    """SentencePiece's BPE, whose merges are the vocabulary itself, best score first; unknown letters become bytes."""
    scores: list[float] = file.get(f"{PREFIX}scores", list, [])
    if len(scores) != len(tokens):
        raise TextError(f"{file.path}: {len(tokens)} tokens and {len(scores)} scores do not belong together")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    ranked: list[tuple[float, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        parts = ((token[:at], token[at:]) for at in range(1, len(token)))
        ranked += [(-score, left, right) for left, right in parts if left in vocabulary and right in vocabulary]
    ranked.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, left, right in ranked],
            unk_token=None if unknown_id is None else tokens[unknown_id],
            fuse_unk=False,
            byte_fallback=True,
        )
    )
    begins_with_space = file.get(f"{PREFIX}add_space_prefix", bool, True)
    space = normalizers.Replace(" ", MARK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), space]) if begins_with_space else space
    steps: list[Any] = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if begins_with_space else steps)
    return tokenizer
