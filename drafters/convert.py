"""EAGLE checkpoints in, drafter folders out: the drafters that exist for Llama, Vicuna, Qwen ... serve at once.

EAGLE-1 and EAGLE-2 have the same weights (the second changed the tree only): a linear fusion ``fc`` and Llama blocks
under ``layers.N``. EAGLE-3 has one block, ``midlayer``, an ``fc`` over three features, a last norm, an LM head and the
tables ``d2t`` and ``t2d`` of its draft vocabulary. Names and shapes: the published checkpoints (arXiv 2401.15077,
2406.16858, 2503.01840).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.checkpoint import CONFIG_FILE, read_fields, read_weights, refuse_pickles, save_drafter
from drafters.drafter import DrafterError
from drafters.eagle import EagleConfig, EagleNetwork
from drafters.network import BlockConfig, DovetailConfig, DovetailNetwork, FeatureNetwork

EMBEDDING = "embed_tokens.weight"
EAGLE3_MARK = "midlayer."
IGNORED = ("rotary_emb.inv_freq",)  # written by old versions, computed here


@dataclass(frozen=True)
class Conversion:
    """What was converted. kind: ``eagle`` (1 and 2) or ``eagle3``; dropped: tensors that the target itself has."""

    kind: str
    output: str
    num_parameters: int
    num_blocks: int
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int | None
    feature_layers: tuple[str, ...]
    dropped: tuple[str, ...]


class Tensors:
    """A checkpoint's tensors, taken by name; whatever nobody took is an error in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left = {name: tensor for name, tensor in read_folder(folder).items() if not name.endswith(IGNORED)}

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name; DrafterError where it is missing or has another shape."""
        if name not in self.left:
            raise DrafterError(f"{self.folder} lacks the tensor {name}; it is no EAGLE checkpoint that is known here")
        tensor = self.left.pop(name)
        if tuple(tensor.shape) != shape:
            raise DrafterError(
                f"{self.folder}: {name} has shape {tuple(tensor.shape)}; {CONFIG_FILE} describes {shape}"
            )
        return tensor

    def take_if_there(self, name: str, *shape: int) -> Tensor | None:
        """As ``take``, or None."""
        return self.take(name, *shape) if name in self.left else None

    def check_all_taken(self) -> None:
        """Refuse a checkpoint with parts that the drafter would silently lack."""
        if self.left:
            raise DrafterError(f"{self.folder} has tensors that no EAGLE drafter has: {', '.join(sorted(self.left))}")


def convert_eagle(source: Path, output: Path) -> Conversion:
    """Write the EAGLE checkpoint in the folder ``source`` as a drafter folder, in the type its weights have.

    Errors: DrafterError for a pickle, missing, unknown or unfitting tensors, and options that drafting does not know.
    """
    fields = read_fields(source)
    if output.exists() and any(output.iterdir()):
        raise DrafterError(f"{output} is not empty; name a new folder")
    tensors = Tensors(source)
    is_eagle3 = any(name.startswith(EAGLE3_MARK) for name in tensors.left)
    network, state = eagle3(tensors, fields, source) if is_eagle3 else eagle(tensors, fields, source)
    config = network.config
    embedding = tensors.take_if_there(EMBEDDING, config.vocab_size, config.hidden_size)
    tensors.check_all_taken()
    network.load_state_dict(state, assign=True)
    save_drafter(network, output, next(tensor.dtype for tensor in state.values() if tensor.is_floating_point()))
    return Conversion(
        kind="eagle3" if is_eagle3 else "eagle",
        output=str(output),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        num_blocks=config.num_blocks,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.draft_vocab_size,
        feature_layers=network.feature_layers,
        dropped=() if embedding is None else (EMBEDDING,),
    )


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Tensors of all safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DrafterError(f"{folder} holds no *.safetensors{refuse_pickles(folder)}")
    return {name: tensor for file in files for name, tensor in read_weights(file).items()}


def shape_fields(fields: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Our names for what an EAGLE ``config.json`` says, which is a Llama configuration."""
    file = source / CONFIG_FILE
    for name in ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"):
        if not isinstance(fields.get(name), int):
            raise DrafterError(f"{file} has no whole number {name}; an EAGLE checkpoint has a Llama configuration")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise DrafterError(f"{file} asks for rotary scaling {kind!r}; drafters have plain rotary positions")
    if fields.get("hidden_act", "silu") != "silu":
        raise DrafterError(f"{file} asks for the activation {fields['hidden_act']!r}; drafters have silu")
    heads = fields["num_attention_heads"]
    return {
        "hidden_size": fields["hidden_size"],
        "vocab_size": fields["vocab_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
        "rope_theta": float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0),
        "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
    }


def eagle(tensors: Tensors, fields: Mapping[str, Any], source: Path) -> tuple[FeatureNetwork, dict[str, Tensor]]:
    """EAGLE-1 and -2: the network on the meta device and its state."""
    config = DovetailConfig(
        **shape_fields(fields, source),
        num_blocks=fields.get("num_hidden_layers", 1),
        qkv_bias="layers.0.self_attn.q_proj.bias" in tensors.left,
        fusion="linear",
    )
    hidden = config.hidden_size
    weight = tensors.take("fc.weight", hidden, 2 * hidden)
    bias = tensors.take_if_there("fc.bias", hidden)
    state = {
        "fusion.proj.weight": weight,
        "fusion.proj.bias": weight.new_zeros(hidden) if bias is None else bias,
    }
    for index in range(config.num_blocks):
        state |= block_state(tensors, config, f"layers.{index}.", f"blocks.{index}.", hidden)
        if index > 0:
            state[f"blocks.{index}.attention_norm.weight"] = tensors.take(
                f"layers.{index}.input_layernorm.weight", hidden
            )
    with torch.device("meta"):
        return DovetailNetwork(config), state


def eagle3(tensors: Tensors, fields: Mapping[str, Any], source: Path) -> tuple[FeatureNetwork, dict[str, Tensor]]:
    """EAGLE-3: the network on the meta device and its state."""
    shape = shape_fields(fields, source)
    hidden, vocab_size = shape["hidden_size"], shape["vocab_size"]
    if fields.get("target_hidden_size", hidden) != hidden:
        raise DrafterError(
            f"{source} drafts with hidden size {hidden} for a target of {fields['target_hidden_size']}; only drafters "
            "as wide as their target are supported, since they share its embedding"
        )
    draft_ids = draft_vocabulary(tensors, vocab_size)
    config = EagleConfig(
        **shape,
        qkv_bias=f"{EAGLE3_MARK}self_attn.q_proj.bias" in tensors.left,
        draft_vocab_size=None if draft_ids is None else len(draft_ids),
    )
    state = {
        "feature_proj.weight": tensors.take("fc.weight", hidden, 3 * hidden),
        "embedding_norm.weight": tensors.take(f"{EAGLE3_MARK}input_layernorm.weight", hidden),
        "hidden_norm.weight": tensors.take(f"{EAGLE3_MARK}hidden_norm.weight", hidden),
        "output_norm.weight": tensors.take("norm.weight", hidden),
        "head.weight": tensors.take("lm_head.weight", config.draft_vocab_size or vocab_size, hidden),
        **block_state(tensors, config, EAGLE3_MARK, "block.", 2 * hidden),
    }
    if draft_ids is not None:
        state["draft_ids"] = draft_ids
    with torch.device("meta"):
        return EagleNetwork(config), state


def block_state(tensors: Tensors, config: BlockConfig, old: str, new: str, width: int) -> dict[str, Tensor]:
    """One Llama block under our names; query, key and value (gate and up) become one matrix."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    rows = {"q": config.num_heads * head_dim, "k": config.num_kv_heads * head_dim, "v": config.num_kv_heads * head_dim}
    qkv = [tensors.take(f"{old}self_attn.{name}_proj.weight", count, width) for name, count in rows.items()]
    gate_up = [tensors.take(f"{old}mlp.{name}_proj.weight", inner, hidden) for name in ("gate", "up")]
    state = {
        f"{new}qkv_proj.weight": torch.cat(qkv),
        f"{new}output_proj.weight": tensors.take(f"{old}self_attn.o_proj.weight", hidden, rows["q"]),
        f"{new}mlp_norm.weight": tensors.take(f"{old}post_attention_layernorm.weight", hidden),
        f"{new}gate_up_proj.weight": torch.cat(gate_up),
        f"{new}down_proj.weight": tensors.take(f"{old}mlp.down_proj.weight", hidden, inner),
    }
    if config.qkv_bias:
        biases = [tensors.take(f"{old}self_attn.{name}_proj.bias", count) for name, count in rows.items()]
        state[f"{new}qkv_proj.bias"] = torch.cat(biases)
    return state


def draft_vocabulary(tensors: Tensors, vocab_size: int) -> Tensor | None:
    """The tokens that can be drafted, from ``d2t`` (offset of each draft id to its token); None for all of them.

    ``t2d`` marks the same tokens in the whole vocabulary; the two must agree.
    """
    offsets = tensors.left.pop("d2t", None)
    marks = tensors.take_if_there("t2d", vocab_size)
    if offsets is None:
        return None
    draft_ids = torch.arange(len(offsets)) + offsets.long()
    wanted = draft_ids if marks is None else marks.bool().nonzero().flatten()
    if not torch.equal(draft_ids, wanted):
        raise DrafterError(f"{tensors.folder}: the tables d2t and t2d name different tokens")
    return draft_ids
