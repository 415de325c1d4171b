"""Architectures other than Llama in GGUF files: on the native layers as llama.cpp computes them, or by llama.cpp."""

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
from server.targets.native_target import NativeTarget
from server.targets.target import PrefillChunk, TargetError

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra gguf)")

HIDDEN, INNER, HEAD = 256, 256, 64
PROMPT = [5, 9, 40, 77, 3, 99, 60, 61, 62, 12]


def add(writer: GGUFWriter, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random tensors, for both layers; vectors near 1."""
    for layer in range(2):
        for seed, (name, shape) in enumerate(shapes.items()):
            values = np.random.default_rng(17 * layer + seed).normal(scale=0.1, size=shape).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", values + (len(shape) == 1))


OUT_NORMS = dict.fromkeys(("post_attention_norm", "post_ffw_norm"), (HIDDEN,))


def gemma2(writer: GGUFWriter) -> None:
    """Caps on scores and logits, a window of 8 positions in the first layer, norms on both sides of every part."""
    writer.add_sliding_window(8)
    writer.add_attn_logit_softcapping(2.0)
    writer.add_final_logit_softcapping(3.0)
    add(writer, OUT_NORMS)


def gemma3(writer: GGUFWriter) -> None:
    """A window of 8 positions in most layers, norms of queries and keys."""
    writer.add_sliding_window(8)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    add(writer, OUT_NORMS | dict.fromkeys(("attn_q_norm", "attn_k_norm"), (HEAD,)))


def olmo2(writer: GGUFWriter) -> None:
    """Norms behind the parts alone; those of queries and keys are over all heads."""
    add(writer, OUT_NORMS | {"attn_q_norm": (256,), "attn_k_norm": (128,)})


def phi3(writer: GGUFWriter) -> None:
    """q, k and v in one matrix, gate and up in another."""
    writer.add_rope_dimension_count(HEAD // 2)
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
    "gemma2": ("gemma2", gemma2, ()),
    "gemma3": ("gemma3", gemma3, ()),
    "phi3": ("phi3", phi3, ("attn_q.", "attn_k.", "attn_v.", "ffn_gate.", "ffn_up.")),
    "granite": ("granite", granite, ()),
    "olmo2": ("olmo2", olmo2, ("attn_norm", "ffn_norm")),
    "smollm3": ("smollm3", lambda _: None, ()),
    "experts": ("llama", experts, ("ffn_gate.", "ffn_up.", "ffn_down.")),
}


def written(name: str, tiny_gguf: Any, folder: Path) -> Path:
    architecture, extra, without = CASES[name]
    file: Path = tiny_gguf.write(
        folder / f"{name}.gguf", GGMLQuantizationType.F32, architecture=architecture, extra=extra, without=without,
        tied=name != "olmo2",
    )  # fmt: skip
    return file


@pytest.mark.parametrize("name", [name for name in CASES if name != "experts"])
def test_native_layers_compute_what_llama_cpp_does(name: str, tiny_gguf: Any, tmp_path: Path) -> None:
    """Also what its converter changed: norms that hold 1 more, rows of q and k in another order, factors."""
    file = written(name, tiny_gguf, tmp_path)
    assert choose_engine(file, None, None) == "native"
    target = load_target(file, None, 1, 96, 1, "bf16")
    assert isinstance(target, NativeTarget)
    got = target.prefill(PrefillChunk(0, PROMPT * 3)).logits
    want = load_target(file, None, 1, 96, 1, engine="llama.cpp").prefill(PrefillChunk(0, PROMPT * 3)).logits
    assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("name", ["gemma3", "phi3", "experts"])
def test_drafts_leave_the_text_as_it_is(name: str, tiny_gguf: Any, tmp_path: Path) -> None:
    file = written(name, tiny_gguf, tmp_path)
    if name == "experts":
        assert choose_engine(file, None, None) == "llama.cpp"
    target = load_target(file, None, 2, 96, 1, engine="llama.cpp")
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
