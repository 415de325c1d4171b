"""A tiny LLaMA model written as GGUF, with matrices of any type and a byte-level BPE tokenizer inside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 256, 256, 4, 2, 2
MATRICES = {
    "attn_q": (256, HIDDEN), "attn_k": (128, HIDDEN), "attn_v": (128, HIDDEN), "attn_output": (HIDDEN, 256),
    "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
}  # fmt: skip
PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
Kinds = dict[str, GGMLQuantizationType]


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [rows, bytes]: random codes under scales that give weights of about 0.1."""
    generator = np.random.default_rng(seed)
    if kind.name in ("F32", "F16", "BF16", "Q8_0"):
        return gguf.quants.quantize(generator.normal(scale=0.1, size=shape).astype(np.float32), kind)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0] * shape[1] // block, block_bytes), dtype=np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = 124
    else:
        size = {"Q4_K": 4e-4, "Q5_K": 2e-4, "Q6_K": 5e-5, "IQ4_NL": 2e-3, "IQ4_XS": 1e-4}.get(kind.name, 0.02)
        for place in {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(
            kind.name, [0]
        ):
            scales = generator.normal(scale=size, size=len(blocks)).astype(np.float16)
            blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


class TinyGGUF:
    """``write`` a file; ``model`` is transformers' own, with the values that gguf-py reads."""

    def __init__(self) -> None:
        alphabet = [chr(code) for code in range(33, 127)]
        self.tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġ", "Ċ", "th", "the"]
        self.types = [3, 3, 3, *[1] * (len(self.tokens) - 3)]
        self.merges = ["t h", "th e"]

    def tensors(self, kinds: Kinds, default: GGMLQuantizationType, tied: bool) -> dict[str, Any]:
        """Name -> (type, bytes)."""
        shapes = {"token_embd": (len(self.tokens), HIDDEN)} | ({} if tied else {"output": (len(self.tokens), HIDDEN)})
        shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in MATRICES.items()}
        found: dict[str, Any] = {}
        for seed, (name, shape) in enumerate(shapes.items()):
            kind = kinds.get(name.rpartition(".")[2], default)
            found[f"{name}.weight"] = (kind, random_blocks(kind, shape, seed))
        norms = ["output_norm"] + [
            f"blk.{layer}.{name}" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm")
        ]
        for seed, name in enumerate(norms):
            values = np.random.default_rng(100 + seed).normal(1.0, 0.1, HIDDEN).astype(np.float32)
            found[f"{name}.weight"] = (GGMLQuantizationType.F32, values)
        return found

    def write(
        self,
        file: Path,
        default: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
        kinds: Kinds | None = None,
        *,
        tied: bool = True,
        extra: Callable[[gguf.GGUFWriter], None] | None = None,
        split: int = 0,
        architecture: str = "llama",
        heads: int = HEADS,
        without: tuple[str, ...] = (),
    ) -> Path:
        writer = gguf.GGUFWriter(file, architecture, split_max_tensors=split)
        writer.add_context_length(256)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(heads)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}")
        if extra is not None:
            extra(writer)
        for name, (kind, data) in self.tensors(kinds or {}, default, tied).items():
            if not any(part in name for part in without):
                writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    def model(
        self, default: GGMLQuantizationType, kinds: Kinds | None = None, *, tied: bool = True
    ) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, vocab_size=len(self.tokens), max_position_embeddings=256, rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        state = {}
        for name, (kind, data) in self.tensors(kinds or {}, default, tied).items():
            values = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32).copy())
            for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
                if part in name:
                    values = halves_apart(values, heads)
            state[transformers_name(name)] = values
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        return model


def transformers_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[0] != "blk":
        return {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[
            parts[0]
        ] + ".weight"
    return f"model.layers.{parts[1]}.{PARTS[parts[2]]}.weight"


def halves_apart(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Row by row: in the file the two halves of a rotary pair lie side by side."""
    size = len(weight) // num_heads
    order = [h * size + (2 * i if i < size // 2 else 2 * i - size + 1) for h in range(num_heads) for i in range(size)]
    return weight[order]


@pytest.fixture(scope="session")
def tiny_gguf() -> TinyGGUF:
    return TinyGGUF()
