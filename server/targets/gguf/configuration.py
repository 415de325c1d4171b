"""A GGUF file's metadata as a configuration of transformers.

Each architecture is a row of a table: transformers' model type and what it says beyond the numbers that all share.
Whatever could make transformers allocate before a weight is looked at is held against the tensors first.
Sources: llama.cpp's convert_hf_to_gguf.py and llama-model.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf.constants import MODEL_ARCH
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from server.targets.gguf.header import GGUFFile
from server.targets.target import TargetError

NUMBER = (int, float)


class BeyondNative(TargetError):
    """A file that is whole, of a model that only llama.cpp computes; the message says what is not read here."""


@dataclass(frozen=True)
class Architecture:
    """One ``general.architecture``.

    permuted: the rows of q and k lie with the two halves of each rotary pair side by side. extra: settings beyond the
    shared ones.
    """

    model_type: str
    model: MODEL_ARCH
    extra: Callable[[GGUFFile, str], dict[str, Any]]
    permuted: bool = False


def llama_extra(file: GGUFFile, _: str) -> dict[str, Any]:
    """Biases are there where the file holds them."""
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}


def qwen2_extra(_: GGUFFile, __: str) -> dict[str, Any]:
    """Biases of q, k and v belong to the architecture."""
    return {"use_sliding_window": False}


def qwen3_extra(file: GGUFFile, _: str) -> dict[str, Any]:
    """No biases unless the file holds them."""
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "use_sliding_window": False}


def granite_extra(file: GGUFFile, name: str) -> dict[str, Any]:
    """Four factors that other architectures have at 1."""
    factors = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    values = {setting: file.get(f"{name}.{key}", NUMBER) for setting, key in factors.items()}
    return llama_extra(file, name) | {setting: value for setting, value in values.items() if value is not None}


def smollm3_extra(file: GGUFFile, name: str) -> dict[str, Any]:
    """Every fourth layer has no rotary embedding; llama.cpp takes that from the architecture."""
    layers = number(file, f"{name}.block_count")
    return llama_extra(file, name) | {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)]}


ARCHITECTURES = {
    "llama": Architecture("llama", MODEL_ARCH.LLAMA, llama_extra, permuted=True),
    "qwen2": Architecture("qwen2", MODEL_ARCH.QWEN2, qwen2_extra),
    "qwen3": Architecture("qwen3", MODEL_ARCH.QWEN3, qwen3_extra),
    "granite": Architecture("granite", MODEL_ARCH.GRANITE, granite_extra, permuted=True),
    "smollm3": Architecture("smollm3", MODEL_ARCH.SMOLLM3, smollm3_extra, permuted=True),
}


def architecture(file: GGUFFile) -> Architecture:
    """The table's row. Errors: TargetError for an unknown architecture and for a file without weights."""
    name = file.get("general.architecture", str, "")
    if not file.tensors:
        raise TargetError(f"{file.path} holds a vocabulary only, no weights; give the whole model's file")
    if name not in ARCHITECTURES:
        raise BeyondNative(
            f"{file.path} holds a model of architecture {name!r}; known are {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]


def read_configuration(file: GGUFFile) -> Any:
    """transformers' configuration of the model in the file. Errors: TargetError naming the key that is wrong."""
    known, name = architecture(file), file.get("general.architecture", str)
    if file.get(f"{name}.expert_count", int, 0):
        raise BeyondNative(f"{file.path} is a mixture of experts, which is not read from GGUF files")
    settings = shared_settings(file, name)
    settings |= known.extra(file, name)
    try:
        return AutoConfig.for_model(known.model_type, **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise TargetError(f"{file.path}: its metadata does not describe a {name} model: {error}") from error


def shared_settings(file: GGUFFile, name: str) -> dict[str, Any]:
    """What every architecture has; held against the tensors, so that a lie is found before it costs memory."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise TargetError(f"{file.path} has no matrix token_embd.weight; it is no language model")
    hidden, heads = number(file, f"{name}.embedding_length"), number(file, f"{name}.attention.head_count")
    if embedding.shape[1] != hidden:
        raise TargetError(
            f"{file.path}: {name}.embedding_length is {hidden}, token_embd.weight has {embedding.shape[1]}"
        )
    head_size = number(file, f"{name}.attention.key_length", max(1, hidden // heads))
    kv_heads = number(file, f"{name}.attention.head_count_kv", heads)
    if head_size % 2 or heads % kv_heads:
        raise TargetError(f"{file.path}: {heads} heads of {head_size} over {kv_heads} key heads cannot be")
    queries = file.tensors.get("blk.0.attn_q.weight")
    if queries is not None and queries.shape[0] != heads * head_size:
        raise TargetError(
            f"{file.path}: {heads} heads of {head_size} are described, blk.0.attn_q.weight has {queries.shape[0]} rows"
        )
    return {
        "hidden_size": hidden,
        "num_hidden_layers": num_layers(file, name),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "intermediate_size": number(file, f"{name}.feed_forward_length"),
        "max_position_embeddings": number(file, f"{name}.context_length"),
        "rms_norm_eps": file.get(f"{name}.attention.layer_norm_rms_epsilon", NUMBER, 1e-6),
        "vocab_size": embedding.shape[0],
        "rope_parameters": rope_parameters(file, name, head_size),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            f"{token}_token_id": file.get(f"tokenizer.ggml.{key}_token_id", int)
            for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }


def num_layers(file: GGUFFile, name: str) -> int:
    """Layers described, which must be those that are there."""
    described = number(file, f"{name}.block_count")
    found = {int(match[1]) for key in file.tensors if (match := re.match(r"blk\.(\d{1,6})\.", key))}
    if found != set(range(len(found))) or len(found) != described:
        raise TargetError(f"{file.path}: {name}.block_count is {described}, tensors of {len(found)} layers are there")
    return described


def rope_parameters(file: GGUFFile, name: str, head_size: int) -> dict[str, Any]:
    """Rotary embedding; factors that the file holds as a tensor are applied to the frequencies afterwards."""
    parameters: dict[str, Any] = {
        "rope_type": file.get(f"{name}.rope.scaling.type", str, "none"),
        "rope_theta": float(file.get(f"{name}.rope.freq_base", NUMBER, 10000.0)),
    }
    rotated = number(file, f"{name}.rope.dimension_count", head_size)
    if rotated != head_size:
        parameters["partial_rotary_factor"] = rotated / head_size
    factor = file.get(f"{name}.rope.scaling.factor", NUMBER)
    if parameters["rope_type"] in ("none", "") or factor is None:
        return parameters | {"rope_type": "default"}
    if parameters["rope_type"] not in ("linear", "yarn"):
        raise BeyondNative(f"{file.path}: rope scaling {parameters['rope_type']!r} is not read; linear and yarn are")
    parameters["factor"] = float(factor)
    original = file.get(f"{name}.rope.scaling.original_context_length", int)
    if original is not None and parameters["rope_type"] == "yarn":
        parameters["original_max_position_embeddings"] = original
    return parameters


def number(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A positive whole number. Errors: TargetError where it is missing, not positive, or a number for each layer."""
    value = file.get(key, (int, list), default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise BeyondNative(f"{file.path}: {key} differs from layer to layer, which is not read from GGUF files")
        value = value[0]
    if not isinstance(value, int) or value < 1:
        raise TargetError(f"{file.path}: the metadata key {key} must be a positive number, not {value!r}")
    return value
