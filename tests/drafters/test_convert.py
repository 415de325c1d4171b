"""EAGLE checkpoints of the published names and shapes: the converted drafter computes what the formulas say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from drafters.convert import convert_eagle
from drafters.dovetail import DovetailDrafter, load_drafter
from drafters.drafter import DrafterError, DraftState, Observation
from drafters.proposal import Budget

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, DRAFT_VOCAB = 32, 48, 4, 2, 40, 12
HEAD_DIM = HIDDEN // HEADS
THETA, EPS = 500.0, 1e-5
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB, "rms_norm_eps": EPS, "rope_theta": THETA, "hidden_act": "silu", "num_hidden_layers": 1,
    "model_type": "llama",
}  # fmt: skip
State = dict[str, torch.Tensor]


def block(prefix: str, width: int) -> State:
    return {
        f"{prefix}self_attn.q_proj.weight": torch.randn(HEADS * HEAD_DIM, width) / 4,
        f"{prefix}self_attn.k_proj.weight": torch.randn(KV_HEADS * HEAD_DIM, width) / 4,
        f"{prefix}self_attn.v_proj.weight": torch.randn(KV_HEADS * HEAD_DIM, width) / 4,
        f"{prefix}self_attn.o_proj.weight": torch.randn(HIDDEN, HEADS * HEAD_DIM) / 4,
        f"{prefix}mlp.gate_proj.weight": torch.randn(INNER, HIDDEN) / 4,
        f"{prefix}mlp.up_proj.weight": torch.randn(INNER, HIDDEN) / 4,
        f"{prefix}mlp.down_proj.weight": torch.randn(HIDDEN, INNER) / 4,
        f"{prefix}post_attention_layernorm.weight": torch.rand(HIDDEN) + 0.5,
    }


def eagle_state(num_blocks: int = 1) -> State:
    torch.manual_seed(0)
    state = {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "fc.bias": torch.randn(HIDDEN)}
    state["fc.weight"] = torch.randn(HIDDEN, 2 * HIDDEN) / 4
    for i in range(num_blocks):
        state |= block(f"layers.{i}.", HIDDEN)
        if i:
            state[f"layers.{i}.input_layernorm.weight"] = torch.rand(HIDDEN) + 0.5
    return state


def eagle3_state() -> State:
    torch.manual_seed(1)
    draft_ids = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    marks = torch.zeros(VOCAB, dtype=torch.bool)
    marks[draft_ids] = True
    norms = ("norm.weight", "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight")
    return {
        "fc.weight": torch.randn(HIDDEN, 3 * HIDDEN) / 4,
        "lm_head.weight": torch.randn(DRAFT_VOCAB, HIDDEN),
        "d2t": draft_ids - torch.arange(DRAFT_VOCAB),
        "t2d": marks,
        **{name: torch.rand(HIDDEN) + 0.5 for name in norms},
        **block("midlayer.", 2 * HIDDEN),
    }


def write(folder: Path, state: State, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def turn(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions by complex numbers: x [n, heads, D], row i at position i, halves paired."""
    first, second = x.chunk(2, dim=-1)
    angles = torch.outer(torch.arange(len(x)).double(), THETA ** (-torch.arange(HEAD_DIM // 2).double() * 2 / HEAD_DIM))
    turned = torch.complex(first.double(), second.double()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1).float()


def slow_block(s: State, prefix: str, residual: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """A Llama block over whole sequences [n, H], one head and one row at a time."""
    query = turn((read @ s[f"{prefix}self_attn.q_proj.weight"].T).view(-1, HEADS, HEAD_DIM))
    key = turn((read @ s[f"{prefix}self_attn.k_proj.weight"].T).view(-1, KV_HEADS, HEAD_DIM))
    value = (read @ s[f"{prefix}self_attn.v_proj.weight"].T).view(-1, KV_HEADS, HEAD_DIM)
    rows = []
    for i in range(len(read)):
        heads = []
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            weights = (key[: i + 1, shared] @ query[i, head] / HEAD_DIM**0.5).softmax(0)
            heads.append(weights @ value[: i + 1, shared])
        rows.append(torch.cat(heads))
    hidden = residual + torch.stack(rows) @ s[f"{prefix}self_attn.o_proj.weight"].T
    read = norm(hidden, s[f"{prefix}post_attention_layernorm.weight"])
    gate = functional.silu(read @ s[f"{prefix}mlp.gate_proj.weight"].T) * (read @ s[f"{prefix}mlp.up_proj.weight"].T)
    return hidden + gate @ s[f"{prefix}mlp.down_proj.weight"].T


def slow_eagle(s: State, features: torch.Tensor, embedded: torch.Tensor, num_blocks: int) -> torch.Tensor:
    hidden = torch.cat((embedded, features), dim=-1) @ s["fc.weight"].T + s["fc.bias"]
    for i in range(num_blocks):
        read = norm(hidden, s[f"layers.{i}.input_layernorm.weight"]) if i else hidden
        hidden = slow_block(s, f"layers.{i}.", hidden, read)
    return hidden


def slow_eagle3(s: State, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    read = (norm(embedded, s["midlayer.input_layernorm.weight"]), norm(hidden, s["midlayer.hidden_norm.weight"]))
    return slow_block(s, "midlayer.", hidden, torch.cat(read, dim=-1))


def serve(folder: Path, embedding: torch.Tensor, lm_head: torch.Tensor) -> DovetailDrafter:
    return load_drafter(folder, embedding, lm_head, torch.device("cpu"), torch.float32, 1, 32)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_eagle_1_and_2_compute_the_reference_formulas(tmp_path: Path, num_blocks: int) -> None:
    state = eagle_state(num_blocks)
    report = convert_eagle(write(tmp_path / "eagle", state, num_hidden_layers=num_blocks), tmp_path / "drafter")
    assert (report.kind, report.num_blocks, report.dropped) == ("eagle", num_blocks, ("embed_tokens.weight",))
    embedding, lm_head = state["embed_tokens.weight"], torch.randn(VOCAB, HIDDEN)
    drafter = serve(tmp_path / "drafter", embedding, lm_head)
    features, next_ids = torch.randn(7, HIDDEN), [3, 1, 4, 1, 5, 9, 2]
    drafter.observe([Observation(0, features, next_ids)])
    outputs = slow_eagle(state, features, embedding[next_ids], num_blocks)
    torch.testing.assert_close(drafter.last_outputs[0], outputs[-1], atol=1e-4, rtol=1e-4)
    (proposal,) = drafter.propose([DraftState(0, next_ids)], Budget(3, 1, 1))
    features, next_ids = torch.cat((features, outputs[-1:])), [*next_ids, proposal.token_ids[0]]
    second = slow_eagle(state, features, embedding[next_ids], num_blocks)[-1]
    assert proposal.token_ids == (int((lm_head @ outputs[-1]).argmax()), int((lm_head @ second).argmax()))


def test_eagle_3_computes_the_reference_formulas_and_drafts_its_own_tokens(tmp_path: Path) -> None:
    state = eagle3_state()
    report = convert_eagle(write(tmp_path / "eagle", state, draft_vocab_size=DRAFT_VOCAB), tmp_path / "drafter")
    assert (report.kind, report.draft_vocab_size, report.feature_layers) == ("eagle3", 12, ("low", "mid", "high"))
    embedding = torch.randn(VOCAB, HIDDEN)
    drafter = serve(tmp_path / "drafter", embedding, torch.randn(VOCAB, HIDDEN))
    assert drafter.feature_layers == ("low", "mid", "high")
    features, next_ids = torch.randn(7, 3 * HIDDEN), [3, 1, 4, 1, 5, 9, 2]
    drafter.observe([Observation(0, features[:4], next_ids[:4])])
    drafter.observe([Observation(0, features[4:], next_ids[4:])])
    hidden = features @ state["fc.weight"].T
    proposed, wanted = drafter.propose([DraftState(0, next_ids)], Budget(4, 1, 2))[0], []
    for _ in range(3):
        output = slow_eagle3(state, hidden, embedding[next_ids])[-1]
        log_probs = (state["lm_head.weight"] @ norm(output, state["norm.weight"])).log_softmax(0)
        best = int(log_probs.argmax())
        wanted.append((best + int(state["d2t"][best]), pytest.approx(float(log_probs[best]), abs=1e-4)))
        hidden, next_ids = torch.cat((hidden, output[None])), [*next_ids, wanted[-1][0]]
    assert list(zip(proposed.token_ids, proposed.log_probs, strict=True)) == wanted


def test_eagle_3_with_the_whole_vocabulary_and_biases(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in eagle3_state().items() if name not in ("d2t", "t2d")}
    state["lm_head.weight"] = torch.randn(VOCAB, HIDDEN)
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    state |= {f"midlayer.self_attn.{name}_proj.bias": torch.full((n,), float(n)) for name, n in rows.items()}
    convert_eagle(write(tmp_path / "eagle", state), tmp_path / "drafter")
    drafter = serve(tmp_path / "drafter", torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    assert drafter.network.draft_ids is None
    want = torch.cat([torch.full((n,), float(n)) for n in rows.values()])
    assert torch.equal(drafter.network.state_dict()["block.qkv_proj.bias"], want)


def test_weights_keep_their_type_and_every_bit(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in eagle_state().items()}
    convert_eagle(write(tmp_path / "eagle", state), tmp_path / "drafter")
    written = load_file(tmp_path / "drafter" / "model.safetensors")
    assert torch.equal(written["fusion.proj.weight"], state["fc.weight"])
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}


def test_a_linear_fusion_without_bias_adds_nothing(tmp_path: Path) -> None:
    state = eagle_state()
    del state["fc.bias"]
    convert_eagle(write(tmp_path / "eagle", state, bias=False), tmp_path / "drafter")
    assert not load_file(tmp_path / "drafter" / "model.safetensors")["fusion.proj.bias"].any()


def broken(change: str) -> State:
    state = eagle_state() if change in ("missing", "shape", "unknown") else eagle3_state()
    if change == "missing":
        del state["layers.0.mlp.up_proj.weight"]
    elif change == "shape":
        state["fc.weight"] = state["fc.weight"][:, :-1]
    elif change == "unknown":
        state["adapter.weight"] = torch.zeros(2)
    elif change == "tables":
        state["t2d"] = ~state["t2d"]
    return state


@pytest.mark.parametrize(
    ("change", "fields", "named"),
    [
        ("missing", {}, r"lacks the tensor layers\.0\.mlp\.up_proj\.weight"),
        ("shape", {}, r"fc\.weight has shape \(32, 63\).*\(32, 64\)"),
        ("unknown", {}, r"no EAGLE drafter has: adapter\.weight"),
        ("tables", {}, "d2t and t2d name different tokens"),
        ("none", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling 'linear'"),
        ("none", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("none", {"target_hidden_size": 64}, "for a target of 64"),
        ("none", {"vocab_size": None}, "no whole number vocab_size"),
        ("missing", {"num_hidden_layers": 9}, "allowed are 1 to 6"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, change: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(DrafterError, match=named):
        convert_eagle(write(tmp_path / "eagle", broken(change), **fields), tmp_path / "drafter")
    assert not (tmp_path / "drafter").exists()


def test_pickles_and_full_folders_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "eagle", eagle_state())
    with pytest.raises(DrafterError, match="is not empty"):
        convert_eagle(source, source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(DrafterError, match=r"pytorch_model\.bin is a pickle.*save_file"):
        convert_eagle(source, tmp_path / "drafter")
