"""Architectures that the native layers do not compute: through llama.cpp, by themselves, with drafts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from doubles import OracleDrafter
from drafters.proposal import Budget
from server.engine.completion import generate
from server.engine.engine import Engine, EngineOptions
from server.engine.request import Request, SamplingParams
from server.launch import load_codec
from server.targets.loading import choose_engine, load_target
from server.targets.target import TargetError

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra gguf)")

HIDDEN, INNER, HEAD = 256, 256, 64
PROMPT = [5, 9, 40, 77, 3, 99, 60, 61, 62, 12]


def add(writer: GGUFWriter, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random tensors, for both layers; vectors near 1."""
    for layer in range(2):
        for seed, (name, shape) in enumerate(shapes.items()):
            values = np.random.default_rng(17 * layer + seed).normal(scale=0.1, size=shape).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", values + (len(shape) == 1))


def gemma3(writer: GGUFWriter) -> None:
    """A window of 8 positions in most layers, norms on both sides of every part."""
    writer.add_sliding_window(8)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    norms = dict.fromkeys(("attn_q_norm", "attn_k_norm"), (HEAD,))
    add(writer, norms | dict.fromkeys(("post_attention_norm", "post_ffw_norm"), (HIDDEN,)))


def phi3(writer: GGUFWriter) -> None:
    """q, k and v in one matrix, gate and up in another."""
    writer.add_rope_dimension_count(HEAD)
    writer.add_sliding_window(8)
    add(writer, {"attn_qkv": (256 + 128 + 128, HIDDEN), "ffn_up": (2 * INNER, HIDDEN)})


def experts(writer: GGUFWriter) -> None:
    """Four experts, two of them for each token."""
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    matrices = {f"ffn_{part}_exps": (4, INNER, HIDDEN) for part in ("gate", "up", "down")}
    add(writer, {"ffn_gate_inp": (4, HIDDEN)} | matrices)


def granite(writer: GGUFWriter) -> None:
    """Four factors that Llama has at 1."""
    writer.add_attention_scale(0.1)
    writer.add_embedding_scale(2.0)
    writer.add_residual_scale(0.5)
    writer.add_logit_scale(4.0)


Case = tuple[str, Callable[[GGUFWriter], None], tuple[str, ...]]
CASES: dict[str, Case] = {
    "gemma3": ("gemma3", gemma3, ()),
    "phi3": ("phi3", phi3, ("attn_q.", "attn_k.", "attn_v.", "ffn_gate.", "ffn_up.")),
    "experts": ("llama", experts, ("ffn_gate.", "ffn_up.", "ffn_down.")),
    "granite": ("granite", granite, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_drafts_leave_the_text_as_it_is(name: str, tiny_gguf: Any, tmp_path: Path) -> None:
    architecture, extra, without = CASES[name]
    file = tiny_gguf.write(
        tmp_path / f"{name}.gguf", GGMLQuantizationType.F32, architecture=architecture, extra=extra, without=without
    )
    assert choose_engine(file, None, None) == "llama.cpp"
    target = load_target(file, None, 2, 96, 1)
    texts = []
    for drafter in (None, lambda: OracleDrafter([[*PROMPT, *texts[0]]], target.info.vocab_size)):
        engine = Engine(target, drafter and drafter(), EngineOptions(2, 80, Budget(12, 3, 3), cache_bytes=1 << 20))
        request = Request("one", PROMPT, 32, SamplingParams(temperature=0))
        result = generate(engine, [request])["one"]
        texts.append(list(result.token_ids))
    target.check_integrity()  # type: ignore[attr-defined]
    assert texts[0] == texts[1]
    assert result.finished.stats.acceptance_length > 2
    assert load_codec(file).encode("the") == [tiny_gguf.tokens.index("the")]


def test_models_that_cannot_drop_rows_are_refused(tiny_gguf: Any, tmp_path: Path) -> None:
    def recurrent(writer: GGUFWriter) -> None:
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(512)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(16)
        names = {"ssm_in": (1024, HIDDEN), "ssm_conv1d": (512, 4), "ssm_x": (48, 512), "ssm_dt": (512, 16)}
        add(writer, names | {"ssm_out": (HIDDEN, 512)})
        for layer in range(2):
            writer.add_tensor(f"blk.{layer}.ssm_a", -np.ones((512, 16), np.float32))
            writer.add_tensor(f"blk.{layer}.ssm_d", np.ones(512, np.float32))
            for name in ("ssm_conv1d", "ssm_dt"):
                writer.add_tensor(f"blk.{layer}.{name}.bias", np.zeros(512, np.float32))

    without = ("attn_q.", "attn_k.", "attn_v.", "attn_output.", "ffn_")
    file = tiny_gguf.write(
        tmp_path / "mamba.gguf", GGMLQuantizationType.F32, architecture="mamba", extra=recurrent, without=without
    )
    with pytest.raises(TargetError, match=r"mamba.gguf cannot be run by llama.cpp: .*it has recurrent layers"):
        load_target(file, None, 1, 64, 1)
