"""Write a LLaMA-architecture model folder as GGUF, so that llama.cpp runs the very same weights.

Tensors are streamed one by one. transformers keeps the two halves of a rotary pair half a head apart, llama.cpp's
``llama`` architecture keeps them side by side, so the rows of q and k are reordered within each head.
Only byte-level BPE tokenizers are written. llama.cpp knows a fixed list of pre-tokenizers: where the model's own is not
among them, text that llama.cpp itself tokenises may be cut otherwise; token ids mean the same in any case.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.targets.checkpoint import check_files, weight_files

logger = logging.getLogger(__name__)

ARCHITECTURE = "LlamaForCausalLM"
FORMATS = {
    "fp32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "int4": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Rotary scalings that are a fixed factor per frequency, which GGUF holds as a tensor.
STATIC_ROPE = ("default", "linear", "llama3")
# Split expressions llama.cpp has under a name.
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
}


class GGUFError(ValueError):
    """A model cannot be written as GGUF; the message names what stands in the way."""


def write_gguf(folder: Path, file: Path, weights: str) -> Path:
    """Write the model in ``folder`` to ``file`` with matrices in ``weights`` and norms in fp32.

    int8 and int4 are llama.cpp's own Q8_0 and Q4_0 (groups of 32), quantised from the folder's weights.

    Errors: GGUFError for other architectures, tokenizers or rotary scalings; TargetError for damaged files.
    """
    if weights not in FORMATS:
        raise GGUFError(f"weights {weights!r} cannot be written as GGUF; allowed are {', '.join(FORMATS)}")
    check_files(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_config(config)
    vocabulary = read_vocabulary(folder, config.vocab_size)
    quantization, file_type = FORMATS[weights]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(folder.name)
    writer.add_file_type(file_type)
    add_shape(writer, config)
    add_vocabulary(writer, vocabulary, folder, config)
    for name, tensor in tensors(folder, config):
        stored = storage(tensor, quantization)
        dtype = np.dtype(np.float16 if stored is gguf.GGMLQuantizationType.F16 else np.float32)
        group, group_bytes = gguf.GGML_QUANT_SIZES[stored]
        num_bytes = tensor.numel() // group * group_bytes
        writer.add_tensor_info(name, list(tensor.shape), dtype, num_bytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors(folder, config):
        values = tensor.float().contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, storage(tensor, quantization)))
    writer.close()
    return file


def check_config(config: Any) -> None:
    """Refuse by name what the ``llama`` architecture of GGUF does not mean."""
    names = config.architectures or ["(none named)"]
    if names != [ARCHITECTURE]:
        raise GGUFError(f"{', '.join(names)} cannot be written as GGUF; only {ARCHITECTURE} can")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise GGUFError(f"a {ARCHITECTURE} with {name} cannot be written as GGUF; only one without biases can")
    if config.hidden_act != "silu":
        raise GGUFError(f"hidden_act {config.hidden_act!r} cannot be written as GGUF; only 'silu' can")
    if rope_type(config) not in STATIC_ROPE:
        raise GGUFError(f"rotary scaling {rope_type(config)!r} cannot be written; allowed: {', '.join(STATIC_ROPE)}")


def rope_type(config: Any) -> str:
    """The kind of rotary embedding."""
    return str(config.rope_parameters.get("rope_type", "default"))


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    """The architecture's numbers."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def tensors(folder: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors under llama.cpp's names, q and k reordered; one at a time in memory."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - the handle is no mapping
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                mapped = names.get_name(name, try_suffixes=(".weight",))
                if mapped is None:
                    raise GGUFError(f"{file} holds {name}, which the llama architecture of GGUF has no place for")
                tensor: Tensor = weights.get_tensor(name)
                if name.endswith("q_proj.weight"):
                    tensor = pairs_together(tensor, config.num_attention_heads)
                elif name.endswith("k_proj.weight"):
                    tensor = pairs_together(tensor, config.num_key_value_heads)
                yield mapped, tensor
    if rope_type(config) != "default":
        yield "rope_freqs.weight", frequency_factors(config)


def pairs_together(weight: Tensor, num_heads: int) -> Tensor:
    """[heads x head_dim, in]: row i of each head's first half is followed by row i of its second half."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def frequency_factors(config: Any) -> Tensor:
    """[head_dim / 2] what llama.cpp divides each rotary frequency by."""
    size = head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS[rope_type(config)](config, torch.device("cpu"))
    factors: Tensor = plain / scaled
    return factors


def storage(tensor: Tensor, quantization: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """Vectors stay in fp32, as llama.cpp wants them; matrices that do not divide into its groups stay in fp16."""
    if tensor.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    whole = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[quantization][0] == 0
    return quantization if whole else gguf.GGMLQuantizationType.F16


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer in GGUF's terms; tokens without a meaning fill the embedding's rows."""

    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    pre_tokenizer: str
    adds_bos: bool


def read_vocabulary(folder: Path, num_tokens: int) -> Vocabulary:
    """Read tokenizer.json. Errors: GGUFError for a missing file and for tokenizers that are not byte-level BPE."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise GGUFError(f"{folder} has no tokenizer.json; a GGUF file carries its tokenizer")
    data = json.loads(file.read_text(encoding="utf-8"))
    pieces = pre_tokenizer_pieces(data)
    if data["model"].get("type") != "BPE" or all(piece["type"] != "ByteLevel" for piece in pieces):
        raise GGUFError(f"the tokenizer in {folder} is not byte-level BPE, the only kind written as GGUF")
    tokens = [f"[UNUSED{i}]" for i in range(num_tokens)]
    types = [gguf.TokenType.UNUSED] * num_tokens
    for token, token_id in data["model"]["vocab"].items():
        tokens[token_id], types[token_id] = token, gguf.TokenType.NORMAL
    for added in data["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    adds_bos = bool(Tokenizer.from_file(str(file)).encode("").ids)
    return Vocabulary(tokens, types, merges, pre_tokenizer_name(pieces), adds_bos)


def pre_tokenizer_pieces(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizer's steps."""
    pre = data["pre_tokenizer"] or {"type": "None"}
    pieces: list[dict[str, Any]] = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return pieces


def pre_tokenizer_name(pieces: list[dict[str, Any]]) -> str:
    """llama.cpp's name for these steps, or its nearest."""
    for piece in pieces:
        if piece["type"] == "Split" and (name := PRE_TOKENIZERS.get(piece["pattern"].get("Regex", ""))):
            return name
    if any(piece["type"] == "Split" for piece in pieces):
        logger.warning("llama.cpp has no name for this pre-tokenizer; text it tokenises itself may be cut otherwise")
    return "gpt-2"


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, folder: Path, config: Any) -> None:
    """Tokens, merges, special ids and the chat template."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.adds_bos)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    # GGUF has a key for the end of a text and one for the end of a turn, transformers a list of both.
    for add, token_id in zip((writer.add_eos_token_id, writer.add_eot_token_id), eos_ids(folder, config), strict=False):
        add(token_id)
    if (template := chat_template(folder)) is not None:
        writer.add_chat_template(template)


def eos_ids(folder: Path, config: Any) -> list[int]:
    """Ids that end a text, generation_config.json before config.json."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = settings.get("eos_token_id", config.eos_token_id)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the template in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else None
