"""Write a folder of a Llama-like model as GGUF, so that llama.cpp runs the very same weights.

Tensors are streamed one by one. transformers keeps the two halves of a rotary pair half a head apart, llama.cpp's
``llama`` architecture keeps them side by side, so the rows of q and k are reordered within each head.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.targets.checkpoint import check_files, weight_files
from server.targets.gguf.vocabulary import GGUFError, add_vocabulary, read_vocabulary

# transformers' class -> llama.cpp's architecture. Mistral is its ``llama`` too.
ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
FORMATS = {
    "fp32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "int4": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Rotary scalings that are a fixed factor per frequency, which GGUF holds as a tensor.
STATIC_ROPE = ("default", "linear", "llama3")


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
    architecture = ARCHITECTURES[config.architectures[0]]
    vocabulary = read_vocabulary(folder, config.vocab_size)
    quantization, file_type = FORMATS[weights]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
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
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise GGUFError(f"{', '.join(names)} cannot be written as GGUF; {', '.join(ARCHITECTURES)} can")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise GGUFError(f"a {names[0]} with {name} cannot be written as GGUF; only one without can")
    if getattr(config, "use_sliding_window", False) or (names[0].startswith("Mistral") and config.sliding_window):
        raise GGUFError("a model with a sliding window cannot be written as GGUF; llama.cpp would not apply it")
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
    architecture = ARCHITECTURES[config.architectures[0]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    permuted = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - the handle is no mapping
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if mapped is None:
                    raise GGUFError(f"{file} holds {name}, which the {architecture.name} of GGUF has no place for")
                tensor: Tensor = weights.get_tensor(name)
                heads = permuted.get(".".join(name.split(".")[-2:]))
                if heads is not None and architecture is gguf.MODEL_ARCH.LLAMA:
                    tensor = pairs_together(tensor, heads)
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
