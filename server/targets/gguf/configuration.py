"""A GGUF file's metadata as a configuration of transformers.

Each architecture is a row of a table: transformers' model type and what it says beyond the numbers that all share.
Whatever could make transformers allocate before a weight is looked at is held against the tensors first.
Sources: llama.cpp's convert_hf_to_gguf.py and llama-model.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from server.targets.checkpoint import reason_of
from server.targets.gguf.header import GGUFFile
from server.targets.target import TargetError

NUMBER = (int, float)
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


class BeyondNative(TargetError):
    """A file that is whole, of a model that only llama.cpp computes; the message says what is not read here."""


@dataclass(frozen=True)
class Architecture:
    """One ``general.architecture``.

    permuted: the rows of q and k lie with the two halves of each rotary pair side by side. norm_offset: what the file's
    norms hold beyond transformers'. turns_part: a head's first values alone may be turned. extra: settings beyond the
    shared ones.
    """

    model_type: str
    model: MODEL_ARCH
    extra: Callable[[GGUFFile, str], dict[str, Any]]
    permuted: bool = False
    norm_offset: float = 0.0
    turns_part: bool = False


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
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    return llama_extra(file, name) | {setting: told(file, f"{name}.{key}", 1.0) for setting, key in keys.items()}


def smollm3_extra(file: GGUFFile, name: str) -> dict[str, Any]:
    """Every fourth layer has no rotary embedding; llama.cpp takes that from the architecture."""
    layers = number(file, f"{name}.block_count")
    return llama_extra(file, name) | {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)]}


def gemma_extra(file: GGUFFile, name: str, largest: int) -> dict[str, Any]:
    """The largest model of a generation, known by its layers, scales scores by its hidden size over its heads."""
    layers, hidden, heads, head_size = sizes(file, name)
    return {
        "query_pre_attn_scalar": hidden // heads if layers == largest else head_size,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": told(file, f"{name}.final_logit_softcapping"),
    }


def gemma2_extra(file: GGUFFile, name: str) -> dict[str, Any]:
    """Caps on scores and logits; every other layer has a window, the first one does."""
    extra = gemma_extra(file, name, 46)
    return extra | {
        "sliding_window": number(file, f"{name}.attention.sliding_window", 4096),
        "attn_logit_softcapping": told(file, f"{name}.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": extra["final_logit_softcapping"] or 30.0,
    }


def gemma3_extra(file: GGUFFile, name: str) -> dict[str, Any]:
    """Five layers with a window and a rotary base of their own before each without; all without where none is told."""
    layers, _, _, head_size = sizes(file, name)
    window = told_window(file, name)
    kinds = ["sliding_attention" if window and (i + 1) % 6 else "full_attention" for i in range(layers)]
    local_base = positive(file, f"{name}.rope.freq_base_swa", 10000.0)
    ropes = {
        "full_attention": rope_parameters(file, name, head_size),
        "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
    }
    extra = gemma_extra(file, name, 62)
    return extra | {"sliding_window": window, "layer_types": kinds, "rope_parameters": ropes}


LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


def phi3_extra(file: GGUFFile, name: str) -> dict[str, Any]:
    """A window in every layer, where one is told; two sets of rotary factors, where the file holds them."""
    extra: dict[str, Any] = {"sliding_window": told_window(file, name)}
    if LONG_FACTORS not in file.tensors or SHORT_FACTORS not in file.tensors:
        return extra
    base = rope_parameters(file, name, sizes(file, name)[3])
    original = number(file, f"{name}.rope.scaling.original_context_length", number(file, f"{name}.context_length"))
    return extra | {
        "rope_parameters": base | {
            "rope_type": "longrope", "original_max_position_embeddings": original,
            "attention_factor": told(file, f"{name}.rope.scaling.attn_factor", 1.0),
            "short_factor": factors(file, SHORT_FACTORS), "long_factor": factors(file, LONG_FACTORS),
        }
    }  # fmt: skip


def factors(file: GGUFFile, name: str) -> list[float]:
    """A tensor of a few numbers. Errors: TargetError for another type than F32."""
    tensor = file.tensors[name]
    if tensor.kind is not GGMLQuantizationType.F32:
        raise TargetError(f"{file.path}: the tensor {name} is of type {tensor.kind.name}, rotary factors are F32")
    values: list[float] = tensor.data.view("<f4").tolist()
    return values


ARCHITECTURES = {
    "llama": Architecture("llama", MODEL_ARCH.LLAMA, llama_extra, permuted=True),
    "qwen2": Architecture("qwen2", MODEL_ARCH.QWEN2, qwen2_extra),
    "qwen3": Architecture("qwen3", MODEL_ARCH.QWEN3, qwen3_extra),
    "granite": Architecture("granite", MODEL_ARCH.GRANITE, granite_extra, permuted=True),
    "smollm3": Architecture("smollm3", MODEL_ARCH.SMOLLM3, smollm3_extra, permuted=True),
    "gemma2": Architecture("gemma2", MODEL_ARCH.GEMMA2, gemma2_extra, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", MODEL_ARCH.GEMMA3, gemma3_extra, norm_offset=1.0),
    "phi3": Architecture("phi3", MODEL_ARCH.PHI3, phi3_extra, turns_part=True),
    "olmo2": Architecture("olmo2", MODEL_ARCH.OLMO2, llama_extra),
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
    check_turned(file, name, known, settings["head_dim"])
    settings |= known.extra(file, name)
    try:
        return AutoConfig.for_model(known.model_type, **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise TargetError(f"{file.path}: its metadata does not describe a {name} model: {reason_of(error)}") from error


def shared_settings(file: GGUFFile, name: str) -> dict[str, Any]:
    """What every architecture has; held against the tensors, so that a lie is found before it costs memory."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise TargetError(f"{file.path} has no matrix token_embd.weight; it is no language model")
    _, hidden, heads, head_size = sizes(file, name)
    if embedding.shape[1] != hidden:
        raise TargetError(
            f"{file.path}: {name}.embedding_length is {hidden}, token_embd.weight has {embedding.shape[1]}"
        )
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
        "rms_norm_eps": positive(file, f"{name}.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "rope_parameters": rope_parameters(file, name, head_size),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            f"{token}_token_id": file.get(f"tokenizer.ggml.{key}_token_id", int)
            for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }


def sizes(file: GGUFFile, name: str) -> tuple[int, int, int, int]:
    """Layers, hidden size, query heads and the size of a head, as the file tells them."""
    layers, hidden = number(file, f"{name}.block_count"), number(file, f"{name}.embedding_length")
    heads = number(file, f"{name}.attention.head_count")
    return layers, hidden, heads, number(file, f"{name}.attention.key_length", max(1, hidden // heads))


def num_layers(file: GGUFFile, name: str) -> int:
    """Layers described, which must be those that are there."""
    described = number(file, f"{name}.block_count")
    found = {int(match[1]) for key in file.tensors if (match := re.match(r"blk\.(\d{1,6})\.", key))}
    if found != set(range(len(found))) or len(found) != described:
        raise TargetError(f"{file.path}: {name}.block_count is {described}, tensors of {len(found)} layers are there")
    return described


def check_turned(file: GGUFFile, name: str, known: Architecture, head_size: int) -> None:
    """Errors: TargetError for a rotary embedding of more values than a head has, or of fewer than are turned here."""
    key = f"{name}.rope.dimension_count"
    turned = number(file, key, head_size)
    if turned > head_size or turned % 2:
        raise TargetError(f"{file.path}: {key} is {turned}; it must be even and at most {head_size}, a head's values")
    if turned < head_size and not known.turns_part:
        raise BeyondNative(
            f"{file.path}: {key} is {turned}; only {name} models that turn all {head_size} values of a head are read"
        )


def rope_parameters(file: GGUFFile, name: str, head_size: int) -> dict[str, Any]:
    """Rotary embedding; factors that the file holds as a tensor are applied to the frequencies afterwards.

    As in llama.cpp a factor without a type is linear, and older files call it ``rope.scale_linear``.
    """
    parameters: dict[str, Any] = {"rope_theta": positive(file, f"{name}.rope.freq_base", 10000.0)}
    turned = number(file, f"{name}.rope.dimension_count", head_size)
    if turned != head_size:
        parameters["partial_rotary_factor"] = turned / head_size
    kind = file.get(f"{name}.rope.scaling.type", str, "linear")
    if kind not in ROPE_SCALINGS:
        raise BeyondNative(f"{file.path}: rope scaling {kind!r} is not read; known are {', '.join(ROPE_SCALINGS)}")
    factor = told(file, f"{name}.rope.scaling.factor") or told(file, f"{name}.rope.scale_linear")
    if kind == "none" or factor is None:
        return parameters | {"rope_type": "default"}
    if kind == "longrope":
        raise BeyondNative(f"{file.path}: rope scaling longrope with a factor is not read; linear and yarn are")
    parameters |= {"rope_type": kind, "factor": factor}
    original = file.get(f"{name}.rope.scaling.original_context_length", int)
    if original is not None and kind == "yarn":
        parameters["original_max_position_embeddings"] = original
    return parameters


def told_window(file: GGUFFile, name: str) -> int | None:
    """Positions that a row sees; None, which files say by 0 too: all before it. Errors: TargetError."""
    key = f"{name}.attention.sliding_window"
    return number(file, key) if file.get(key, int) else None


def told(file: GGUFFile, key: str, default: Any = None) -> Any:
    """A factor, a finite and positive number; 0 is how files say that there is none. Errors: TargetError."""
    return positive(file, key) if file.get(key, NUMBER) else default


def positive(file: GGUFFile, key: str, default: float | None = None) -> float:
    """A finite number above 0. Errors: TargetError where it is missing or another."""
    value = file.get(key, NUMBER, default)
    if value is None or not (math.isfinite(value) and value > 0):
        raise TargetError(f"{file.path}: the metadata key {key} must be a finite number above 0, not {value!r}")
    return float(value)


def number(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A positive whole number of 32 bits. Errors: TargetError where it is missing, another, or one for each layer."""
    value = file.get(key, (int, list), default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise BeyondNative(f"{file.path}: {key} differs from layer to layer, which is not read from GGUF files")
        value = value[0]
    if not isinstance(value, int) or not 1 <= value < 2**31:
        raise TargetError(f"{file.path}: the metadata key {key} must be a positive number below 2**31, not {value!r}")
    return value
