"""A trained model that nobody here made reproduces its documented text through the whole engine.

The checkpoint is in llama2.c's first format: seven int32, then fp32 tensors; rotary pairs are adjacent elements there,
halves apart in transformers, so the rows of the query and key projections are reordered.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drafters.drafter import DraftState
from drafters.ngram import NGramDrafter
from drafters.proposal import Budget, Proposal
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.targets.torch_target import TorchTarget

BEGIN = 1


def halves_apart(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows ordered (pair, part) within a head become ordered (part, pair)."""
    rows, width = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).transpose(0, 2, 1, 3).reshape(rows, width)


def convert(file: Path) -> LlamaForCausalLM:
    raw = file.read_bytes()
    dim, inner, layers, heads, kv_heads, vocab, context = struct.unpack("7i", raw[:28])
    numbers = np.frombuffer(raw, dtype=np.float32, offset=28)
    place = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return numbers[place - count : place].reshape(shape)

    head = dim // heads
    parts = {
        "embed": take(vocab, dim),
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, heads * head, dim),
        "self_attn.k_proj": take(layers, kv_heads * head, dim),
        "self_attn.v_proj": take(layers, kv_heads * head, dim),
        "self_attn.o_proj": take(layers, dim, heads * head),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, inner, dim),
        "mlp.down_proj": take(layers, dim, inner),
        "mlp.up_proj": take(layers, inner, dim),
        "norm": take(dim),
    }
    state = {"model.embed_tokens.weight": parts.pop("embed"), "model.norm.weight": parts.pop("norm")}
    for name, stack in parts.items():
        for layer, weight in enumerate(stack):
            turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            state[f"model.layers.{layer}.{name}.weight"] = weight if turned is None else halves_apart(weight, turned)
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=context, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=False)
    model.tie_weights()
    return model


def pieces(file: Path) -> list[bytes]:
    """Texts of the tokens; byte tokens are written <0xNN>."""
    raw = file.read_bytes()
    place, texts = 4, []
    while place < len(raw):
        (length,) = struct.unpack_from("i", raw, place + 4)
        text = raw[place + 8 : place + 8 + length]
        texts.append(bytes([int(text[3:5], 16)]) if text.startswith(b"<0x") else text)
        place += 8 + length
    return texts


class RandomTrees(NGramDrafter):
    """Trees of random tokens; the n-gram chain first, so that some drafts are accepted."""

    def propose(self, states: list[DraftState], budget: Budget) -> list[Proposal]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(len(states[0].token_ids))
        trees = []
        for chain in super().propose(states, budget):
            tokens, parents = list(chain.token_ids), list(chain.parents)
            while len(tokens) < budget.rows - 1:
                parents.append(int(torch.randint(0, len(tokens), (), generator=generator)) if tokens else None)
                tokens.append(int(torch.randint(0, 512, (), generator=generator)))
            trees.append(Proposal(tuple(tokens), tuple(parents), (-1.0,) * len(tokens)))
        return trees


def documented_text(file: Path) -> str:
    """The first fenced sample of the model's page, without its command line."""
    block = file.read_text(encoding="utf-8").split("-t 0.0\n", 1)[1]
    return block.split("```", 1)[0].rstrip("\n")


@pytest.mark.parametrize("drafter", [None, RandomTrees()], ids=["plain", "random trees"])
def test_the_documented_story_comes_out(larger_data: Path, tmp_path: Path, drafter: NGramDrafter | None) -> None:
    convert(larger_data / "models" / "stories260K.bin").save_pretrained(tmp_path)
    target = TorchTarget.load(tmp_path, "fp32", 1, 400)
    engine = Engine(target, drafter, EngineOptions(1, 320, Budget(16, 4, 5)))
    request = Request("story", [BEGIN], 256, SamplingParams(temperature=0), stop_ids=frozenset({BEGIN}))
    result = generate(engine, [request])["story"]
    vocabulary = pieces(larger_data / "tokenizers" / "tok512.bin")
    text = b"".join(vocabulary[token_id] for token_id in result.token_ids).decode("utf-8").strip()
    documented = documented_text(larger_data / "models" / "stories260K_doc.md")
    assert text.startswith(documented) or documented.startswith(text)
    assert len(text) > 500
    if drafter is not None:
        assert result.finished.stats.accepted > 0
