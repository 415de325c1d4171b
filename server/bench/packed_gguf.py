"""Write a packed model as GGUF, weight for weight: llama.cpp's Q4_0 and Q8_0 hold the very codes and scales of ours.

A group of 32 inputs is a block: an fp16 scale, then 32 codes (Q4_0: offset by 8, the first half of the group in the low
nibbles; Q8_0: signed bytes). Source: ggml's ``block_q4_0`` and ``block_q8_0``. No tokenizer is written: the file serves
measurements, whose tokens are numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from kernels.linear_lowbit import PackedWeight, unpack
from kernels.linear_lowbit.reference import QuantisedWeight
from server.targets.gguf.vocabulary import GGUFError
from server.targets.gguf.writing import add_shape, pairs_together
from server.targets.packed_model import PackedModel

TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0, 16: gguf.GGMLQuantizationType.BF16}
FILE_TYPES = {
    "int4": gguf.LlamaFileType.MOSTLY_Q4_0,
    "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
}
BLOCK = 32

Stored = tuple[str, gguf.GGMLQuantizationType, "np.ndarray[Any, np.dtype[Any]]"]


def write_packed_gguf(packed: PackedModel, file: Path) -> Path:
    """Write a LLaMA model. Errors: GGUFError for other architectures, group sizes and zero points."""
    config = packed.model.config
    if config.architectures not in (None, ["LlamaForCausalLM"]):
        raise GGUFError(f"{', '.join(config.architectures)} cannot be written as GGUF; only LlamaForCausalLM can")
    for weight in (packed.head, *(weight for layer in packed.layers for weight in layer.matrices)):
        if weight.bits <= 8 and (weight.group_size != BLOCK or weight.zero_point or weight.wide_scales or weight.table):
            raise GGUFError(f"GGUF's blocks are symmetric groups of {BLOCK}; these weights are packed otherwise")
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=True)  # tensors wait on the disk, not in memory
    writer.add_file_type(FILE_TYPES[packed.weights])
    add_shape(writer, config)
    writer.add_tokenizer_model("no_vocab")
    for name, kind, values in stored_tensors(packed):
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored_tensors(packed: PackedModel) -> Iterator[Stored]:
    """Every tensor under llama.cpp's name, as the bytes of its type."""
    base, config = packed.model.base_model, packed.model.config
    yield "token_embd.weight", TYPES[16], bf16_bytes(base.embed_tokens.weight.detach())
    yield "output_norm.weight", gguf.GGMLQuantizationType.F32, base.norm.weight.detach().float().numpy()
    yield "output.weight", TYPES[packed.head.bits], blocks(unpack_rows(packed.head), packed.head.bits)
    for index, layer in enumerate(packed.layers):
        form = layer.form
        query, key = form.num_heads * form.head_dim, form.num_kv_heads * form.head_dim
        inner = config.intermediate_size
        joined = unpack_rows(*layer.qkv)
        q, k, v = (
            rows_of(joined, *span) for span in ((0, query), (query, query + key), (query + key, query + 2 * key))
        )
        both = unpack_rows(*layer.gate_up)
        matrices = {
            "attn_q": reordered(q, form.num_heads), "attn_k": reordered(k, form.num_kv_heads), "attn_v": v,
            "attn_output": unpack_rows(layer.output), "ffn_down": unpack_rows(layer.down),
            "ffn_gate": rows_of(both, 0, inner), "ffn_up": rows_of(both, inner, 2 * inner),
        }  # fmt: skip
        for name, matrix in matrices.items():
            yield f"blk.{index}.{name}.weight", TYPES[layer.down.bits], blocks(matrix, layer.down.bits)
        assert layer.input_norm is not None and layer.post_norm is not None, "a Llama's layers have both"
        for name, norm in (("attn_norm", layer.input_norm), ("ffn_norm", layer.post_norm)):
            yield f"blk.{index}.{name}.weight", gguf.GGMLQuantizationType.F32, norm.numpy()


Rows = tuple[Tensor, Tensor | None]  # codes uint8 [out, in] and scale fp16 [out, groups]; or bf16 [out, in] and None


def unpack_rows(*parts: PackedWeight) -> Rows:
    """Codes and scales in reading order, of matrices of one format behind one another."""
    kept = [unpack(part) for part in parts]
    quantised = [part for part in kept if isinstance(part, QuantisedWeight)]
    if not quantised:
        return torch.cat([part.to(torch.bfloat16) for part in kept if isinstance(part, torch.Tensor)]), None
    return torch.cat([part.codes for part in quantised]), torch.cat([part.scale for part in quantised])


def rows_of(rows: Rows, begin: int, end: int) -> Rows:
    """Some of the output rows."""
    return rows[0][begin:end], None if rows[1] is None else rows[1][begin:end]


def reordered(rows: Rows, num_heads: int) -> Rows:
    """q and k rows in llama.cpp's order of rotary pairs."""
    return pairs_together(rows[0], num_heads), None if rows[1] is None else pairs_together(rows[1], num_heads)


def blocks(rows: Rows, bits: int) -> np.ndarray[Any, np.dtype[Any]]:
    """uint8 [out, bytes of a row]."""
    codes, scale = rows
    if scale is None:
        return bf16_bytes(codes)
    groups = codes.reshape(len(codes), -1, BLOCK)
    pairs = groups[..., : BLOCK // 2] | groups[..., BLOCK // 2 :] << 4
    body = pairs if bits == 4 else groups ^ 128  # Q8_0: code - 128 as a signed byte
    halves = scale.contiguous().view(torch.uint8).reshape(len(codes), -1, 2)
    return torch.cat((halves, body), dim=-1).flatten(1).numpy()


def bf16_bytes(values: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """uint8 [out, 2 * in]."""
    return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
